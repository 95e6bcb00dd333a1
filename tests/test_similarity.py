"""Which frames need no second look: the measure, the gate, and the flow through the real engine."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.describe import describe_frames
from pipeline.errors import NotANumber
from pipeline.moondream.answer import Completed
from pipeline.moondream.checkpoint import Checkpoint
from pipeline.moondream.engine import Engine
from pipeline.moondream.prompts import Query
from pipeline.results import RunStats
from pipeline.sampling import Frame
from pipeline.similarity import MAX_AGE_MS, Gate, Repeat, difference
from pipeline.similarity_check import check_folder

HEIGHT, WIDTH = 360, 640


def picture(grey: int = 200) -> NDArray[np.uint8]:
    return np.full((HEIGHT, WIDTH, 3), grey, np.uint8)


def frame(index: int, image: NDArray[np.uint8], interval_ms: int = 200) -> Frame:
    return Frame(index, interval_ms * index, image)


def originals(gate: Gate, frames: list[Frame]) -> list[int]:
    """The original of each frame, by number; its own where it is described."""
    found = [gate.repeat(frame) for frame in frames]
    return [f.original_idx if f else frame.frame_idx for f, frame in zip(found, frames, strict=True)]


def test_the_difference_is_that_of_the_block_that_differs_most() -> None:
    a, b = np.zeros((64, 64, 3), np.uint8), np.zeros((64, 64, 3), np.uint8)
    b[13:21, 30:38, 2] = 100  # a block in the middle of four of a fixed grid, in one colour
    b[0, 0] = 255

    assert difference(a, b) == difference(b, a) == 100
    assert difference(a, a) == 0


@pytest.mark.parametrize(("x", "y"), [(0, 0), (317, 171), (610, 270)])
def test_a_small_thing_that_appears_is_seen_wherever_it_is(x: int, y: int) -> None:
    after = picture()
    after[y : y + 56, x : x + 25] = 60

    assert originals(Gate(), [frame(0, picture()), frame(1, after)]) == [0, 1]


def test_another_colour_of_the_same_brightness_is_seen() -> None:
    red, green = picture(), picture()
    red[100:200, 100:200] = (200, 0, 0)
    green[100:200, 100:200] = (0, 102, 0)  # as bright, by ITU-R 601

    assert originals(Gate(), [frame(0, red), frame(1, green)]) == [0, 1]


def test_noise_is_the_same_picture() -> None:
    rng = np.random.default_rng(0)
    noisy = [np.clip(picture(128) + rng.normal(0, 12, (HEIGHT, WIDTH, 3)), 0, 255).astype(np.uint8) for _ in range(9)]

    assert originals(Gate(), [frame(i, image) for i, image in enumerate(noisy)]) == [0] * 9


def test_a_drift_is_seen_since_the_comparison_is_with_the_described_frame() -> None:
    fade = [frame(i, picture(200 - 4 * i)) for i in range(9)]

    assert originals(Gate(), fade) == [0, 0, 0, 3, 3, 3, 6, 6, 6]


def test_one_frame_at_least_is_described_every_ten_seconds() -> None:
    still = [frame(i, picture(), interval_ms=2500) for i in range(9)]

    assert originals(Gate(), still) == [0, 0, 0, 0, 4, 4, 4, 4, 8]
    assert MAX_AGE_MS == 10_000


def test_a_threshold_of_zero_lets_all_through_and_a_higher_one_fewer() -> None:
    frames = [frame(i, picture(200 - 15 * (i % 2))) for i in range(6)]

    assert originals(Gate(0), [frame(i, picture()) for i in range(3)]) == [0, 1, 2]
    assert originals(Gate(), frames) == [0, 1, 2, 3, 4, 5]
    assert originals(Gate(20), frames) == [0] * 6


def test_a_restored_frame_is_compared_with_and_brings_its_description() -> None:
    gate = Gate()
    gate.restore(frame(3, picture()), "A wall.")

    assert gate.repeat(frame(4, picture())) == Repeat(4, 800, 3, "A wall.")
    assert gate.repeat(frame(5, picture(0))) is None
    assert gate.repeat(frame(6, picture(0))) == Repeat(6, 1200, 5, None)


def test_the_clips_come_out_as_a_careful_viewer_would_say(capsys: pytest.CaptureFixture[str]) -> None:
    assert check_folder(Path(__file__).parent / "data" / "similar") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"clips": 5, "ok": 5, "wrong": []}


def test_the_check_tells_what_is_wrong(tmp_path: Path, video: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "grey.avi").symlink_to(video)
    for wrong in ({"must_keep_ms": [60_000]}, {"at_least": 50}, {"at_most": 1}):
        (tmp_path / "expected.json").write_text(json.dumps({"grey.avi": wrong, "missing.avi": {}}))
        assert check_folder(tmp_path) == 1
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["wrong"] == ["grey.avi", "missing.avi"]


# Through the engine


def stills(pattern: str) -> Iterator[Frame]:
    """A frame per letter; equal letters look alike."""
    rng = np.random.default_rng(0)
    pictures = {letter: rng.integers(0, 256, (6, 8, 3), np.uint8).repeat(8, 0).repeat(8, 1) for letter in "abc"}
    for index, letter in enumerate(pattern):
        yield frame(index, pictures[letter])


def test_repeats_take_over_the_answer_and_are_counted_apart(demo: Checkpoint) -> None:
    pattern, run = "aaabbbbbbabcccccccca", RunStats()
    task = Query(max_tokens=8)
    reused = list(describe_frames(Gate().sift(stills(pattern)), Engine(demo, 2), task, run))
    described = list(describe_frames(stills(pattern), Engine(demo, 2), task, RunStats()))

    assert [(r.frame_idx, r.description) for r in reused] == [(r.frame_idx, r.description) for r in described]
    assert [r.reused_from_frame_idx for r in reused[:11]] == [None, 0, 0, None, 3, 3, 3, 3, 3, None, None]
    assert run.num_submitted == 6
    assert reused[1].num_tokens == reused[1].total_ms == 0


def test_repeats_of_a_frame_that_fails_are_errors_that_say_so(
    demo: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Engine.step

    def fail(engine: Engine) -> list[Completed]:
        error = NotANumber("overflow")
        return [Completed(c.key, (), error) if c.key == 0 else c for c in step(engine)]

    monkeypatch.setattr(Engine, "step", fail)
    results = list(describe_frames(Gate().sift(stills("aab")), Engine(demo, 2), Query(max_tokens=4), RunStats()))

    assert [r.status for r in results] == ["error", "error", "success"]
    assert results[1].error_message == "This frame looks like frame 0, which could not be described. overflow"
    assert (results[1].reused_from_frame_idx, results[1].description) == (0, "")


def test_a_still_video_is_told_as_it_goes(demo: Checkpoint) -> None:
    """Results that are ready wait for no slot to be free."""
    pulled = 0

    def count(frames: Iterator[Frame]) -> Iterator[Frame]:
        nonlocal pulled
        for frame in frames:
            pulled += 1
            yield frame

    results = describe_frames(Gate().sift(count(stills("a" * 40))), Engine(demo, 2), Query(max_tokens=4), RunStats())
    seen = []
    for result in results:
        seen.append(pulled - result.frame_idx)

    assert len(seen) == 40 and max(seen[1:]) <= 40
    assert seen[-1] == 1
