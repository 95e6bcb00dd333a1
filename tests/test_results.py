"""The JSON shapes that clients depend on."""

from pipeline.results import FrameResult, ModelName, RunStats, Timings, VideoResults

MODEL = ModelName("demo", None, "cpu", "float32")


def test_a_frame_result_has_the_names_of_the_contract() -> None:
    result = FrameResult(25, 1000, "A red circle.", image_encode_ms=1.26, llm_inference_ms=2.0, total_ms=4.0)

    assert result.to_json("job_1") == {
        "job_id_for_frame": "job_1",
        "frame_idx": 25,
        "timestamp_ms": 1000,
        "description": "A red circle.",
        "processing_times_ms": {"image_encode": 1.3, "llm_inference": 2.0, "total_worker_frame_time": 4.0},
        "num_tokens": 0,
        "finish_reason": None,
        "status": "success",
    }


def test_an_error_message_stands_only_where_there_is_one() -> None:
    assert FrameResult(0, 0, "", "error", "It does not fit.").to_json()["error_message"] == "It does not fit."


def test_the_payload_has_the_names_of_the_contract() -> None:
    run = RunStats(2, Timings(1, 2, 3, 4))
    results = VideoResults("clip.mp4", 1.0, 25.0, MODEL, run, [FrameResult(0, 0, "A.")], True, ["cut"])

    payload = results.to_json()

    assert payload.pop("frame_results") == [FrameResult(0, 0, "A.").to_json()]
    assert payload == {
        "video_url": "clip.mp4",
        "target_fps_setting": 1.0,
        "actual_original_fps": 25.0,
        "total_frames_submitted_to_workers": 2,
        "total_frames_results_received": 1,
        "timings_seconds": {
            "video_download": 1,
            "frame_extraction": 2,
            "distributed_frame_processing_map": 3,
            "overall_pipeline_internal": 4,
        },
        "model": {"id": "demo", "revision": None, "device": "cpu", "dtype": "float32"},
        "truncated": True,
        "warnings": ["cut"],
    }
