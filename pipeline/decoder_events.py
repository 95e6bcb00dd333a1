"""What the decoder's process is asked and what it says, as bytes on two pipes: JSON; a frame's pixels follow its line.

The reading side trusts nothing: whoever takes over the decoder can send wrong pictures, but no objects, no sizes beyond
a frame's, and no errors but ours. Test: pytest tests/test_decoder_events.py
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, BinaryIO, get_args, get_type_hints

import numpy as np

from pipeline.errors import (
    DecoderStopped,
    InputError,
    NoFrames,
    VideoNotFound,
    VideoTooLarge,
    VideoUnreadable,
)
from pipeline.sampling import MAX_LONG_SIDE, DecodeLimits, Frame, VideoInfo, Window

MAX_LINE_BYTES = 65_536
MAX_NOTES = 100
MAX_NUMBER = 1e15  # ms of a time, frames per second, ...: what every reader can calculate with
ERRORS: dict[str, type[InputError]] = {
    error.code: error for error in (DecoderStopped, NoFrames, VideoNotFound, VideoTooLarge, VideoUnreadable)
}


class NotAnEvent(ValueError):
    """These bytes come from no decoder of ours."""


@dataclass(frozen=True)
class Note:
    """Something to tell about the video: a damaged interval, an early end, a cut."""

    warning: str
    is_truncated: bool = False  # max_frames left out frames of the window


@dataclass(frozen=True)
class Progress:
    """The decoder is alive and has come so far."""

    time_s: float


@dataclass(frozen=True)
class Failure:
    """The last event of a video that ends in an error."""

    code: str  # a key of ERRORS
    message: str
    details: str = ""  # for the log: where in our code, if that is to blame

    def to_error(self) -> InputError:
        return ERRORS[self.code](self.message)


@dataclass(frozen=True)
class End:
    """The last event of a video that ends well."""


Event = VideoInfo | Frame | Note | Progress | Failure | End
LINES: dict[str, type[Any]] = {kind.__name__: kind for kind in (VideoInfo, Note, Progress, Failure, End)}


@dataclass(frozen=True)
class Request:
    """What the process reads: decode this file, or only tell about it if there is no window."""

    path: str
    window: Window | None
    limits: DecodeLimits
    seeks: bool = False

    def encode(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @staticmethod
    def decode(request: bytes) -> "Request":
        fields = json.loads(request)
        window, limits = fields["window"] and Window(**fields["window"]), DecodeLimits(**fields["limits"])
        return Request(fields["path"], window, limits, fields["seeks"])


def write_event(event: Event, pipe: BinaryIO) -> None:
    """Raises BrokenPipeError when the parent has gone."""
    if isinstance(event, Frame):
        height, width, _ = event.image.shape
        fields = {"frame_idx": event.frame_idx, "timestamp_ms": event.timestamp_ms, "height": height, "width": width}
    else:
        fields = asdict(event)
    pipe.write(json.dumps({"event": type(event).__name__, **fields}).encode() + b"\n")
    if isinstance(event, Frame):
        pipe.write(event.image.data)
    pipe.flush()


def read_events(pipe: BinaryIO, max_frames: int) -> Iterator[Event]:
    """Read until the pipe ends. Raises NotAnEvent, also for events out of order; EOFError if it ends within one."""
    last_frame, num_frames, num_notes, is_introduced = (-1, -1), 0, 0, False
    while line := pipe.readline(MAX_LINE_BYTES):
        if not line.endswith(b"\n"):
            raise EOFError if len(line) < MAX_LINE_BYTES else NotAnEvent
        try:
            event = _read_line(json.loads(line))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise NotAnEvent from error
        is_introduced |= isinstance(event, VideoInfo)
        num_notes += isinstance(event, Note)
        if num_notes > MAX_NOTES or (isinstance(event, End) and not is_introduced):
            raise NotAnEvent
        if isinstance(event, Frame):
            frame, num_frames = (event.frame_idx, event.timestamp_ms), num_frames + 1
            is_later = frame[0] > last_frame[0] and frame[1] >= last_frame[1]  # the same ms, above 1,000 per second
            if num_frames > max_frames or not (is_introduced and is_later):
                raise NotAnEvent
            last_frame = frame
            if pipe.readinto(memoryview(event.image).cast("B")) != event.image.nbytes:  # type: ignore[attr-defined]
                raise EOFError
        yield event


def _read_line(fields: dict[str, Any]) -> Event:
    """Raises what a line that is no event makes Python raise."""
    kind = fields.pop("event")
    if kind == "Frame":
        return Frame(fields["frame_idx"], fields["timestamp_ms"], _empty_image(**fields))
    event = LINES[kind](**fields)
    for name, hint in get_type_hints(LINES[kind]).items():
        _check(getattr(event, name), get_args(hint) or (hint,))
    if isinstance(event, Failure) and event.code not in ERRORS:
        raise ValueError
    return event


def _check(value: Any, kinds: tuple[type, ...]) -> None:
    if type(value) not in kinds and not (type(value) is int and float in kinds):
        raise TypeError
    if isinstance(value, int | float) and not abs(value) <= MAX_NUMBER:  # nor is NaN
        raise ValueError


def _empty_image(frame_idx: int, timestamp_ms: int, height: int, width: int) -> np.ndarray:
    for number in (frame_idx, timestamp_ms, height, width):
        _check(number, (int,))
    if frame_idx < 0 or timestamp_ms < 0 or not (0 < height <= MAX_LONG_SIDE and 0 < width <= MAX_LONG_SIDE):
        raise ValueError
    return np.empty((height, width, 3), np.uint8)  # filled at once from the pipe, or thrown away
