"""Which frames of a video are sampled, and how much of a video is taken: arithmetic and limits, without a decoder.

Both sides of the decoder's pipe share these types. Test: pytest tests/test_sampling.py
"""

import math
from dataclasses import Field, dataclass, field, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import InvalidOption, VideoTooLarge

MAX_LONG_SIDE = 1920  # px of a sampled frame
MAX_TIME_S = 1e9  # these two keep the arithmetic of buckets finite
MAX_FPS = 1e6


@dataclass(frozen=True)
class Frame:
    """One sampled frame. image is RGB uint8 (H, W, 3), C-contiguous, its long side at most MAX_LONG_SIDE."""

    frame_idx: int  # among the decoded frames, in presentation order
    timestamp_ms: int  # presentation time minus the container's start time: what a player's clock shows
    image: NDArray[np.uint8]

    @property
    def time_s(self) -> float:
        return self.timestamp_ms / 1000


@dataclass(frozen=True)
class Window:
    """What is asked of a video: target_fps frames per second of [start_s, end_s), the first max_frames of them.

    Raises InvalidOption for what no video can give."""

    target_fps: float
    start_s: float = 0.0
    end_s: float | None = None
    max_frames: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.target_fps < math.inf:
            raise InvalidOption(f"target_fps is {self.target_fps}: use a number above 0.")
        if not 0 <= self.start_s <= MAX_TIME_S:
            raise InvalidOption(f"start_s is {self.start_s}: use 0 or more seconds.")
        if self.end_s is not None and not self.start_s < self.end_s <= MAX_TIME_S:
            raise InvalidOption(f"end_s is {self.end_s}: use a time after start_s ({self.start_s}), or leave it out.")
        if self.max_frames is not None and self.max_frames < 1:
            raise InvalidOption(f"max_frames is {self.max_frames}: use 1 or more, or leave it out.")

    def bucket(self, time_s: float, frame_s: float) -> int:
        """Number the bucket of 1 / target_fps, from start_s on, that a frame shown at time_s falls into."""
        target_fps = min(self.target_fps, MAX_FPS)
        slack_s = min(0.010, frame_s / 2, 0.25 / target_fps)  # timestamps are rounded, and jitter: it may come early
        bucket = math.floor((time_s - self.start_s + slack_s) * target_fps)
        if self.end_s is None:
            return bucket
        return min(bucket, math.ceil((self.end_s - self.start_s) * target_fps) - 1)  # slack opens none past the window


@dataclass(frozen=True)
class VideoInfo:
    """What the file says of its video. Only sizes and start_s are measured, on the first frame."""

    container: str  # "mp4", "webm", "matroska", "avi", "mpegts", ...: a key of sniff.CONTAINERS
    codec: str  # "h264", "av1", ...
    width: int  # px as shown: upright and with square pixels, before the reduction to MAX_LONG_SIDE
    height: int
    start_s: float  # when a player shows the first frame; above 0 if the sound begins earlier
    duration_s: float | None  # of the whole file; None where nobody wrote it (browser recordings)
    average_fps: float | None
    nominal_fps: float | None  # the grid of the timestamps; above the average if the frame rate varies
    num_frames_estimate: int | None
    has_audio: bool

    def estimate_samples(self, window: Window) -> int | None:
        """Estimate how many frames sample_frames will yield, for progress bars; None if the end is not known.

        Exact for a constant frame rate."""
        frame_s = 1 / (self.average_fps or 25)
        ends_s = [self.duration_s - frame_s] if self.duration_s else []
        ends_s += [window.end_s - 0.0005] if window.end_s else []  # just before end_s, as timestamps are whole ms
        if not ends_s:
            return None
        first_s, last_s = max(window.start_s, self.start_s), min(ends_s)
        num_shown = math.floor((last_s - first_s) / frame_s + 1e-3) + 1
        num_buckets = window.bucket(last_s, frame_s) - window.bucket(first_s, frame_s) + 1
        return max(0, min(num_buckets, num_shown, window.max_frames or num_shown))

    def __str__(self) -> str:
        fps = f"{self.average_fps:.4g} fps" if self.average_fps else "frame rate unknown"
        lasting = clock_time(self.duration_s) if self.duration_s else "length unknown"
        sound = "with sound" if self.has_audio else "silent"
        return f"{lasting} of {self.width} x {self.height}, {fps}, {self.codec} in {self.container}, {sound}"


def _limit(default: Any, most: int, help_text: str) -> Any:
    return field(default=default, metadata={"help": help_text, "most": most})


@dataclass(frozen=True)
class DecodeLimits:
    """How much of a video is taken. What goes beyond is refused, or ends the video there, with an error that names the
    limit and what was met; the frames before it have been sampled by then."""

    max_video_bytes: int = _limit(2_000_000_000, 1 << 62, "size of the file, downloaded or not")
    max_duration_s: float = _limit(4 * 3600.0, 10_000_000, "length of the video, or of its part before end_s")
    max_frames: int = _limit(20_000, 1_000_000_000, "frames to describe")
    max_pixels: int = _limit(36_000_000, (1 << 31) - 1, "pixels of a frame; 8K has 33 million")
    max_bad_packets: int = _limit(500, 1_000_000_000, "damaged packets in a row")
    max_memory_bytes: int = _limit(2_500_000_000, 1 << 62, "address space of the decoder's process")
    cpu_s: float = _limit(60.0, 10_000_000, "CPU time of the decoder's process, for any video")
    cpu_s_per_video_s: float = _limit(5.0, 10_000, "and so much more for each second of video; 4K at 60 fps takes 1.5")
    idle_s: float = _limit(60.0, 1_000_000, "how long the decoder may take for one step")

    def __post_init__(self) -> None:
        """Raises InvalidOption."""
        for limit in fields(self):
            value, most = getattr(self, limit.name), limit.metadata["most"]
            if not 0 < value <= most:
                raise InvalidOption(f"limit {limit.name} is {value}: use a number above 0, and at most {most:,}.")


LIMITS: dict[str, Field[Any]] = {limit.name: limit for limit in fields(DecodeLimits)}
DEFAULT_LIMITS = DecodeLimits()


def parse_limits(texts: list[str]) -> DecodeLimits:
    """Read changed limits, each as "name=number". Raises InvalidOption."""
    changes = {}
    for text in texts:
        name, _, value = text.partition("=")
        name = name.strip().replace("-", "_")
        if name not in LIMITS:
            raise InvalidOption(f"There is no limit {name!r}. Use one of {', '.join(LIMITS)}.")
        try:
            changes[name] = type(LIMITS[name].default)(value.replace("_", ""))
        except ValueError:
            raise InvalidOption(f"limit {text!r}: write it as {name}={LIMITS[name].default}.") from None
    return replace(DEFAULT_LIMITS, **changes)


def check_size(info: VideoInfo, window: Window, limits: DecodeLimits) -> None:
    """Find out before the work whether a video is too long for its limits. Raises VideoTooLarge.

    Files may lie: the decoder counts for itself, too."""
    if info.duration_s and min(info.duration_s, window.end_s or math.inf) > limits.max_duration_s:
        raise too_long(f"lasts {clock_time(info.duration_s)}", limits)
    num_samples = info.estimate_samples(window)
    if num_samples and num_samples > limits.max_frames:
        raise too_many_frames(f"about {num_samples:,} frames", window, limits)


def too_many_bytes(how_many: str, max_video_bytes: int) -> VideoTooLarge:
    return VideoTooLarge(
        f"The video has {how_many}; {max_video_bytes:,} are the most that are taken (limit max_video_bytes). Send a "
        "shorter or smaller version."
    )


def too_long(what_it_does: str, limits: DecodeLimits) -> VideoTooLarge:
    longest = clock_time(limits.max_duration_s)
    return VideoTooLarge(
        f"The video {what_it_does}; {longest} is the most that is taken (limit max_duration_s). "
        f"Ask for a part that ends by then, with end_s, or cut the video."
    )


def too_many_frames(how_many: str, window: Window, limits: DecodeLimits) -> VideoTooLarge:
    return VideoTooLarge(
        f"At {window.target_fps:g} per second, this part of the video has {how_many}; {limits.max_frames:,} are "
        "the most that are taken (limit max_frames). Lower target_fps, or ask for a shorter part."
    )


def clock_time(seconds: float) -> str:
    """As players show it: 0:42, 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
