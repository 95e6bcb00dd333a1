"""Choosing tokens from logits, and images in parts. The other tensor work is tested through the engine.

Run: pytest tests/test_runner.py
"""

import math

import numpy as np
import pytest
import torch

from pipeline.moondream.checkpoint import Checkpoint
from pipeline.moondream.image_crops import make_crops
from pipeline.moondream.prompts import Sampling
from pipeline.moondream.runner import CROPS_PER_PART, ModelRunner, generator_for, sample

# Probabilities 0.5, 0.25, 0.15, 0.1 at temperature 1, not in this order.
LOGITS = torch.tensor([0.15, 0.5, 0.1, 0.25]).log()


def drawn(sampling: Sampling, num_draws: int = 2000) -> dict[int, float]:
    """The share of each token among many draws."""
    generator = torch.Generator().manual_seed(0)
    draws = [sample(LOGITS, sampling, generator) for _ in range(num_draws)]
    return {token: draws.count(token) / num_draws for token in sorted(set(draws))}


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [
        (0.01, [1]),
        (0.3, [1]),
        (0.49, [1]),
        (0.51, [1, 3]),  # 0.5 lies before token 3
        (0.74, [1, 3]),
        (0.76, [0, 1, 3]),
        (1.0, [0, 1, 2, 3]),
    ],
)
def test_top_p_keeps_tokens_whose_probability_before_them_is_at_most_that(top_p: float, kept: list[int]) -> None:
    assert list(drawn(Sampling(1.0, top_p))) == kept


def test_a_token_whose_probability_before_it_is_exactly_top_p_is_kept() -> None:
    halves = torch.tensor([0.0, 0.0, -torch.inf])

    draws = {sample(halves, Sampling(1.0, 0.5), torch.Generator().manual_seed(i)) for i in range(50)}

    assert draws == {0, 1}


def test_tokens_are_drawn_by_their_probability() -> None:
    assert drawn(Sampling(1.0, 1.0)) == pytest.approx({0: 0.15, 1: 0.5, 2: 0.1, 3: 0.25}, abs=0.04)


def test_a_low_temperature_sharpens_and_a_high_one_flattens() -> None:
    squares = {token: p**2 for token, p in {0: 0.15, 1: 0.5, 2: 0.1, 3: 0.25}.items()}
    expected = {token: p / math.fsum(squares.values()) for token, p in squares.items()}

    assert drawn(Sampling(0.5, 1.0)) == pytest.approx(expected, abs=0.04)
    assert drawn(Sampling(10.0, 1.0)) == pytest.approx(dict.fromkeys(range(4), 0.25), abs=0.06)


@pytest.mark.parametrize("temperature", [1e-6, 1e-40, 1e-300])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    """1e-40 overflowed to NaN, and the error ended the step of every sequence in the batch."""
    assert drawn(Sampling(temperature, 1.0), num_draws=20) == {1: 1.0}


def test_suppressed_tokens_are_not_chosen(tiny_checkpoint: Checkpoint) -> None:
    runner = ModelRunner(tiny_checkpoint.model, 1, 80)
    greedy, any_token = (Sampling(), None), (Sampling(10.0, 1.0), torch.Generator().manual_seed(0))

    suppressed = [(), (1,), (1, 3), (0, 1, 2)]
    chosen = runner.choose_tokens(LOGITS.repeat(4, 1), suppressed, [greedy, greedy, greedy, any_token])

    assert chosen == [1, 3, 0, 3]


def test_a_generator_depends_on_seed_and_frame_and_on_nothing_else() -> None:
    states = [generator_for(seed, frame).initial_seed() for seed in range(30) for frame in range(30)]

    assert len(set(states)) == 900
    assert generator_for(7, 3).initial_seed() == generator_for(7, 3).initial_seed()


def test_any_seed_that_is_not_negative_will_do() -> None:
    assert generator_for(2**100, 2**40).initial_seed() >= 0


def test_images_of_more_crops_than_a_part_are_encoded_as_if_in_one(tiny_checkpoint: Checkpoint) -> None:
    rng = np.random.default_rng(0)
    shapes = [(100, 100), (200, 300), (300, 200)]  # one crop, and several
    vision = tiny_checkpoint.config.vision
    images = [make_crops(rng.integers(0, 256, (*shape, 3), dtype=np.uint8), vision) for shape in shapes]
    num_crops = [len(image.pixels) for image in images]
    assert sum(num_crops) % CROPS_PER_PART != 0 and max(num_crops) > CROPS_PER_PART

    tokens = ModelRunner(tiny_checkpoint.model, 1, 100).encode_images(images)

    model = tiny_checkpoint.model.vision
    features = [model.encode_crops(torch.from_numpy(image.pixels)) for image in images]
    expected = model.image_tokens(features, [image.tiling for image in images])
    torch.testing.assert_close(tokens, expected, atol=1e-4, rtol=1e-4)
