"""Crops to features to image tokens, against naive definitions. Run: pytest tests/test_vision.py"""

import copy
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.moondream.checkpoint import Checkpoint
from pipeline.moondream.vision import Mlp, VisionBlock, VisionModel

GRID, MARGIN, DIM = 8, 1, 32  # of tiny_checkpoint


@pytest.fixture
def vision(tiny_checkpoint: Checkpoint) -> VisionModel:
    return tiny_checkpoint.model.vision


def pixels(num_crops: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (num_crops, 112, 112, 3), dtype=torch.uint8, generator=generator)


def features(num_crops: int) -> Tensor:
    return torch.randn(num_crops, GRID**2, DIM, generator=torch.Generator().manual_seed(0))


def pooled(tiles: Tensor, rows: int, columns: int) -> Tensor:
    """Cell by cell: stitch tiles (rows * columns, GRID^2, DIM) without the inner overlaps, average down to a crop."""
    inner = GRID - 2 * MARGIN
    height, width = rows * inner + 2 * MARGIN, columns * inner + 2 * MARGIN
    stitched = torch.zeros(height, width, DIM)
    for y in range(height):
        for x in range(width):
            row = min(max((y - MARGIN) // inner, 0), rows - 1)
            column = min(max((x - MARGIN) // inner, 0), columns - 1)
            cell = (y - row * inner) * GRID + (x - column * inner)
            stitched[y, x] = tiles[row * columns + column, cell]
    out = torch.zeros(GRID, GRID, DIM)
    for i in range(GRID):
        for j in range(GRID):
            top, bottom = i * height // GRID, math.ceil((i + 1) * height / GRID)
            left, right = j * width // GRID, math.ceil((j + 1) * width / GRID)
            out[i, j] = stitched[top:bottom, left:right].mean((0, 1))
    return out.view(GRID**2, DIM)


def projected(vision: VisionModel, global_features: Tensor, local_features: Tensor) -> Tensor:
    x = torch.cat([global_features, local_features], dim=-1)
    return vision.proj_mlp.fc2(F.gelu(vision.proj_mlp.fc1(x), approximate="tanh"))


@pytest.mark.parametrize("tiling", [(1, 2), (2, 1), (2, 3), (3, 2), (1, 6), (6, 1)], ids=str)
def test_tiles_are_stitched_without_their_overlaps_and_pooled(vision: VisionModel, tiling: tuple[int, int]) -> None:
    crops = features(1 + tiling[0] * tiling[1])

    tokens = vision.image_tokens([crops], [tiling])

    expected = projected(vision, crops[0], pooled(crops[1:], *tiling))
    torch.testing.assert_close(tokens[0], expected, atol=1e-4, rtol=1e-4)


def test_a_single_crop_is_both_the_global_and_the_local_view(vision: VisionModel) -> None:
    crops = features(1)

    tokens = vision.image_tokens([crops], [(1, 1)])

    torch.testing.assert_close(tokens[0], projected(vision, crops[0], crops[0]), atol=1e-4, rtol=1e-4)


def test_images_of_different_tilings_are_joined_in_one_pass(vision: VisionModel) -> None:
    crops, tilings = features(3 + 1 + 5).split([3, 1, 5]), [(1, 2), (1, 1), (2, 2)]

    together = vision.image_tokens(crops, tilings)

    apart = [vision.image_tokens([c], [t])[0] for c, t in zip(crops, tilings, strict=True)]
    assert together.shape == (3, GRID**2, 64)
    torch.testing.assert_close(together, torch.stack(apart), atol=1e-4, rtol=1e-4)


def test_without_a_margin_tiles_simply_abut(vision: VisionModel) -> None:
    vision = copy.deepcopy(vision)
    vision.config = dataclasses.replace(vision.config, overlap_margin=0)
    crops = features(5)

    tokens = vision.image_tokens([crops], [(2, 2)])

    halved = crops[1:].view(4, GRID // 2, 2, GRID // 2, 2, DIM).mean((2, 4))  # each tile pooled to a quarter
    quarters = halved.view(2, 2, GRID // 2, GRID // 2, DIM).permute(0, 2, 1, 3, 4).reshape(GRID**2, DIM)
    torch.testing.assert_close(tokens[0], projected(vision, crops[0], quarters), atol=1e-4, rtol=1e-4)


def test_a_patch_is_its_normalised_pixels_channel_by_channel(vision: VisionModel) -> None:
    """Without blocks, features are the normed embeddings of patches, which are read row by row."""
    vision = copy.deepcopy(vision)
    vision.blocks = torch.nn.ModuleList()
    crop = pixels(1)

    got = vision.encode_crops(crop)[0]

    scaled = (crop[0].float() / 255 - 0.5) / 0.5  # (112, 112, 3)
    patches = [
        scaled[y : y + 14, x : x + 14].permute(2, 0, 1).flatten() for y in range(0, 112, 14) for x in range(0, 112, 14)
    ]
    embedded = vision.patch_emb(torch.stack(patches)) + vision.pos_emb[0]
    expected = F.layer_norm(embedded, (DIM,), vision.post_ln.weight, vision.post_ln.bias, eps=1e-5)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_a_block_is_attention_over_all_patches_and_then_an_mlp(vision: VisionModel) -> None:
    block, x = vision.blocks[0], features(1)
    assert isinstance(block, VisionBlock)

    got = block(x)

    h = F.layer_norm(x, (DIM,), block.ln1.weight, block.ln1.bias, eps=1e-5)
    q, k, v = block.attn.qkv(h)[0].split(DIM, dim=-1)
    heads = []
    for head in (slice(0, 16), slice(16, 32)):
        heads.append((q[:, head] @ k[:, head].T / 16**0.5).softmax(-1) @ v[:, head])
    x = x + block.attn.proj(torch.cat(heads, dim=-1))
    h = F.layer_norm(x, (DIM,), block.ln2.weight, block.ln2.bias, eps=1e-5)
    expected = x + block.mlp.fc2(F.gelu(block.mlp.fc1(h), approximate="tanh"))
    torch.testing.assert_close(got, expected, atol=1e-3, rtol=1e-4)


def test_crops_encoded_together_equal_crops_encoded_alone(vision: VisionModel) -> None:
    crops = pixels(4)

    together = vision.encode_crops(crops)

    apart = [vision.encode_crops(crops[i : i + 1])[0] for i in range(4)]
    torch.testing.assert_close(together, torch.stack(apart), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("has_gradients", [False, True])
def test_an_mlp_in_bfloat16_is_that_in_float32_but_for_rounding(has_gradients: bool) -> None:
    """Without gradients, a CPU that multiplies bfloat16 computes product and GELU as one operation."""
    torch.manual_seed(0)
    mlp, x = Mlp(64, 256, 64), torch.randn(2, 5, 64).bfloat16()
    mlp = mlp.bfloat16()

    with torch.set_grad_enabled(has_gradients):
        got = mlp(x)

    expected = copy.deepcopy(mlp).float()(x.float())
    torch.testing.assert_close(got.float(), expected, atol=0.01, rtol=0.01)
    if has_gradients:
        got.sum().backward()
        assert mlp.fc1.weight.grad is not None and mlp.fc1.weight.grad.any()
