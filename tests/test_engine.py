"""Answers do not depend on what shares their batches.

How full the batches are is test_engine_batching.py's, what an answer holds test_answer.py's, memory running out
test_engine_memory.py's, agreement with the reference implementation test_verify.py's. Run: pytest tests/test_engine.py
"""

import copy
import dataclasses
import gc
import random
import weakref
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from engine_questions import IMAGES, answers_of, finish
from tasks import MIX

from pipeline.errors import ImageUnreadable, InvalidOption, QuestionTooLong, WeightsMismatch
from pipeline.moondream.answer import Answer
from pipeline.moondream.checkpoint import Checkpoint
from pipeline.moondream.engine import Engine, positions_needed
from pipeline.moondream.prompts import Detect, Point, Query, Sampling, Task


def untimed(answer: Answer) -> Answer:
    """The answer without what differs from run to run."""
    return dataclasses.replace(answer, image_encode_ms=0, llm_inference_ms=0, total_ms=0, trace=None)


def ask(engine: Engine, image: np.ndarray, tasks: Sequence[Task], frame_idx: int = 0) -> list[Answer]:
    engine.submit("only", image, tasks, frame_idx)
    return [untimed(answer) for answer in finish(engine)["only"].answers]


@pytest.fixture(scope="module")
def alone(tiny_checkpoint: Checkpoint) -> list[list[Answer]]:
    """For each image, the answer to each task of MIX, asked one by one."""
    return [[ask(Engine(tiny_checkpoint, 1), image, [task])[0] for task in MIX] for image in IMAGES]


# --- batched equals one by one


def test_the_mix_is_worth_comparing(alone: list[list[Answer]], tiny_checkpoint: Checkpoint) -> None:
    answers = [answer for of_image in alone for answer in of_image]

    assert {answer.finish_reason for answer in answers} == {"eos", "length"}
    assert any(tiny_checkpoint.config.tokenizer.coord_id in answer.reasoning_ids for answer in answers)
    assert {len(of_image[2].reasoning_ids) < 8 for of_image in alone} == {True, False}
    assert len({len(answer.answer_ids) for answer in answers}) > 5
    assert len({of_image[0].answer_ids for of_image in alone}) > 5


@pytest.mark.parametrize("order", ["as they are", "reversed", "shuffled"])
@pytest.mark.parametrize("num_slots", [1, 3, 8])
def test_answers_are_those_of_each_question_alone(
    tiny_checkpoint: Checkpoint, alone: list[list[Answer]], num_slots: int, order: str
) -> None:
    engine, images, tasks = Engine(tiny_checkpoint, num_slots), list(range(len(IMAGES))), list(range(len(MIX)))
    if order == "reversed":
        images, tasks = images[::-1], tasks[::-1]
    if order == "shuffled":
        random.Random(0).shuffle(images)
        random.Random(0).shuffle(tasks)

    for i in images:
        engine.submit(i, IMAGES[i], [MIX[k] for k in tasks])
    completed = finish(engine)

    assert {i: [untimed(a) for a in completed[i].answers] for i in images} == {
        i: [alone[i][k] for k in tasks] for i in images
    }


def test_images_that_arrive_on_the_way_are_answered_alike(
    tiny_checkpoint: Checkpoint, alone: list[list[Answer]]
) -> None:
    engine, completed = Engine(tiny_checkpoint, 3), {}

    for i, image in enumerate(IMAGES):
        engine.submit(i, image, [MIX[i % len(MIX)]])
        for done in engine.step():
            completed[done.key] = done
    completed |= finish(engine)

    assert [untimed(completed[i].answers[0]) for i in range(len(IMAGES))] == [
        alone[i][i % len(MIX)] for i in range(len(IMAGES))
    ]


def test_greedy_answers_repeat(tiny_checkpoint: Checkpoint) -> None:
    engine = Engine(tiny_checkpoint, 3)

    assert ask(engine, IMAGES[1], MIX) == ask(engine, IMAGES[1], MIX)


def test_another_picture_under_the_same_key_is_looked_at(
    tiny_checkpoint: Checkpoint, alone: list[list[Answer]]
) -> None:
    """The prefix of the first picture was found in its slot by its key, and served for the second."""
    engine = Engine(tiny_checkpoint, 2)

    assert [ask(engine, image, MIX[:1])[0] for image in IMAGES] == [of_image[0] for of_image in alone]


def test_bfloat16_runs(tiny_checkpoint: Checkpoint) -> None:
    model = copy.deepcopy(tiny_checkpoint.model).bfloat16()
    checkpoint = dataclasses.replace(tiny_checkpoint, model=model, dtype=torch.bfloat16)

    answers = ask(Engine(checkpoint, 3), IMAGES[1], MIX)

    assert len(answers) == len(MIX)
    assert all(answer.finish_reason in ("eos", "length") for answer in answers)


# --- sampling


def test_sampled_answers_depend_on_seed_and_frame_and_not_on_the_batch(tiny_checkpoint: Checkpoint) -> None:
    tasks: list[Task] = [Query("?", max_tokens=8, sampling=Sampling(1.0, 0.95, seed)) for seed in range(6)]
    one_by_one = {
        frame_idx: [ask(Engine(tiny_checkpoint, 1), IMAGES[0], [task], frame_idx)[0] for task in tasks]
        for frame_idx in range(6)
    }
    engine = Engine(tiny_checkpoint, 5)
    for frame_idx in reversed(range(6)):
        engine.submit(frame_idx, IMAGES[0], tasks, frame_idx)

    batched = {frame_idx: [untimed(a) for a in done.answers] for frame_idx, done in finish(engine).items()}

    assert batched == one_by_one
    assert len({answers[0].answer_ids for answers in one_by_one.values()}) > 3  # frames differ
    assert len({answer.answer_ids for answer in one_by_one[0]}) > 3  # seeds differ


def test_sampling_leaves_its_greedy_neighbours_alone(tiny_checkpoint: Checkpoint, alone: list[list[Answer]]) -> None:
    sampled = Query("?", max_tokens=8, sampling=Sampling(1.0, 0.95))

    answers = ask(Engine(tiny_checkpoint, 4), IMAGES[0], [MIX[0], sampled, MIX[1]])

    assert [answers[0], answers[2]] == alone[0][:2]


# --- what is refused


@pytest.mark.parametrize(
    "task", [*MIX, Query("x" * 200, reasoning=True, max_tokens=30), Detect("x", 20), Point("x", 30)], ids=str
)
def test_the_longest_answer_fits_the_positions_it_needs_and_no_fewer(
    endless_checkpoint: Checkpoint, task: Task
) -> None:
    needed = positions_needed(task, endless_checkpoint)

    answer = ask(Engine(endless_checkpoint, 1, needed), IMAGES[0], [task])[0]

    assert answer.finish_reason == "length"
    with pytest.raises(QuestionTooLong, match=f"{needed} positions, {needed - 1} are there"):
        Engine(endless_checkpoint, 1, needed - 1).submit(0, IMAGES[0], [task])


def test_no_context_is_larger_than_the_models(tiny_checkpoint: Checkpoint) -> None:
    assert Engine(tiny_checkpoint, 1, 10_000).context_len == tiny_checkpoint.config.text.max_context


def test_a_refused_image_leaves_nothing_behind(tiny_checkpoint: Checkpoint, alone: list[list[Answer]]) -> None:
    engine = Engine(tiny_checkpoint, 2)
    with pytest.raises(QuestionTooLong):
        engine.submit("only", IMAGES[0], [MIX[0], Query("?", max_tokens=10_000)])
    with pytest.raises(InvalidOption):
        engine.submit("only", IMAGES[0], [MIX[0], Query("?", max_tokens=0)])
    with pytest.raises(ImageUnreadable):
        engine.submit("only", np.zeros((8, 8), np.uint8), MIX)

    assert (engine.num_in_flight, engine.step()) == (0, [])
    assert ask(engine, IMAGES[0], MIX[:1]) == alone[0][:1]


# --- cancelling


@pytest.mark.parametrize("num_steps", [0, 1, 3])
def test_a_cancelled_image_frees_its_slots_and_the_rest_is_unaffected(
    endless_checkpoint: Checkpoint, num_steps: int
) -> None:
    expected = ask(Engine(endless_checkpoint, 1), IMAGES[1], answers_of(6))
    engine = Engine(endless_checkpoint, 3)
    engine.submit("gone", IMAGES[0], answers_of(50) * 5)
    engine.submit("kept", IMAGES[1], answers_of(6))
    for _ in range(num_steps):
        engine.step()

    engine.cancel("gone")

    completed = {}
    for _ in range(5):  # without the freed slots, "kept" would not have begun
        completed |= {done.key: done for done in engine.step()}
    assert [untimed(a) for a in completed["kept"].answers] == expected
    assert (list(completed), engine.num_in_flight) == (["kept"], 0)


def test_cancelling_what_is_not_there_changes_nothing(endless_checkpoint: Checkpoint) -> None:
    engine = Engine(endless_checkpoint, 1)
    engine.submit("here", IMAGES[0], answers_of(3))

    engine.cancel("elsewhere")

    assert list(finish(engine)) == ["here"]


def test_a_cancelled_key_may_come_again_with_another_picture(endless_checkpoint: Checkpoint) -> None:
    engine = Engine(endless_checkpoint, 2)
    engine.submit("only", IMAGES[0], answers_of(9))
    engine.step()
    engine.cancel("only")

    again = ask(engine, IMAGES[1], answers_of(9))

    assert again == ask(Engine(endless_checkpoint, 1), IMAGES[1], answers_of(9))


# --- memory


def test_a_finished_image_is_freed_at_once(tiny_checkpoint: Checkpoint) -> None:
    """Images and their sequences referred to each other: crops and tokens stayed until the garbage collector came."""
    engine, image = Engine(tiny_checkpoint, 2), IMAGES[0]
    refs = []
    gc.disable()
    try:
        for key in ("finished", "cancelled"):
            engine.submit(key, image, MIX[:2])
            refs.append(weakref.ref(engine._images[key].crops))
        engine.step()
        engine.cancel("cancelled")
        finish(engine)

        assert [ref() for ref in refs] == [None, None]
    finally:
        gc.enable()


def test_a_tokenizer_with_more_ids_than_the_model_is_a_mismatch(
    tiny_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Checkpoint, "encode", lambda self, text: [self.config.text.vocab_size])

    with pytest.raises(WeightsMismatch, match="do not belong together"):
        Engine(tiny_checkpoint).submit(0, np.zeros((20, 20, 3), np.uint8), [Query("?")])
