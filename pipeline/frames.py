"""Decode a local video and sample its frames by presentation time, with PyAV.

`sample_frames` streams: memory holds three decoded frames, never the video. sniff.py decides which files may be opened,
picture.py what a frame looks like; this module is about time. It knows nothing of URLs, models or jobs, and never uses
cv2.VideoCapture: OpenCV 5.0 returns uninitialised memory for interlaced video and no frames for AV1.

Check it against a folder of videos: python -m pipeline.frames tests/data/odd
"""

import argparse
import math
import os
import sys
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from av.container import InputContainer
from av.error import FFmpegError
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream
from numpy.typing import NDArray

from pipeline.errors import InvalidOption, NoFrames, VideoNotFound, VideoUnreadable
from pipeline.picture import deinterlace, shown_size, to_rgb
from pipeline.sniff import FORMAT_WHITELIST, HEAD_BYTES, sniff

MAX_PIXELS = 36_000_000  # of one frame; 8K is 33 million
MAX_BAD_PACKETS = 500
MAX_JUMP_S = 3600  # a longer pause is a broken clock
MAX_TIME_S = 1e9  # these two keep the arithmetic of buckets finite
MAX_FPS = 1e6


@dataclass(frozen=True)
class VideoInfo:
    """What the file says of its video. Only sizes and start_s are measured, on the first frame."""

    container: str  # "mp4", "webm", "matroska", "avi", "mpegts", ...: a key of sniff.CONTAINERS
    codec: str  # "h264", "av1", ...
    width: int  # px as shown: upright and with square pixels, before the reduction to 1920
    height: int
    start_s: float  # when a player shows the first frame; above 0 if the sound begins earlier
    duration_s: float | None  # of the whole file; None where nobody wrote it (browser recordings)
    average_fps: float | None
    nominal_fps: float | None  # the grid of the timestamps; above the average if the frame rate varies
    num_frames_estimate: int | None
    has_audio: bool

    def estimate_samples(
        self, target_fps: float, *, start_s: float = 0.0, end_s: float | None = None, max_frames: int | None = None
    ) -> int | None:
        """Estimate how many frames sample_frames will yield, for progress bars; None if the end is not known.

        Exact for a constant frame rate. Raises InvalidOption."""
        _check_options(target_fps, start_s, end_s, max_frames)
        frame_s = 1 / (self.average_fps or 25)
        ends_s = [self.duration_s - frame_s] if self.duration_s else []
        ends_s += [end_s - 0.0005] if end_s else []  # just before end_s, as timestamps are whole ms
        if not ends_s:
            return None
        first_s, last_s = max(start_s, self.start_s), min(ends_s)
        first_bucket, last_bucket = (_bucket(t, target_fps, start_s, end_s, frame_s) for t in (first_s, last_s))
        num_shown = math.floor((last_s - first_s) / frame_s + 1e-3) + 1
        return max(0, min(last_bucket - first_bucket + 1, num_shown, max_frames or num_shown))


@dataclass(frozen=True)
class Frame:
    """One sampled frame. image is RGB uint8 (H, W, 3), C-contiguous, its long side at most 1920."""

    frame_idx: int  # among the decoded frames, in presentation order
    timestamp_ms: int  # presentation time minus the container's start time: what a player's clock shows
    image: NDArray[np.uint8]


@dataclass
class SamplingNotes:
    """What sample_frames finds out on its way; complete when it has ended."""

    warnings: list[str] = field(default_factory=list)  # damaged intervals, an early end, a cut at max_frames
    is_truncated: bool = False  # max_frames left out frames of the window


def probe(path: str | os.PathLike[str]) -> VideoInfo:
    """Read what is known before sampling, decoding one frame. Raises VideoNotFound or VideoUnreadable."""
    with _opened(path) as (container, stream, container_name):
        first = next(_decode_on_clock(container, stream, SamplingNotes()))
        width, height = shown_size(first.frame, stream)
        duration_s = _duration_s(container)
        average_fps = float(stream.average_rate) if stream.average_rate else None
        num_frames_estimate = stream.frames or None  # wrong for edit lists, absent in WebM: the product is better
        if duration_s and average_fps:
            num_frames_estimate = round((duration_s - first.time_s) * average_fps)
        return VideoInfo(
            container=container_name,
            codec=stream.codec_context.codec.canonical_name,
            width=width,
            height=height,
            start_s=first.time_s,
            duration_s=duration_s,
            average_fps=average_fps,
            nominal_fps=float(stream.guessed_rate) if stream.guessed_rate else None,
            num_frames_estimate=num_frames_estimate,
            has_audio=bool(container.streams.audio),
        )


def sample_frames(
    path: str | os.PathLike[str],
    target_fps: float,
    *,
    start_s: float = 0.0,
    end_s: float | None = None,
    max_frames: int | None = None,
    notes: SamplingNotes | None = None,
) -> Generator[Frame, None, None]:
    """Sample target_fps frames per second of the window [start_s, end_s), the first max_frames of them.

    Time is cut into buckets of 1 / target_fps, counted from start_s. Each gives the first frame presented in it, under
    that frame's own time, or nothing if there is none: a target above the source's rate yields every frame once.
    Damaged packets are skipped; `notes`, if given, records what is missing. Closing the generator closes the file.

    Raises InvalidOption at the call; VideoNotFound, VideoUnreadable (saying what the file is) or NoFrames (nothing is
    presented in the window) while iterating."""
    _check_options(target_fps, start_s, end_s, max_frames)
    return _sample(path, target_fps, start_s, end_s, max_frames, notes or SamplingNotes())


def _sample(
    path: str | os.PathLike[str],
    target_fps: float,
    start_s: float,
    end_s: float | None,
    max_frames: int | None,
    notes: SamplingNotes,
) -> Generator[Frame, None, None]:
    start_ms = round(start_s * 1000)
    end_ms = math.inf if end_s is None else round(end_s * 1000)
    last_bucket, num_sampled, time_s = -math.inf, 0, 0.0
    reformatter = VideoReformatter()
    with _opened(path) as (container, stream, _):
        frame_s = _frame_s(stream)
        for before, current, after in _with_neighbours(_decode_on_clock(container, stream, notes)):
            frame_idx, time_s, frame = current
            # The window is compared with the label, so that no label lies outside the window asked for.
            timestamp_ms = round(time_s * 1000)
            if timestamp_ms >= end_ms:
                break
            bucket = _bucket(time_s, target_fps, start_s, end_s, frame_s)
            if timestamp_ms < start_ms or bucket <= last_bucket:
                continue
            if num_sampled == max_frames:
                notes.is_truncated = True
                notes.warnings.append(
                    f"Stopped after {max_frames} frames: the next one, at {time_s:.3f} s, is left out."
                )
                return
            last_bucket, num_sampled = bucket, num_sampled + 1
            if frame.interlaced_frame:
                frame = deinterlace(before and before.frame, frame, after and after.frame)
            yield Frame(frame_idx, timestamp_ms, to_rgb(frame, stream, reformatter))
    if not num_sampled:
        end = "the end" if end_s is None else f"{end_s:.3f} s"
        raise NoFrames(
            f"No frames extracted from video: it shows none between {start_s:.3f} s and {end}. "
            f"There is one at {time_s:.3f} s: choose another window."
        )


def _check_options(target_fps: float, start_s: float, end_s: float | None, max_frames: int | None) -> None:
    if not 0 < target_fps < math.inf:
        raise InvalidOption(f"target_fps is {target_fps}: use a number above 0.")
    if not 0 <= start_s <= MAX_TIME_S:
        raise InvalidOption(f"start_s is {start_s}: use 0 or more seconds.")
    if end_s is not None and not start_s < end_s <= MAX_TIME_S:
        raise InvalidOption(f"end_s is {end_s}: use a time after start_s ({start_s}), or leave it out.")
    if max_frames is not None and max_frames < 1:
        raise InvalidOption(f"max_frames is {max_frames}: use 1 or more, or leave it out.")


@contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[tuple[InputContainer, VideoStream, str]]:
    """Open the main video stream and name its container. Here, and only here, FFmpeg's errors become ours."""
    container_name = sniff(_read_head(path))
    options = {"protocol_whitelist": "file", "format_whitelist": FORMAT_WHITELIST}
    try:
        # "replace": a title that is not UTF-8 is no reason to refuse a video.
        with av.open(os.path.abspath(path), options=options, metadata_errors="replace") as container:
            stream = _main_stream(container)
            stream.thread_type = "AUTO"
            stream.thread_count = 2
            stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}  # the size may change in mid-stream
            yield container, stream, container_name
    except FFmpegError as error:
        raise VideoUnreadable(
            f"This {container_name} file cannot be decoded ({error.strerror}): it may be incomplete or damaged. "
            "Download or export it again."
        ) from error


def _read_head(path: str | os.PathLike[str]) -> bytes:
    if not os.path.exists(path):
        raise VideoNotFound(f"There is no file {os.fspath(path)}. Check the path.")
    if not os.path.isfile(path):  # opening a pipe would wait for ever
        raise VideoUnreadable(f"{os.fspath(path)} is not a file. Give the path of one video.")
    try:
        with open(path, "rb") as file:
            return file.read(HEAD_BYTES)
    except OSError as error:
        raise VideoUnreadable(f"This file cannot be read: {error.strerror}. Check its permissions.") from error


def _main_stream(container: InputContainer) -> VideoStream:
    streams = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
    if not streams:
        what = "audio with a cover picture" if container.streams.video else "audio only"
        raise VideoUnreadable(f"This file is {what}, not a video. Send a video with pictures.")
    best = container.streams.best("video")  # honours the default flag, which the first stream may lack
    stream = best if isinstance(best, VideoStream) and best in streams else streams[0]
    if stream.codec_context is None:
        raise VideoUnreadable("This host cannot decode the video's codec. Re-encode it as H.264.")
    if stream.width * stream.height > MAX_PIXELS:
        raise VideoUnreadable(
            f"The frames are {stream.width} x {stream.height}, more than {MAX_PIXELS:,} pixels. Scale the video down."
        )
    return stream


def _duration_s(container: InputContainer) -> float | None:
    return container.duration / av.time_base if container.duration else None


def _frame_s(stream: VideoStream) -> float:
    rate = stream.average_rate
    return float(1 / rate) if rate and 1 <= rate <= 240 else 1 / 25  # outside, headers mean something else


def _bucket(time_s: float, target_fps: float, start_s: float, end_s: float | None, frame_s: float) -> int:
    """Number the bucket of 1 / target_fps, from start_s on, that a frame shown at time_s falls into."""
    target_fps = min(target_fps, MAX_FPS)
    slack_s = min(0.010, frame_s / 2, 0.25 / target_fps)  # timestamps are rounded, and jitter: a frame may come early
    bucket = math.floor((time_s - start_s + slack_s) * target_fps)
    if end_s is None:
        return bucket
    return min(bucket, math.ceil((end_s - start_s) * target_fps) - 1)  # slack opens no bucket past the window


class _Decoded(NamedTuple):
    frame_idx: int
    time_s: float  # on the player's clock
    frame: VideoFrame


def _with_neighbours(decoded: Iterable[_Decoded]) -> Iterator[tuple[_Decoded | None, _Decoded, _Decoded | None]]:
    before = current = None
    for after in chain(decoded, [None]):
        if current is not None:
            yield before, current, after
        before, current = current, after


def _decode_on_clock(container: InputContainer, stream: VideoStream, notes: SamplingNotes) -> Iterator[_Decoded]:
    """Number and time the decoded frames, noting what damage leaves out. Raises VideoUnreadable if nothing decodes."""
    clock = _Clock(container, _frame_s(stream))
    frame_idx, num_bad_packets, is_damaged, longest_s = 0, 0, False, 1.0
    for frame in _decode(container, stream):
        if frame is None:
            is_damaged, num_bad_packets = True, num_bad_packets + 1
            if num_bad_packets > MAX_BAD_PACKETS:
                break
            continue
        last_s = clock.last_s or 0.0
        time_s = clock.read(frame)
        # A bad packet shows before the frames ahead of it do: the next gap is the one it leaves.
        if is_damaged and time_s - last_s > 1.5 * clock.frame_s:
            notes.warnings.append(f"Damaged: nothing decodes between {last_s:.3f} s and {time_s:.3f} s.")
            is_damaged = False
        longest_s = max(longest_s, time_s - last_s)
        yield _Decoded(frame_idx, time_s, frame)
        frame_idx += 1

    if clock.last_s is None:
        raise VideoUnreadable("No frame of this video decodes. Re-encode it as H.264.")
    duration_s = _duration_s(container)
    if duration_s and duration_s - clock.last_s > 2 * longest_s:  # the last slide of a talk stays for a while, too
        notes.warnings.append(
            f"The last frame is at {clock.last_s:.3f} s of {duration_s:.3f} s: the end may be missing."
        )
    elif is_damaged:
        notes.warnings.append(f"{num_bad_packets} damaged packets were skipped.")


def _decode(container: InputContainer, stream: VideoStream) -> Iterator[VideoFrame | None]:
    """Yield frames in presentation order; None stands for a packet that does not decode."""
    try:
        for packet in container.demux(stream):
            try:
                yield from packet.decode()
            except FFmpegError:
                yield None
    except FFmpegError:
        yield None  # the container breaks off here


class _Clock:
    """The player's clock, in seconds since the container's start. It always advances: where a timestamp is missing,
    repeated, reset or absurd, time goes on by one frame."""

    def __init__(self, container: InputContainer, frame_s: float) -> None:
        start_time: int | None = container.start_time  # None where the container does not say
        self.frame_s = frame_s
        self.origin_s = math.inf if start_time is None else start_time / av.time_base
        self.last_s: float | None = None

    def read(self, frame: VideoFrame) -> float:
        frame_time_s: float | None = frame.time
        next_s = 0.0 if self.last_s is None else self.last_s + self.frame_s
        if frame_time_s is None:
            time_s = next_s
        elif self.last_s is None:
            self.origin_s = min(self.origin_s, frame_time_s)
            time_s = frame_time_s - self.origin_s
        else:
            time_s = frame_time_s - self.origin_s
            if not self.last_s < time_s <= self.last_s + MAX_JUMP_S:
                self.origin_s = frame_time_s - next_s
                time_s = next_s
        self.last_s = time_s
        return time_s


def main() -> int:
    """Check a folder of videos against its expected.json; exit 0 if every video comes out right."""
    from pipeline.frames_check import check_folder  # which imports this module

    parser = argparse.ArgumentParser(prog="python -m pipeline.frames", description=main.__doc__)
    parser.add_argument("folder", type=Path, help="holds videos and expected.json")
    return check_folder(parser.parse_args().folder)


if __name__ == "__main__":
    sys.exit(main())
