"""Windows, estimates and limits, without a decoder. What they mean for real files: test_decoder.py."""

import dataclasses
import math
from typing import Any

import pytest

from pipeline.errors import InvalidOption, VideoTooLarge
from pipeline.sampling import DEFAULT_LIMITS, DecodeLimits, VideoInfo, Window, check_size, clock_time, parse_limits

INFO = VideoInfo("mp4", "h264", 640, 360, 0.0, 3600.0, 25.0, 25.0, 90_000, True)


@pytest.mark.parametrize(
    "options",
    [
        {"target_fps": 0},
        {"target_fps": -1},
        {"target_fps": math.nan},
        {"target_fps": math.inf},
        {"start_s": -1},
        {"start_s": math.nan},
        {"start_s": 2, "end_s": 2},
        {"end_s": math.inf},
        {"max_frames": 0},
    ],
)
def test_what_no_video_can_give_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidOption, match=list(options)[-1]):
        Window(**{"target_fps": 1, **options})


@pytest.mark.parametrize(
    ("time_s", "bucket"), [(0.0, 0), (0.98, 0), (0.992, 1), (1.0, 1), (1.5, 1), (59.999, 60), (60.04, 60)]
)
def test_a_bucket_takes_frames_that_come_a_little_early(time_s: float, bucket: int) -> None:
    assert Window(1).bucket(time_s, frame_s=0.04) == bucket


def test_a_bucket_never_lies_past_the_window() -> None:
    assert Window(1, end_s=60).bucket(59.999, frame_s=0.04) == 59
    assert Window(2, start_s=10, end_s=20.25).bucket(20.249, frame_s=0.04) == 20


def test_a_video_that_lasts_too_long_is_refused_with_limit_and_length() -> None:
    limits = DecodeLimits(max_duration_s=1800)

    with pytest.raises(VideoTooLarge, match=r"lasts 1:00:00; 30:00 is the most .*limit max_duration_s\)"):
        check_size(INFO, Window(1), limits)
    check_size(INFO, Window(1, end_s=1800), limits)
    check_size(dataclasses.replace(INFO, duration_s=None), Window(1), limits)


def test_more_frames_than_the_limit_are_refused_with_limit_and_number() -> None:
    with pytest.raises(VideoTooLarge, match=r"At 25 per second.* about 90,000 frames; 20,000 .*max_frames\)"):
        check_size(INFO, Window(25), DEFAULT_LIMITS)
    check_size(INFO, Window(25, max_frames=20_000), DEFAULT_LIMITS)
    check_size(INFO, Window(5), DEFAULT_LIMITS)


def test_limits_are_read_by_name() -> None:
    limits = parse_limits(["max-pixels=100_000_000", "max_duration_s = 36000.5"])

    assert limits == DecodeLimits(max_pixels=100_000_000, max_duration_s=36000.5)
    assert parse_limits([]) == DEFAULT_LIMITS


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("max_sheep=3", "no limit 'max_sheep'. Use one of max_video_bytes, "),
        ("max_pixels", "write it as max_pixels=36000000"),
        ("max_pixels=many", "write it as max_pixels=36000000"),
        ("max_pixels=1.5", "write it as"),
        ("max_pixels=0", "above 0"),
        ("max_pixels=3_000_000_000", "at most 2,147,483,647"),
        ("idle_s=1e10", "at most"),
        ("cpu_s=1e19", "at most"),
        ("idle_s=nan", "above 0"),
        ("idle_s=inf", "above 0"),
    ],
)
def test_a_limit_that_is_none_is_refused(text: str, words: str) -> None:
    with pytest.raises(InvalidOption, match=words):
        parse_limits([text])


def test_a_video_is_summed_up_in_a_line() -> None:
    assert str(INFO) == "1:00:00 of 640 x 360, 25 fps, h264 in mp4, with sound"
    recording = dataclasses.replace(INFO, duration_s=None, average_fps=None, has_audio=False)
    assert str(recording) == "length unknown of 640 x 360, frame rate unknown, h264 in mp4, silent"


def test_times_read_as_on_a_player() -> None:
    assert [clock_time(seconds) for seconds in (0, 42.4, 61, 3723)] == ["0:00", "0:42", "1:01", "1:02:03"]
