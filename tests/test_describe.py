"""The flow of frames through the real engine with the demo checkpoint."""

from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.describe import LOOKAHEAD, describe_batches, describe_frames
from pipeline.errors import DecoderStopped, QuestionTooLong
from pipeline.moondream.checkpoint import Checkpoint
from pipeline.moondream.engine import Engine
from pipeline.moondream.image_crops import Crops
from pipeline.moondream.prompts import Query
from pipeline.results import FrameResult, RunStats
from pipeline.sampling import Frame

POISON_GREY = 100


def frames(count: int, pulled: list[int] | None = None) -> Iterator[Frame]:
    rng = np.random.default_rng(0)
    for index in range(count):
        if pulled is not None:
            pulled.append(index)
        yield Frame(index, 40 * index, rng.integers(0, 256, (48, 64, 3), np.uint8))


def test_every_frame_is_answered_in_order(demo: Checkpoint) -> None:
    results = list(describe_frames(frames(11), Engine(demo, num_slots=3), Query(max_tokens=6), RunStats()))

    assert [(r.frame_idx, r.timestamp_ms) for r in results] == [(i, 40 * i) for i in range(11)]
    assert all(r.description and r.status == "success" and r.total_ms > 0 for r in results)


def test_answers_do_not_depend_on_the_slots(demo: Checkpoint) -> None:
    one, four = (
        [r.description for r in describe_frames(frames(6), Engine(demo, slots), Query(max_tokens=12), RunStats())]
        for slots in (1, 4)
    )

    assert one == four


def test_no_more_frames_are_pulled_than_the_slots_need(demo: Checkpoint) -> None:
    pulled: list[int] = []
    results = describe_frames(frames(50, pulled), Engine(demo, num_slots=2), Query(max_tokens=2), RunStats())

    next(results)

    assert len(pulled) <= 2 * LOOKAHEAD


@pytest.mark.parametrize("slots", [1, 4])
def test_a_video_that_breaks_off_is_an_error_after_the_frames_before(demo: Checkpoint, slots: int) -> None:
    """The frames in flight were thrown away."""

    def broken() -> Iterator[Frame]:
        yield from frames(5)
        raise DecoderStopped("The decoder stopped.")

    results: list[FrameResult] = []
    with pytest.raises(DecoderStopped):
        for result in describe_frames(broken(), Engine(demo, slots), Query(max_tokens=4), RunStats()):
            results.append(result)

    assert [(r.frame_idx, r.status) for r in results] == [(i, "success") for i in range(5)]


def test_a_frame_that_fails_is_a_result_and_the_rest_goes_on(demo: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(demo, num_slots=2)
    encode = engine._runner.encode_images

    def encode_or_fail(images: Sequence[Crops]) -> Tensor:
        if any(crops.pixels.max() == POISON_GREY for crops in images):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return encode(images)

    monkeypatch.setattr(engine._runner, "encode_images", encode_or_fail)
    small = [Frame(i, 40 * i, np.full((112, 112, 3), grey, np.uint8)) for i, grey in enumerate((3, POISON_GREY, 250))]

    results = list(describe_frames(small, engine, Query(max_tokens=4), RunStats()))

    assert [r.status for r in results] == ["success", "error", "success"]
    assert results[1].error_message and "memory" in results[1].error_message


def test_a_question_that_no_frame_can_take_is_an_error_of_the_call(demo: Checkpoint) -> None:
    with pytest.raises(QuestionTooLong, match="Ask a shorter question"):
        list(describe_frames(frames(1), Engine(demo), Query("why? " * 400), RunStats()))


def test_the_time_of_each_stage_is_counted(demo: Checkpoint) -> None:
    run = RunStats()

    list(describe_frames(frames(2), Engine(demo), Query(max_tokens=2), run))

    assert run.num_submitted == 2
    assert run.timings.frame_extraction > 0
    assert run.timings.distributed_frame_processing_map > 0


def test_an_engine_stays_usable_after_a_generator_is_closed_early(demo: Checkpoint) -> None:
    """The frames left in the engine met the next video's under the same keys."""
    engine = Engine(demo, num_slots=2)
    results = describe_frames(frames(6), engine, Query(max_tokens=4), RunStats())
    first = next(results)
    results.close()

    again = list(describe_frames(frames(6), engine, Query(max_tokens=4), RunStats()))

    assert [r.frame_idx for r in again] == list(range(6))
    assert again[0].description == first.description


def test_what_is_ready_together_comes_as_one_list(demo: Checkpoint) -> None:
    engine = Engine(demo, num_slots=4)
    batches = list(describe_batches(frames(8), engine, Query(max_tokens=3), RunStats()))

    assert [[result.frame_idx for result in batch] for batch in batches] == [[0, 1, 2, 3], [4, 5, 6, 7]]
