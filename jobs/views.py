"""A job as the API shows it: from its record, and what is known of it while it runs. See schema.py for the shapes.

Test: pytest tests/test_views.py
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jobs.live import Live
from jobs.record import Record
from jobs.schema import UPLOAD
from pipeline.urls import shown

DOWNLOAD_SHARE = 0.05  # of the progress: a download is short beside the describing


@dataclass(frozen=True)
class FrameCounts:
    num_frames: int
    num_failed: int
    num_reused: int
    last_seq: int


def stored_counts(record: Record) -> FrameCounts:
    return FrameCounts(
        record["num_frames"], record["num_frames_failed"], record["num_frames_reused"], record["last_seq"]
    )


def summary(record: Record, counts: FrameCounts | None = None, live: Live | None = None) -> dict[str, Any]:
    """A JobSummary. `counts` are needed for a running job, whose record does not have them yet."""
    counts = counts or stored_counts(record)
    request = record["request"]
    url = request["video_url"]
    return {
        "job_id": record["job_id"],
        "status": record["status"],
        "video_url": url if url.startswith(UPLOAD) else shown(url),
        "input_target_fps": request["target_fps"],
        "input_question": request["question"],
        "caption_length": request["caption_length"],
        "source_job_id": request["source_job_id"],
        **{name: record[name] for name in ("submitted_at", "processing_started_at", "completed_at", "failed_at")},
        "canceled_at": record["canceled_at"],
        "stage": record["stage"],
        "progress": _progress(record, counts, live),
        "frames_processed": counts.num_frames,
        "total_frames_expected": record["num_frames_expected"],
        "frames_failed": counts.num_failed,
        "frames_reused": counts.num_reused,
        "duration_s": record["duration_s"],
        "truncated": record["is_truncated"],
        "metadata": request["metadata"],
        "error_message": record["error_message"],
        "error_code": record["error_code"],
    }


def status(
    record: Record, counts: FrameCounts, live: Live | None, queue_position: int | None, results: dict[str, Any] | None
) -> dict[str, Any]:
    """A JobStatus."""
    request = record["request"]
    rate = live.frames_per_second(counts.num_frames) if live else None
    expected = record["num_frames_expected"]
    return {
        **summary(record, counts, live),
        "video_url": request["video_url"],  # whole: it is shown only to whom the job belongs
        "frames_per_second": round(rate, 3) if rate else None,
        "bytes_downloaded": live.bytes_downloaded if live else None,
        "eta_seconds": round(max(0, expected - counts.num_frames) / rate, 1) if rate and expected else None,
        "queue_position": queue_position,
        **{name: request[name] for name in ("start_s", "end_s", "max_frames", "max_tokens", "temperature")},
        "reuse_similar": request["reuse_similar"],
        "last_seq": counts.last_seq,
        "warnings": record["warnings"],
        "model": record["model"],
        "results_payload": results,
    }


def results_payload(record: Record, frames: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A ResultsPayload. `frames` are the job's results, by frame_idx."""
    timings = record["timings"]
    stages = ("video_download", "frame_extraction", "distributed_frame_processing_map", "overall_pipeline_internal")
    return {
        "video_url": record["request"]["video_url"],
        "target_fps_setting": record["request"]["target_fps"],
        "actual_original_fps": record["average_fps"],
        "total_frames_submitted_to_workers": sum(f.get("reused_from_frame_idx") is None for f in frames),
        "total_frames_results_received": len(frames),
        "timings_seconds": {stage: round(timings.get(stage, 0.0), 3) for stage in stages},
        "model": record["model"],
        "truncated": record["is_truncated"],
        "warnings": record["warnings"],
        "frame_results": frames,
    }


def _progress(record: Record, counts: FrameCounts, live: Live | None) -> float:
    """Percent. A finished job is at 100 only if it is completed; where the length is unknown, it stays at the start."""
    if record["status"] == "completed":
        return 100.0
    downloaded = live.download_percent / 100 if live and record["stage"] == "downloading" else 1.0
    expected = record["num_frames_expected"]
    described = min(1.0, counts.num_frames / expected) if expected else 0.0
    if record["stage"] == "downloading" and not counts.num_frames:
        return round(100 * DOWNLOAD_SHARE * downloaded, 1)
    share = DOWNLOAD_SHARE if record["container"] else 0.0
    return round(min(99.9, 100 * (share + (1 - share) * described)), 1)
