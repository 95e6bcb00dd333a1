"""Results as they leave the library: one per frame, and the payload of a whole video (the contract of the REST API)."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class FrameResult:
    """What is known of one sampled frame. `description` is empty where status is "error". Times as in Answer."""

    frame_idx: int
    timestamp_ms: int
    description: str
    status: Literal["success", "error"] = "success"
    error_message: str | None = None
    image_encode_ms: float = 0.0
    llm_inference_ms: float = 0.0
    total_ms: float = 0.0
    num_tokens: int = 0
    finish_reason: str | None = None
    reused_from_frame_idx: int | None = None  # the described frame that this one looks like
    is_cached: bool = False  # the answer was given before, in another job

    def to_json(self, job_id: str | None = None) -> dict[str, Any]:
        """The frame result of the API; the last three fields stand only where there is something to tell."""
        result = {
            "job_id_for_frame": job_id,
            "frame_idx": self.frame_idx,
            "timestamp_ms": self.timestamp_ms,
            "description": self.description,
            "processing_times_ms": {
                "image_encode": round(self.image_encode_ms, 1),
                "llm_inference": round(self.llm_inference_ms, 1),
                "total_worker_frame_time": round(self.total_ms, 1),
            },
            "num_tokens": self.num_tokens,
            "finish_reason": self.finish_reason,
            "status": self.status,
        }
        more = {
            "error_message": self.error_message,
            "reused_from_frame_idx": self.reused_from_frame_idx,
            "cached": self.is_cached or None,
        }
        return result | {name: value for name, value in more.items() if value is not None}


@dataclass(frozen=True)
class ModelName:
    """Which model answered, and on what."""

    id: str
    revision: str | None
    device: str
    dtype: str


@dataclass
class Timings:
    """Wall-clock seconds of a run's stages. Extraction and model overlap or alternate, so parts need not add up."""

    video_download: float = 0.0
    frame_extraction: float = 0.0
    distributed_frame_processing_map: float = 0.0
    overall_pipeline_internal: float = 0.0


@dataclass
class RunStats:
    """What describing a video's frames counts as it goes."""

    num_submitted: int = 0  # to the model; repeats are not
    timings: Timings = field(default_factory=Timings)


@dataclass
class VideoResults:
    """Everything about one described video."""

    video_url: str
    target_fps: float
    average_fps: float | None
    model: ModelName
    run: RunStats = field(default_factory=RunStats)
    frames: list[FrameResult] = field(default_factory=list)
    is_truncated: bool = False
    warnings: Sequence[str] = ()

    def to_json(self) -> dict[str, Any]:
        """The results_payload of the API."""
        return {
            "video_url": self.video_url,
            "target_fps_setting": self.target_fps,
            "actual_original_fps": self.average_fps,
            "total_frames_submitted_to_workers": self.run.num_submitted,
            "total_frames_results_received": len(self.frames),
            "timings_seconds": {stage: round(seconds, 3) for stage, seconds in vars(self.run.timings).items()},
            "model": vars(self.model),
            "truncated": self.is_truncated,
            "warnings": list(self.warnings),
            "frame_results": [frame.to_json() for frame in self.frames],
        }
