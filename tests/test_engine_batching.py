"""Batches are as full as can be, and what is urgent does not wait for them. That answers do not depend on what shares
their batches is test_engine.py's. Run: pytest tests/test_engine_batching.py
"""

from collections.abc import Hashable, Sequence

import numpy as np
import pytest
from engine_questions import IMAGES, answers_of, finish
from tasks import MIX
from torch import Tensor

from pipeline.moondream import engine as engine_module
from pipeline.moondream.checkpoint import Checkpoint
from pipeline.moondream.engine import Engine
from pipeline.moondream.image_crops import Crops, make_crops
from pipeline.moondream.runner import ModelRunner


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


def test_questions_about_one_image_share_its_encoding_and_its_prefix(
    tiny_checkpoint: Checkpoint, encoded: list[int], prefilled: list[list[int]]
) -> None:
    engine = Engine(tiny_checkpoint, 3)
    engine.submit("only", IMAGES[0], MIX)
    finish(engine)

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
