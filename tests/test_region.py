"""Coordinates and sizes in and out of the text model. Run: pytest tests/test_region.py"""

import math

import pytest
import torch
from torch import Tensor

from pipeline.moondream.checkpoint import Checkpoint
from pipeline.moondream.config import RegionConfig
from pipeline.moondream.region import RegionModel, fourier


@pytest.fixture
def passing() -> RegionModel:
    """A region model whose decoders pass their input on: a hidden state is the logits of the bins."""
    with torch.device("meta"):
        region = RegionModel(RegionConfig())
    region.add_module("coord_decoder", torch.nn.Identity())
    region.add_module("size_decoder", torch.nn.Identity())
    return region


def likeliest(bins: list[int], num_bins: int) -> Tensor:
    """Logits (N, num_bins) that favour one bin each."""
    return torch.nn.functional.one_hot(torch.tensor(bins), num_bins).float()


def test_a_coordinate_is_its_bin_in_1024ths(passing: RegionModel) -> None:
    coords = passing.decode_coord(likeliest([0, 1, 512, 1023], 1024))

    assert coords.tolist() == [0, 1 / 1024, 0.5, 1023 / 1024]


def test_a_size_spans_ten_octaves_width_first(passing: RegionModel) -> None:
    widths, heights = [0, 1023, 341], [1023, 0, 682]

    sizes = passing.decode_size(torch.cat([likeliest(widths, 1024), likeliest(heights, 1024)], dim=-1))

    expected = [[2 ** (b / 1023 * 10 - 10) for b in pair] for pair in zip(widths, heights, strict=True)]
    assert expected[0] == [1 / 1024, 1.0]
    torch.testing.assert_close(sizes, torch.tensor(expected))


def test_every_size_comes_back_from_the_bin_it_was_put_in(passing: RegionModel) -> None:
    bins = list(range(1024))

    sizes = passing.decode_size(torch.cat([likeliest(bins, 1024), likeliest(bins[::-1], 1024)], dim=-1))

    back = [[round((math.log2(side) + 10) / 10 * 1023) for side in size] for size in sizes.tolist()]
    assert back == [[b, 1023 - b] for b in bins]


def test_low_precision_decodes_to_the_same_fractions(passing: RegionModel) -> None:
    coords = passing.decode_coord(likeliest([1, 1023], 1024).bfloat16())

    assert (coords.dtype, coords.tolist()) == (torch.float32, [1 / 1024, 1023 / 1024])


def test_fourier_features_are_the_cosines_and_then_the_sines() -> None:
    values, features = torch.tensor([[0.25, 0.5]]), torch.tensor([[1.0, 2.0, 0.3], [0.0, 1.0, 0.7]])

    got = fourier(values, features)[0].tolist()

    angles = [2 * math.pi * (0.25 * a + 0.5 * b) for a, b in zip([1.0, 2.0, 0.3], [0.0, 1.0, 0.7], strict=True)]
    assert got == pytest.approx([math.cos(a) for a in angles] + [math.sin(a) for a in angles], abs=1e-6)


def test_coordinates_and_sizes_are_encoded_from_their_features(tiny_checkpoint: Checkpoint) -> None:
    region = tiny_checkpoint.model.region
    coord, size = torch.tensor([[0.1], [0.9]]), torch.tensor([[0.1, 0.2], [0.3, 0.4]])

    coords, sizes = region.encode_coord(coord), region.encode_size(size)

    assert coords.shape == sizes.shape == (2, 64)
    torch.testing.assert_close(coords, region.coord_encoder(fourier(coord, region.coord_features)))
    torch.testing.assert_close(sizes, region.size_encoder(fourier(size, region.size_features)))
