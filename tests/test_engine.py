"""Answers do not depend on what shares their batches, and batches are as full as can be.

What an answer holds is test_answer.py's, memory running out test_engine_memory.py's, agreement with the reference
implementation test_verify.py's. Run: pytest tests/test_engine.py
"""

import copy
import dataclasses
import gc
import random
import weakref
from collections.abc import Hashable, Sequence

import numpy as np
import pytest
import torch
from tasks import MIX
from torch import Tensor

from pipeline.errors import ImageUnreadable, InvalidOption, QuestionTooLong, WeightsMismatch
from pipeline.moondream import engine as engine_module
from pipeline.moondream.answer import Answer, Completed
from pipeline.moondream.checkpoint import Checkpoint
from pipeline.moondream.engine import Engine, positions_needed
from pipeline.moondream.image_crops import Crops, make_crops
from pipeline.moondream.prompts import Detect, Point, Query, Sampling, Task
from pipeline.moondream.runner import ModelRunner

RNG = np.random.default_rng(0)
SIZES = [(100, 100), (200, 150), (120, 300), (300, 200), (90, 400), (112, 112), (60, 50), (170, 170)]
IMAGES = [RNG.integers(0, 256, (*size, 3), dtype=np.uint8) for size in SIZES]  # six of one crop, two of more


def finish(engine: Engine) -> dict[Hashable, Completed]:
    """Step until nothing is in flight."""
    completed: dict[Hashable, Completed] = {}
    while engine.num_in_flight:
        for done in engine.step():
            assert done.key not in completed
            completed[done.key] = done
    return completed


def untimed(answer: Answer) -> Answer:
    """The answer without what differs from run to run."""
    return dataclasses.replace(answer, image_encode_ms=0, llm_inference_ms=0, total_ms=0, trace=None)


def ask(engine: Engine, image: np.ndarray, tasks: Sequence[Task], frame_idx: int = 0) -> list[Answer]:
    engine.submit("only", image, tasks, frame_idx)
    return [untimed(answer) for answer in finish(engine)["only"].answers]


def answers_of(num_tokens: int) -> list[Task]:
    """One question whose answer, by endless_checkpoint, has that many tokens."""
    return [Query("?", max_tokens=num_tokens)]


@pytest.fixture(scope="module")
def alone(tiny_checkpoint: Checkpoint) -> list[list[Answer]]:
    """For each image, the answer to each task of MIX, asked one by one."""
    return [[ask(Engine(tiny_checkpoint, 1), image, [task])[0] for task in MIX] for image in IMAGES]


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the number of images at each pass of the encoder."""
    passes: list[int] = []
    encode_images = ModelRunner.encode_images

    def counting(self: ModelRunner, images: Sequence[Crops]) -> Tensor:
        passes.append(len(images))
        return encode_images(self, images)

    monkeypatch.setattr(ModelRunner, "encode_images", counting)
    return passes


@pytest.fixture
def prefilled(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Grows by the slots at each prefill of prefixes."""
    passes: list[list[int]] = []
    prefill_images = ModelRunner.prefill_images

    def recording(self: ModelRunner, slots: list[int], tokens: Sequence[Tensor]) -> None:
        passes.append(slots)
        prefill_images(self, slots, tokens)

    monkeypatch.setattr(ModelRunner, "prefill_images", recording)
    return passes


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


# --- sharing, and full batches


def test_questions_about_one_image_share_its_encoding_and_its_prefix(
    tiny_checkpoint: Checkpoint, encoded: list[int], prefilled: list[list[int]]
) -> None:
    ask(Engine(tiny_checkpoint, 3), IMAGES[0], MIX)

    assert (encoded, prefilled) == ([1], [[0]])


def test_a_cpu_encodes_with_an_image_the_next_ones_that_fit_into_a_part(
    tiny_checkpoint: Checkpoint, encoded: list[int]
) -> None:
    small, large = IMAGES[0], IMAGES[3]
    assert [len(make_crops(image, tiny_checkpoint.config.vision).pixels) for image in (small, large)] == [1, 5]
    engine = Engine(tiny_checkpoint, 2)

    for key in range(9):
        engine.submit(key, small, MIX[:1])
    finish(engine)
    assert encoded == [2, 4, 3]  # two admitted, to see what images are like; then two and the next two; then the rest

    encoded.clear()
    engine = Engine(tiny_checkpoint, 1)
    for key, image in enumerate([small, large, small, small]):
        engine.submit(key, image, MIX[:1])
    finish(engine)
    assert encoded == [1, 1, 1, 1]  # nothing goes with a large one, or is expected to after one

    encoded.clear()
    for key in range(4):
        engine.submit(key, small, MIX[:1], is_urgent=key < 2)
    finish(engine)
    assert encoded == [1, 1, 2]  # nor with an urgent one


def test_a_gpu_encodes_what_waits_for_a_slot_ahead(
    tiny_checkpoint: Checkpoint, encoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "CROPS_PER_PART", 99)  # a GPU has no parts
    monkeypatch.setattr(Engine, "_num_ahead", 2)
    engine = Engine(tiny_checkpoint, 2)
    engine._admission_s = 0.001
    for key in range(6):
        engine.submit(key, IMAGES[3], MIX[:1])

    engine.step()
    assert encoded == [4]  # two admitted, and the next two
    finish(engine)
    assert sum(encoded) == 6


@pytest.mark.parametrize(
    ("image", "num_ahead", "admission_s", "num_wanted"),
    [
        (IMAGES[3], 0, 0.01, 7),
        (IMAGES[3], 0, 0.3, 3),
        (IMAGES[3], 0, 4.0, 1),
        (IMAGES[0], 3, 0.01, 10),
        (IMAGES[0], 3, 0.3, 4),  # four small ones together take little longer than one
        (IMAGES[0], 3, 4.0, 4),
    ],
)
def test_an_engine_wants_what_its_slots_can_take_without_a_long_stall(
    tiny_checkpoint: Checkpoint, image: np.ndarray, num_ahead: int, admission_s: float, num_wanted: int
) -> None:
    engine = Engine(tiny_checkpoint, 8)
    assert engine.num_wanted == 1  # to see how long it takes
    engine.submit(0, image, MIX[:1])
    engine.step()
    assert engine._admission_s != engine_module.STALL_S

    engine._admission_s = admission_s

    assert engine.num_wanted == num_wanted
    for key in range(1, 8 + num_ahead):
        assert engine.num_wanted > 0
        engine.submit(key, image, MIX[:1])
    assert engine.num_wanted == 0


@pytest.mark.parametrize(
    ("admission_s", "order"), [(4.0, ["a", "b", "urgent", "c", "d"]), (0.01, ["a", "b", "c", "d", "urgent"])]
)
def test_an_urgent_image_goes_first_and_nothing_begins_beside_it_that_it_would_wait_for(
    endless_checkpoint: Checkpoint, admission_s: float, order: list[str]
) -> None:
    engine = Engine(endless_checkpoint, 2)
    for key, num_tokens in {"a": 3, "b": 4, "c": 2, "d": 2}.items():
        engine.submit(key, IMAGES[0], answers_of(num_tokens))
    assert not engine.step()
    engine._admission_s = admission_s

    engine.submit("urgent", IMAGES[0], answers_of(20), is_urgent=True)

    done: list[Hashable] = []
    while engine.num_in_flight:
        done += [completed.key for completed in engine.step()]
        engine._admission_s = admission_s
    assert done == order


def test_a_pass_of_the_encoder_is_bounded(
    tiny_checkpoint: Checkpoint, encoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "CROPS_PER_PASS", 4)
    engine = Engine(tiny_checkpoint, 8)
    for key, image in enumerate([IMAGES[0]] * 3 + [IMAGES[3]] + [IMAGES[0]] * 2):  # IMAGES[3] has more than 4 crops
        engine.submit(key, image, MIX[:1])

    finish(engine)

    assert encoded == [3, 1, 2]


def test_a_freed_slot_is_taken_over_while_others_go_on(
    endless_checkpoint: Checkpoint, prefilled: list[list[int]]
) -> None:
    engine = Engine(endless_checkpoint, 2)
    for key, num_tokens in {"long": 12, "a": 2, "b": 3, "c": 2}.items():
        engine.submit(key, IMAGES[0], answers_of(num_tokens))

    ends = {}
    for step in range(1, 12):
        for done in engine.step():
            ends[done.key] = step

    # The first step of a sequence brings two tokens: one from its prompt, one decoded.
    assert ends == {"a": 1, "b": 3, "c": 4, "long": 11}
    assert prefilled == [[0, 1], [1], [1]]


def test_steps_are_no_more_than_full_batches_need(endless_checkpoint: Checkpoint) -> None:
    engine = Engine(endless_checkpoint, 4)
    for key in range(8):
        engine.submit(key, IMAGES[0], answers_of(11))

    num_steps = 0
    while engine.num_in_flight:
        engine.step()
        num_steps += 1

    assert num_steps == 2 * 10


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
