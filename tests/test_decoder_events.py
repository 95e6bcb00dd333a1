"""The decoder's pipe: what goes in comes out, and what no decoder of ours says is refused."""

import io
import json
from dataclasses import asdict

import numpy as np
import pytest

from pipeline.decoder_events import (
    ERRORS,
    End,
    Failure,
    NotAnEvent,
    Note,
    Progress,
    Request,
    read_events,
    write_event,
)
from pipeline.errors import VideoTooLarge
from pipeline.sampling import MAX_LONG_SIDE, DecodeLimits, Frame, VideoInfo, Window

INFO = VideoInfo("mp4", "h264", 640, 360, 0.0, None, 25.0, 25.0, None, True)


INTRODUCTION = b"".join(json.dumps({"event": "VideoInfo", **asdict(INFO)}).encode().splitlines()) + b"\n"


def frame_line(**changes: object) -> bytes:
    fields = {"event": "Frame", "frame_idx": 1, "timestamp_ms": 40, "height": 2, "width": 2, **changes}
    return json.dumps(fields).encode() + b"\n"


def test_events_come_out_as_they_went_in() -> None:
    events = [
        INFO,
        Progress(1.5),
        Note("Damaged: a\nb \udce9", is_truncated=True),
        Failure("too_large", "Too large."),
        End(),
    ]
    pipe = io.BytesIO()
    for event in events:
        write_event(event, pipe)
    pipe.seek(0)

    assert list(read_events(pipe, max_frames=9)) == events


def test_a_frame_keeps_every_pixel() -> None:
    image = np.random.default_rng(0).integers(0, 256, (36, 64, 3), dtype=np.uint8)
    pipe = io.BytesIO()
    write_event(INFO, pipe)
    write_event(Frame(25, 1000, image), pipe)
    write_event(End(), pipe)
    pipe.seek(0)
    _, frame, end = read_events(pipe, max_frames=9)

    assert isinstance(frame, Frame) and end == End()
    assert (frame.frame_idx, frame.timestamp_ms) == (25, 1000)
    assert np.array_equal(frame.image, image)


@pytest.mark.parametrize("window", [None, Window(1), Window(2.5, 1.0, 3.0, 7)])
def test_a_request_comes_out_as_it_went_in(window: Window | None) -> None:
    for seeks in (False, True):
        request = Request("/videos/caf\udce9.mp4", window, DecodeLimits(max_pixels=1), seeks)

        assert Request.decode(request.encode()) == request


def test_a_failure_is_an_error_of_ours() -> None:
    assert isinstance(Failure("too_large", "Too large.").to_error(), VideoTooLarge)
    assert set(ERRORS) == {"video_not_found", "not_a_video", "too_large", "no_frames", "decoder_stopped"}


@pytest.mark.parametrize(
    "said",
    [
        b"Segmentation fault\n",
        b"[]\n",
        b"{}\n",
        b'{"event": "Sheep"}\n',
        b'{"event": "Progress"}\n',
        b'{"event": "Progress", "time_s": 1, "more": 2}\n',
        b'{"event": "Failure", "code": "weights_not_found", "message": ""}\n',
        b"\xff\xfe\n",
        b"x" * 70_000,
        frame_line(height=MAX_LONG_SIDE + 1),
        frame_line(width=0),
        frame_line(height=-1),
        frame_line(height="2"),
        frame_line(frame_idx=-1),
        frame_line(timestamp_ms=None),
        frame_line(timestamp_ms=1.5),
        frame_line(more=1),
        frame_line(frame_idx=True),
        frame_line(timestamp_ms=10**400),
        b"[" * 60_000 + b"\n",
        b'{"event": "Progress", "time_s": "x"}\n',
        b'{"event": "Progress", "time_s": NaN}\n',
        b'{"event": "Progress", "time_s": Infinity}\n',
        b'{"event": "Note", "warning": "x", "is_truncated": "no"}\n',
        b'{"event": "Note", "warning": ["x"]}\n',
        INTRODUCTION.replace(b"640", b'"640"'),
        INTRODUCTION.replace(b'"has_audio": true', b'"has_audio": 1'),
        b'{"event": "Note", "warning": "x"}\n' * 101,
        (frame_line() + bytes(12)) * 2,
        frame_line() + bytes(12) + frame_line(frame_idx=2, timestamp_ms=39) + bytes(12),
        b"".join(frame_line(frame_idx=i, timestamp_ms=i) + bytes(12) for i in range(10)),
    ],
)
def test_what_no_decoder_says_is_refused(said: bytes) -> None:
    with pytest.raises(NotAnEvent):
        list(read_events(io.BytesIO(INTRODUCTION + said + bytes(10_000)), max_frames=9))


@pytest.mark.parametrize("event", [frame_line() + bytes(12), b'{"event": "End"}\n'])
def test_a_video_is_introduced_first(event: bytes) -> None:
    with pytest.raises(NotAnEvent):
        list(read_events(io.BytesIO(event), max_frames=9))


@pytest.mark.parametrize("said", [b'{"event": "Progress", "ti', frame_line() + bytes(11)])
def test_an_end_within_an_event_is_told_from_an_end(said: bytes) -> None:
    with pytest.raises(EOFError):
        list(read_events(io.BytesIO(INTRODUCTION + said), max_frames=9))
