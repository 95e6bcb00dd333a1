"""What comes in and goes out over HTTP: the shapes of the REST contract, with the examples that /docs shows.

Requests are checked by these models; answers are built as dictionaries in views.py and described by them. The names of
the fields never change; new ones may come. Test: pytest tests/test_schema.py
"""

from enum import StrEnum
from typing import Annotated, Any, Literal, Self

import orjson
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from pipeline.errors import DescriberError, InvalidOption
from pipeline.moondream.config import TokenizerConfig
from pipeline.moondream.prompts import DEFAULT_MAX_TOKENS, DEFAULT_QUESTION, Caption, Query, Sampling
from pipeline.moondream.prompts import check as check_task
from pipeline.sampling import MAX_TIME_S, Window
from pipeline.similarity import DEFAULT_THRESHOLD

MAX_METADATA_BYTES = 4096
MAX_COUNT = 1 << 53  # larger ones are not the same number in every JSON reader
UPLOAD = "upload:"  # begins the video_url of an uploaded file


def _leaves(error: type[DescriberError]) -> list[type[DescriberError]]:
    children = error.__subclasses__()
    return [leaf for child in children for leaf in _leaves(child)] if children else [error]


# The codes of all errors: those of pipeline/errors.py, and what HTTP itself can refuse.
ErrorCode = StrEnum(
    "ErrorCode",
    {leaf.code.upper(): leaf.code for leaf in _leaves(DescriberError)}
    | {"NOT_FOUND": "not_found", "METHOD_NOT_ALLOWED": "method_not_allowed"},
)
JobStatusName = Literal["submitted", "processing", "completed", "failed", "canceled"]
ExportFormat = Literal["json", "jsonl", "csv", "srt", "vtt"]


def _read_json(value: Any) -> Any:
    """Form fields and query parameters bring objects as JSON text."""
    if isinstance(value, str):
        try:
            return orjson.loads(value)
        except orjson.JSONDecodeError:
            raise ValueError('write it as JSON, for example {"album": 7}') from None
    return value


def _read_threshold(value: Any) -> Any:
    """Who does not care for numbers says true or false, or in forms on or off."""
    words = {"true": DEFAULT_THRESHOLD, "on": DEFAULT_THRESHOLD, "false": 0.0, "off": 0.0}
    return words.get(str(value).strip().lower(), value)


class JobOptions(BaseModel):
    """What is asked about a video."""

    model_config = ConfigDict(extra="forbid", str_strip_whitespace=True, allow_inf_nan=False)

    target_fps: float = Field(1.0, gt=0, le=1000, description="frames to describe per second of video", examples=[1])
    question: str = Field(DEFAULT_QUESTION, max_length=4000, description="what to ask of each frame")
    start_s: float = Field(0.0, ge=0, le=MAX_TIME_S, description="begin here, in seconds")
    end_s: float | None = Field(None, gt=0, le=MAX_TIME_S, description="end before here, in seconds")
    max_frames: int | None = Field(None, ge=1, le=MAX_COUNT, description="describe only the first frames of the part")
    caption_length: Literal["short", "normal", "long"] | None = Field(
        None, description="caption each frame in this length, instead of asking the question"
    )
    max_tokens: int = Field(DEFAULT_MAX_TOKENS, ge=1, le=MAX_COUNT, description="longest answer, in tokens")
    temperature: float = Field(0.0, ge=0, le=2, description="0 for the likeliest words; above, answers vary")
    reuse_similar: Annotated[float, BeforeValidator(_read_threshold)] = Field(
        DEFAULT_THRESHOLD,
        ge=0,
        le=255,
        description="a frame that differs by so little from the last described one takes over its answer; 0: none does",
    )
    webhook_url: str | None = Field(None, max_length=8192, description="is told when the job ends", examples=[None])
    metadata: Annotated[dict[str, Any], BeforeValidator(_read_json)] = Field(
        default_factory=dict, description="kept with the job and given back; at most 4 KB of JSON", examples=[{}]
    )

    @field_validator("metadata")
    @classmethod
    def _check_metadata(cls, value: dict[str, Any]) -> dict[str, Any]:
        try:
            num_bytes = len(orjson.dumps([[[[[[value]]]]]])) - 12  # a record lies deeper, and orjson ends at 254 levels
        except TypeError:
            raise ValueError(
                "it holds what JSON cannot: a number beyond 64 bits, or text that is not Unicode"
            ) from None
        if num_bytes > MAX_METADATA_BYTES:
            raise ValueError(f"it has {num_bytes:,} bytes; {MAX_METADATA_BYTES:,} are the most")
        return value

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        try:
            self.window()
            check_task(self.task(), TokenizerConfig())
            orjson.dumps(self.model_dump())
        except InvalidOption as error:
            raise ValueError(str(error)) from None
        except TypeError:
            raise ValueError("a text or number is outside what JSON can hold") from None
        return self

    def window(self) -> Window:
        return Window(self.target_fps, self.start_s, self.end_s, self.max_frames)

    def task(self) -> Query | Caption:
        sampling = Sampling(temperature=self.temperature)
        if self.caption_length:
            return Caption(self.caption_length, self.max_tokens, sampling)
        return Query(self.question, max_tokens=self.max_tokens, sampling=sampling)


class JobRequest(JobOptions):
    """A job: a video, and what is asked about it."""

    video_url: str = Field(
        min_length=1,
        max_length=8192,
        description="http or https address of the video file",
        examples=["https://example.com/holiday.mp4"],
    )
    source_job_id: str | None = None  # whose video it is


class Submitted(BaseModel):
    job_id: str = Field(examples=["job_8f14e45f-ceea-467f-9b1d-3a2c1f0e7d55"])
    status: Literal["submitted"] = "submitted"
    message: str = "Job submitted for processing."


class FrameAnswer(BaseModel):
    """The answer to a question about one frame."""

    job_id: str
    frame_idx: int
    timestamp_ms: int
    question: str
    answer: str = Field(examples=["Three."])


class Problem(BaseModel):
    """RFC 9457, as application/problem+json."""

    type: str = Field("about:blank", examples=["about:blank"])
    title: str = Field(examples=["Not Found"])
    status: int = Field(examples=[404])
    detail: str = Field(examples=["Job ID not found in store. It may have been deleted, or belong to another key."])
    code: ErrorCode = Field(examples=["job_not_found"])


class ProcessingTimes(BaseModel):
    image_encode: float
    llm_inference: float
    total_worker_frame_time: float


class FrameResultOut(BaseModel):
    job_id_for_frame: str
    frame_idx: int = Field(description="index in the source video")
    timestamp_ms: int = Field(description="presentation time, on the player's clock")
    description: str = Field(examples=["A red circle at the top left on a white background."])
    processing_times_ms: ProcessingTimes
    num_tokens: int
    finish_reason: str | None
    status: Literal["success", "error"]
    error_message: str | None = None
    reused_from_frame_idx: int | None = None
    cached: bool | None = Field(None, description="the answer was given before, in another job of yours")
    seq: int = Field(description="1-based order of storing: the cursor of partial results and the id of events")


class ModelOut(BaseModel):
    id: str = Field(examples=["vikhyatk/moondream2"])
    revision: str | None
    device: str
    dtype: str


class TimingsOut(BaseModel):
    video_download: float
    frame_extraction: float
    distributed_frame_processing_map: float
    overall_pipeline_internal: float


class ResultsPayload(BaseModel):
    video_url: str
    target_fps_setting: float
    actual_original_fps: float | None
    total_frames_submitted_to_workers: int
    total_frames_results_received: int
    timings_seconds: TimingsOut
    model: ModelOut
    truncated: bool
    warnings: list[str]
    frame_results: list[FrameResultOut]


class JobSummary(BaseModel):
    """A job as lists show it: without its results, and without the query of its URL, which may be a secret."""

    job_id: str
    status: JobStatusName
    video_url: str
    input_target_fps: float
    input_question: str
    caption_length: str | None = Field(description="if set, frames are captioned, and not asked the question")
    source_job_id: str | None = Field(description="the job whose video is asked about again")
    submitted_at: float = Field(description="Unix seconds, like all times here")
    processing_started_at: float | None
    completed_at: float | None
    failed_at: float | None
    canceled_at: float | None
    stage: Literal["downloading", "describing"] | None
    progress: float = Field(ge=0, le=100, description="percent")
    frames_processed: int
    total_frames_expected: int | None
    frames_failed: int
    frames_reused: int
    duration_s: float | None = Field(description="of the video")
    truncated: bool = Field(description="max_frames left out a part")
    metadata: dict[str, Any]
    error_message: str | None
    error_code: ErrorCode | None


class JobStatus(JobSummary):
    """Everything about a job. results_payload is null until it is completed."""

    frames_per_second: float | None
    bytes_downloaded: int | None
    eta_seconds: float | None
    queue_position: int | None = Field(description="0: the next one")
    start_s: float
    end_s: float | None
    max_frames: int | None
    max_tokens: int
    temperature: float
    reuse_similar: float
    last_seq: int
    warnings: list[str]
    model: ModelOut | None
    results_payload: ResultsPayload | None = None


class JobPage(BaseModel):
    jobs: list[JobSummary]
    total_count: int = Field(description="matches in all")
    next_cursor: str | None


class FramePage(BaseModel):
    frames: list[FrameResultOut]
    next_after: int = Field(description="give it as `after` to go on")
    is_finished: bool = Field(description="no more will come")


class Health(BaseModel):
    status: Literal["ok"] = "ok"


class Node(BaseModel):
    """A node of a cluster; its name is in /metrics, for the operator."""

    num_instances: int  # that work there now
    num_gpus: float  # that they use
    num_frames: int  # described there since the start
    frames_per_second: float  # over the last 10 s


class Ready(BaseModel):
    status: Literal["ready"] = "ready"
    model: ModelOut
    warnings: list[str]  # what is wrong with this host, although jobs are described
    nodes: list[Node]  # of a cluster, if the model is on one
