"""Out of memory, a batch is halved; an image that does not fit alone ends with an error.

No memory runs out here: the runner's steps are made to raise above some size, after their work, as late as CUDA may.
Run: pytest tests/test_engine_memory.py
"""

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.errors import NotANumber, OutOfMemory
from pipeline.moondream.answer import Answer, Completed
from pipeline.moondream.checkpoint import Checkpoint
from pipeline.moondream.engine import Engine
from pipeline.moondream.prompts import Caption, Detect, Query, Sampling, Task
from pipeline.moondream.runner import ModelRunner

RNG = np.random.default_rng(1)
IMAGES = [RNG.integers(0, 256, (*size, 3), dtype=np.uint8) for size in [(100, 100), (300, 200), (80, 60), (112, 112)]]
LARGE = 1  # the one image of more than one crop
SHORT = Query("?", max_tokens=6)
MIX: list[Task] = [SHORT, Caption("short", max_tokens=9), Query("Why?", reasoning=True, max_tokens=4), Detect("cat", 2)]


def run_out(monkeypatch: pytest.MonkeyPatch, step: str, is_too_much: Callable[..., bool]) -> list[str]:
    """Let a step of the runner run out of memory where its arguments are too much -> a list that grows each time."""
    original: Callable[..., Any] = getattr(ModelRunner, step)
    times: list[str] = []

    def limited(self: ModelRunner, *args: Any) -> Any:
        result = original(self, *args)
        if is_too_much(*args):
            times.append(step)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return result

    monkeypatch.setattr(ModelRunner, step, limited)
    return times


def answer(checkpoint: Checkpoint, num_slots: int, tasks: Sequence[Task]) -> dict[Hashable, Completed]:
    """Ask the same of every image."""
    engine, completed = Engine(checkpoint, num_slots), {}
    for key, image in enumerate(IMAGES):
        engine.submit(key, image, tasks)
    while engine.num_in_flight:
        completed |= {done.key: done for done in engine.step()}
    return completed


def untimed(done: Completed) -> list[Answer]:
    return [dataclasses.replace(a, image_encode_ms=0, llm_inference_ms=0, total_ms=0) for a in done.answers]


@pytest.fixture(scope="module")
def expected(endless_checkpoint: Checkpoint) -> dict[Hashable, list[Answer]]:
    return {key: untimed(done) for key, done in answer(endless_checkpoint, 16, MIX).items()}


def assert_only_failed(
    completed: dict[Hashable, Completed], failed: int, expected: dict[Hashable, list[Answer]]
) -> None:
    """One image has the error and no answer; the others have their first answer, as if nothing had happened."""
    error = completed[failed].error
    assert isinstance(error, OutOfMemory)
    assert completed[failed].answers == ()
    others = [key for key in range(len(IMAGES)) if key != failed]
    assert [completed[key].error for key in others] == [None] * len(others)
    assert [untimed(completed[key])[:1] for key in others] == [expected[key][:1] for key in others]


@pytest.mark.parametrize("limit", [1, 2, 3])
@pytest.mark.parametrize("step", ["encode_images", "prefill_images", "prefill_prompts", "decode"])
def test_smaller_batches_give_the_same_answers(
    endless_checkpoint: Checkpoint,
    expected: dict[Hashable, list[Answer]],
    monkeypatch: pytest.MonkeyPatch,
    step: str,
    limit: int,
) -> None:
    times = run_out(monkeypatch, step, lambda *args: len(args[1] if step == "decode" else args[0]) > limit)

    completed = answer(endless_checkpoint, 16, MIX)

    assert times
    assert {key: untimed(done) for key, done in completed.items()} == expected


def test_an_image_too_large_to_encode_fails_alone(
    endless_checkpoint: Checkpoint, expected: dict[Hashable, list[Answer]], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_out(monkeypatch, "encode_images", lambda images: any(crops.tiling != (1, 1) for crops in images))

    assert_only_failed(answer(endless_checkpoint, 2, [SHORT]), LARGE, expected)


@pytest.mark.parametrize(
    ("step", "is_too_much"),
    [
        ("prefill_images", lambda slots, tokens: 2 in slots),
        ("prefill_prompts", lambda slots, prompts: 2 in slots),
        ("decode", lambda first_slot, feeds, positions: first_slot <= 2 < first_slot + len(feeds)),
    ],
)
def test_an_image_that_does_not_fit_later_fails_alone(
    endless_checkpoint: Checkpoint,
    expected: dict[Hashable, list[Answer]],
    monkeypatch: pytest.MonkeyPatch,
    step: str,
    is_too_much: Callable[..., bool],
) -> None:
    """Four slots for four images: what fails in slot 2 is image 2."""
    run_out(monkeypatch, step, is_too_much)

    assert_only_failed(answer(endless_checkpoint, 4, [SHORT]), 2, expected)


def test_the_error_names_what_is_needed_and_what_is_free(
    endless_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_out(monkeypatch, "encode_images", lambda images: True)

    error = answer(endless_checkpoint, 2, [SHORT])[0].error

    with pytest.raises(OutOfMemory, match=r"cpu: .* needs about \d+\.\d GiB, \d+\.\d GiB are free\. Use fewer slots"):
        raise error or AssertionError("no error")


def test_a_question_may_end_in_the_step_in_which_another_of_its_image_fails(
    endless_checkpoint: Checkpoint, expected: dict[Hashable, list[Answer]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its slot, dropped with the image, was freed a second time: a KeyError that ended the step."""
    run_out(monkeypatch, "prefill_prompts", lambda slots, prompts: any(len(prompt) > 40 for prompt in prompts))
    engine = Engine(endless_checkpoint, 4)
    engine.submit("fails", IMAGES[0], [Query("Is this a long question? " * 5, max_tokens=9), Query("?", max_tokens=1)])
    engine.submit(1, IMAGES[1], [SHORT])

    completed = {}
    while engine.num_in_flight:
        completed |= {done.key: done for done in engine.step()}

    assert isinstance(completed["fails"].error, OutOfMemory)
    assert untimed(completed[1]) == expected[1][:1]


def test_a_slot_lost_to_a_failed_image_is_used_again(
    endless_checkpoint: Checkpoint, expected: dict[Hashable, list[Answer]], monkeypatch: pytest.MonkeyPatch
) -> None:
    times = run_out(monkeypatch, "prefill_images", lambda slots, tokens: not times)  # only the first time

    assert_only_failed(answer(endless_checkpoint, 1, [SHORT]), 0, expected)


def test_other_errors_are_not_taken_for_a_lack_of_memory(
    endless_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(ModelRunner, "decode", broken)

    with pytest.raises(RuntimeError, match="illegal memory access"):
        answer(endless_checkpoint, 2, [SHORT])


def test_a_cache_that_does_not_fit_says_what_it_needs(tiny_checkpoint: Checkpoint) -> None:
    with pytest.raises(OutOfMemory, match=r"cache of 1000000000 slots .* needs about [\d.]+ GiB, [\d.]+ GiB are free"):
        Engine(tiny_checkpoint, num_slots=1_000_000_000)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_picture_that_gives_nan_fails_alone_and_leaves_nothing_behind(
    tiny_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, temperature: float
) -> None:
    """A masked NaN spread to the next picture in its slot, which was answered with nonsense as a success."""
    engine = Engine(tiny_checkpoint, num_slots=1)
    encode = ModelRunner.encode_images
    monkeypatch.setattr(ModelRunner, "encode_images", lambda self, images: encode(self, images) * torch.nan)
    engine.submit(
        "bad", np.zeros((30, 30, 3), np.uint8), [Query("What?", max_tokens=4, sampling=Sampling(temperature))]
    )
    (bad,) = engine.step()
    monkeypatch.setattr(ModelRunner, "encode_images", encode)
    fresh, answers = Engine(tiny_checkpoint, num_slots=1), []
    for each in (engine, fresh):
        each.submit("good", np.full((30, 30, 3), 90, np.uint8), [Query("What?", max_tokens=4)])
        while each.num_in_flight:
            answers += [done.answers[0].answer_ids for done in each.step()]

    assert isinstance(bad.error, NotANumber)
    assert answers[0] == answers[1]
