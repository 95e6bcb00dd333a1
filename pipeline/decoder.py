"""Decode a video file with PyAV and sample its frames by presentation time. Runs in the decoder's process only.

Native code reads a stranger's file here: frames.py starts a process for it (decoder_process.py), of which this module
knows nothing. Memory holds three decoded frames, never the video. sniff.py says which demuxer reads the file and
picture.py what a frame looks like, timeline.py when it is shown. It never uses cv2.VideoCapture: OpenCV 5.0 returns
uninitialised memory for interlaced video and no frames for AV1. Test: pytest tests/test_decoder.py
"""

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import chain
from typing import NamedTuple

import av
from av.codec import codecs_available
from av.container import InputContainer
from av.error import FFmpegError
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream

from pipeline.decoder_events import Note, Progress
from pipeline.errors import InputError, NoFrames, VideoNotFound, VideoTooLarge, VideoUnreadable
from pipeline.picture import BROADCASTS, NUM_THREADS, deinterlace, is_mirrored, shown_size, to_rgb
from pipeline.sampling import (
    DecodeLimits,
    Frame,
    VideoInfo,
    Window,
    check_size,
    too_long,
    too_many_bytes,
    too_many_frames,
)
from pipeline.sniff import HEAD_BYTES, sniff
from pipeline.timeline import Clock, Damage

# Decoders that write past their memory for a file made to do so, and no FFmpeg to be had does not: FLIC
# (CVE-2026-125241, to FFmpeg 9.0.2) and APAC, of audio (CVE-2026-125267, to 8.1.2; av 18.1.0 brings 8.1.2).
UNSAFE_CODECS = {"flic", "apac"}
SAFE_CODECS = ",".join(sorted(codecs_available - UNSAFE_CODECS))
LATE_PART = 0.2  # of a broadcast without a picture of ours: something else goes on there
NO_MEMORY = (MemoryError, BlockingIOError)  # the second: for the stack of a thread
SEEK_BEFORE_S = 1.0  # the first frames after a key frame may need those before it
PROGRESS_S = 1.0  # of wall-clock time between two signs of life


def decode_video(
    path: str,
    window: Window | None,
    limits: DecodeLimits,
    confine: Callable[[], None] = lambda: None,
    *,
    seeks: bool = False,
) -> Iterator[VideoInfo | Frame | Note | Progress]:
    """Yield what the file says of its video; then, if a window is given, its frames, as sample_frames describes them.

    With `seeks`, what lies before the window is left out, as far as the file's index helps: then frame_idx and
    VideoInfo count from where decoding began, and times are right only where those in the file are in order.
    `confine` is called just before FFmpeg opens the file. Raises VideoNotFound, VideoUnreadable, VideoTooLarge or
    NoFrames."""
    with _opened(path, limits, confine) as (container, stream, container_name):
        if seeks and window is not None:
            _seek(container, window.start_s)
        decoded = _with_neighbours(_decode_on_clock(container, stream, limits))
        early: list[Note | Progress] = []
        for event in decoded:
            if isinstance(event, _Neighbours):
                break
            early.append(event)
        else:
            raise VideoUnreadable("No frame of this video decodes. Re-encode it as H.264.")
        info = _video_info(container, stream, container_name, event.current)
        yield info
        if window is not None:
            check_size(info, window, limits)
            mirrored = is_mirrored(event.current.frame)
            yield from _sample(chain(early, [event], decoded), stream, window, limits, mirrored)


def _sample(
    decoded: "Iterable[_Neighbours | Note | Progress]",
    stream: VideoStream,
    window: Window,
    limits: DecodeLimits,
    mirrored: bool,
) -> Iterator[Frame | Note | Progress]:
    start_ms = round(window.start_s * 1000)
    end_ms = math.inf if window.end_s is None else round(window.end_s * 1000)
    last_bucket, num_sampled, time_s = -math.inf, 0, 0.0
    frame_s = _frame_s(stream)
    reformatter = VideoReformatter()
    for event in decoded:
        if not isinstance(event, _Neighbours):
            yield event
            continue
        frame_idx, time_s, frame = event.current
        # The window is compared with the label, so that no label lies outside the window asked for.
        timestamp_ms = round(time_s * 1000)
        if timestamp_ms >= end_ms:
            break
        if time_s > limits.max_duration_s:
            raise too_long("goes on after that", limits)
        bucket = window.bucket(time_s, frame_s)
        if timestamp_ms < start_ms or bucket <= last_bucket:
            continue
        if num_sampled == window.max_frames:
            text = f"Stopped after {num_sampled} frames: the next one, at {time_s:.3f} s, is left out."
            yield Note(text, is_truncated=True)
            return
        if num_sampled == limits.max_frames:
            raise too_many_frames("more frames", window, limits)
        last_bucket, num_sampled = bucket, num_sampled + 1
        if frame.interlaced_frame:
            frame = deinterlace(event.before, frame, event.after)
        yield Frame(frame_idx, timestamp_ms, to_rgb(frame, stream, reformatter, mirrored=mirrored))
    if not num_sampled:
        end = "the end" if window.end_s is None else f"{window.end_s:.3f} s"
        raise NoFrames(
            f"No frames extracted from video: it shows none between {window.start_s:.3f} s and {end}. "
            f"There is one at {time_s:.3f} s: choose another window."
        )


@contextmanager
def _opened(
    path: str, limits: DecodeLimits, confine: Callable[[], None]
) -> Iterator[tuple[InputContainer, VideoStream, str]]:
    """Open the main video stream and name its container. Here, and only here, FFmpeg's errors become ours."""
    container_name = sniff(_read_head(path, limits))
    # This demuxer and no other, whatever the name of the file; and neither it nor what it may start leaves the disk.
    # Nor does it decode with what is known to be unsafe: FFmpeg tries all streams, sound too, when it opens a file.
    options = {"protocol_whitelist": "file", "format_whitelist": container_name, "codec_whitelist": SAFE_CODECS}
    confine()
    try:
        # "replace": a title that is not UTF-8 is no reason to refuse a video.
        with av.open(path, format=container_name, options=options, metadata_errors="replace") as container:
            stream = _main_stream(container, limits)
            stream.thread_type = "AUTO"
            stream.thread_count = NUM_THREADS
            # The size may change in mid-stream.
            stream.codec_context.options = {"max_pixels": str(limits.max_pixels), "codec_whitelist": SAFE_CODECS}
            yield container, stream, container_name
    except NO_MEMORY as error:
        raise VideoTooLarge(
            f"This video needs more memory than the {limits.max_memory_bytes:,} bytes that its decoder may have (limit "
            "max_memory_bytes). Re-encode it as H.264, scaled down."
        ) from error
    except FFmpegError as error:
        raise VideoUnreadable(
            f"This {container_name} file cannot be decoded ({error.strerror}): it may be incomplete or damaged. "
            "Download or export it again."
        ) from error


def _seek(container: InputContainer, to_s: float) -> None:
    """Go to a key frame well before a time on the player's clock; if that cannot be, stay at the beginning."""
    start_s = _start_s(container)
    if start_s is not None and to_s > SEEK_BEFORE_S:
        with suppress(FFmpegError):
            container.seek(round((start_s + to_s - SEEK_BEFORE_S) * av.time_base))


def _read_head(path: str, limits: DecodeLimits) -> bytes:
    if not os.path.exists(path):
        raise VideoNotFound(f"There is no file {path}. Check the path.")
    if not os.path.isfile(path):  # opening a pipe would wait for ever
        raise VideoUnreadable(f"{path} is not a file. Give the path of one video.")
    try:
        num_bytes = os.path.getsize(path)
        if num_bytes > limits.max_video_bytes:
            raise too_many_bytes(f"{num_bytes:,} bytes", limits.max_video_bytes)
        with open(path, "rb") as file:
            return file.read(HEAD_BYTES)
    except OSError as error:
        raise VideoUnreadable(f"This file cannot be read: {error.strerror}. Check its permissions.") from error


def _main_stream(container: InputContainer, limits: DecodeLimits) -> VideoStream:
    streams = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
    if not streams:
        what = (
            "audio with a cover picture"
            if container.streams.video
            else "audio only"
            if container.streams.audio
            else "empty, or only points to other files"
        )
        raise VideoUnreadable(f"This file is {what}, not a video. Send a video with pictures.")
    best = container.streams.best("video")  # honours the default flag, which the first stream may lack
    stream = best if isinstance(best, VideoStream) and best in streams else streams[0]
    if stream.codec_context is None or stream.codec_context.codec.name in UNSAFE_CODECS:
        raise VideoUnreadable("This host cannot decode the video's codec. Re-encode it as H.264.")
    if stream.width * stream.height > limits.max_pixels:
        raise _too_many_pixels("The frames have", stream.width, stream.height, limits)
    return stream


def _too_many_pixels(what_has: str, width: int, height: int, limits: DecodeLimits) -> VideoTooLarge:
    return VideoTooLarge(
        f"{what_has} {width} x {height} pixels; {limits.max_pixels:,} in all are the most that are taken (limit "
        "max_pixels). Scale the video down."
    )


def _video_info(container: InputContainer, stream: VideoStream, container_name: str, first: "_Decoded") -> VideoInfo:
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


def _duration_s(container: InputContainer) -> float | None:
    return container.duration / av.time_base if container.duration else None


def _start_s(container: InputContainer) -> float | None:
    start_time: int | None = container.start_time  # None where the container does not say
    return None if start_time is None else start_time / av.time_base


def _end_s(container: InputContainer, stream: VideoStream) -> float | None:
    """When the pictures end, or else the file: its sound may go on."""
    if stream.duration and stream.time_base:
        end_time = (stream.start_time or 0) + stream.duration
        return float(end_time * stream.time_base) - (_start_s(container) or 0)
    return _duration_s(container)


def _frame_s(stream: VideoStream) -> float:
    rate = stream.average_rate
    return float(1 / rate) if rate and 1 <= rate <= 240 else 1 / 25  # outside, headers mean something else


class _Decoded(NamedTuple):
    frame_idx: int
    time_s: float  # on the player's clock
    frame: VideoFrame


class _Neighbours(NamedTuple):
    before: VideoFrame | None
    current: _Decoded
    after: VideoFrame | None


def _with_neighbours(decoded: Iterable[_Decoded | Note | Progress]) -> Iterator[_Neighbours | Note | Progress]:
    before = current = None
    try:
        for after in decoded:
            if isinstance(after, Note | Progress):
                yield after
                continue
            if current is not None:
                yield _Neighbours(before and before.frame, current, after.frame)
            before, current = current, after
    except InputError:  # the frame before it is still to be shown
        if current is not None:
            yield _Neighbours(before and before.frame, current, None)
        raise
    if current is not None:
        yield _Neighbours(before and before.frame, current, None)


def _decode_on_clock(
    container: InputContainer, stream: VideoStream, limits: DecodeLimits
) -> Iterator[_Decoded | Note | Progress]:
    """Number and time the decoded frames, and note what damage leaves out."""
    clock, damage = Clock(_start_s(container), _frame_s(stream)), Damage(limits.max_bad_packets)
    frame_idx, longest_s = 0, 1.0
    next_progress_s = time.monotonic() + PROGRESS_S
    for frame in _decode(container, stream):
        last_s = clock.last_s or 0.0
        if time.monotonic() > next_progress_s:
            next_progress_s = time.monotonic() + PROGRESS_S
            yield Progress(last_s)
        if frame is None:
            _check_growth(stream, last_s, limits)
            damage.count_bad_packet(clock.last_s)
            continue
        if isinstance(frame, Note):
            yield frame
            continue
        time_s = clock.read(frame.time)
        yield from damage.note_gap(last_s, time_s, clock.frame_s)
        longest_s = max(longest_s, time_s - last_s)
        yield _Decoded(frame_idx, time_s, frame)
        frame_idx += 1

    if clock.last_s is None:
        return
    end_s = _end_s(container, stream)
    is_cut = (
        end_s is not None and end_s - clock.last_s > 2 * longest_s
    )  # the last slide of a talk stays for a while, too
    yield from damage.note_rest(is_cut)
    if is_cut:
        yield Note(f"The last frame is at {clock.last_s:.3f} s of {end_s:.3f} s: the end may be missing.")


def _check_growth(stream: VideoStream, last_s: float, limits: DecodeLimits) -> None:
    """Find out whether a packet does not decode since the frames have grown. Raises VideoTooLarge."""
    width, height = stream.codec_context.width, stream.codec_context.height
    if width * height > limits.max_pixels:
        raise _too_many_pixels(f"The frames after {last_s:.3f} s have", width, height, limits)


def _decode(container: InputContainer, stream: VideoStream) -> Iterator[VideoFrame | Note | None]:
    """Yield frames in presentation order; None stands for a packet that does not decode."""
    last_position = None
    try:
        for packet in container.demux(stream):
            last_position = packet.pos or last_position
            try:
                yield from packet.decode()
            except NO_MEMORY:  # these are FFmpeg's errors, too
                raise
            except FFmpegError:
                yield None
    except NO_MEMORY:
        raise
    except FFmpegError:
        yield None  # the container breaks off here
    except IndexError:  # PyAV 18.1, behind the last packet of ours, if a stream has turned up in mid-file (a broadcast)
        pass
    if container.format.name in BROADCASTS and last_position and container.size > 0:
        late_part = 1 - last_position / container.size
        if late_part > LATE_PART:
            yield Note(f"The last {late_part:.0%} of the file hold no more of this video: another one may go on there.")
