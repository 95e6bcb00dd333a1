"""The decoder's parts against their definitions. Attention over the cache is test_kv_cache's.

Run: pytest tests/test_text.py
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.moondream.checkpoint import Checkpoint
from pipeline.moondream.text import TextBlock, rotary_table, rotate


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def interleaved(x: Tensor, positions: Tensor, rotary_dim: int) -> Tensor:
    """The reference's definition, x (B, heads, T, D): pair i of the halves is turned by position * 10000^(-2i / dim)
    and lands in dims 2i and 2i + 1."""
    out = x.clone()
    for i in range(rotary_dim // 2):
        angle = positions.double() * 10000.0 ** (-2 * i / rotary_dim)
        a, b = x[..., i].double(), x[..., rotary_dim // 2 + i].double()
        out[..., 2 * i] = (a * angle.cos() - b * angle.sin()).to(x.dtype)
        out[..., 2 * i + 1] = (a * angle.sin() + b * angle.cos()).to(x.dtype)
    return out


def test_scores_equal_those_of_the_interleaved_reference() -> None:
    q, k = noise(2, 2, 3, 40, 64)  # each (B, heads, T, D)
    positions = torch.arange(700, 740)
    rotary = rotary_table(positions[None], 32)

    scores = rotate(q, rotary) @ rotate(k, rotary).transpose(-1, -2)

    expected = interleaved(q, positions, 32) @ interleaved(k, positions, 32).transpose(-1, -2)
    torch.testing.assert_close(scores, expected, atol=2e-3, rtol=0)


def test_position_zero_turns_nothing() -> None:
    x = noise(1, 2, 1, 64)

    torch.testing.assert_close(rotate(x, rotary_table(torch.zeros(1, 1), 32)), x)


def test_the_second_half_of_a_head_passes_through() -> None:
    x = noise(1, 2, 5, 64)

    turned = rotate(x, rotary_table(torch.arange(5)[None] + 99, 32))

    assert torch.equal(turned[..., 32:], x[..., 32:])
    assert not torch.isclose(turned[..., :32], x[..., :32]).all()


def test_rows_may_stand_at_different_positions() -> None:
    x = noise(2, 2, 1, 64)

    together = rotate(x, rotary_table(torch.tensor([[3], [77]]), 32))

    apart = [rotate(x[row : row + 1], rotary_table(torch.tensor([[at]]), 32)) for row, at in enumerate((3, 77))]
    assert torch.equal(together, torch.cat(apart))


def test_low_precision_is_turned_in_float32_and_cast_back() -> None:
    x, rotary = noise(1, 2, 5, 64).bfloat16(), rotary_table(torch.arange(5)[None] + 1000, 32)

    turned = rotate(x, rotary)

    assert turned.dtype == torch.bfloat16
    assert torch.equal(turned, rotate(x.float(), rotary).bfloat16())


def test_heads_are_split_into_queries_keys_and_values_and_the_first_two_are_turned(tiny_checkpoint: Checkpoint) -> None:
    """4 heads on 2 keys of 16 dims: qkv rows 0..63 are q, 64..95 k, 96..127 v."""
    text = tiny_checkpoint.model.text
    block, x = text.blocks[0], noise(1, 3, 64)
    assert isinstance(block, TextBlock)
    seen: list[Tensor] = []

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen.extend((q, k, v))
        return q

    rotary = rotary_table(torch.arange(3)[None] + 9, text.config.rotary_dim)
    block.attn(x, rotary, 0, attend)

    flat = block.attn.qkv(x)  # (1, 3, 128)
    q, k, v = (part.unflatten(2, (-1, 16)).transpose(1, 2) for part in flat.split([64, 32, 32], dim=2))
    for part, expected in zip(seen, (rotate(q, rotary), rotate(k, rotary), v), strict=True):
        assert torch.equal(part, expected)


def test_a_block_adds_attention_and_mlp_of_the_same_norm(tiny_checkpoint: Checkpoint) -> None:
    text = tiny_checkpoint.model.text
    block, x = text.blocks[1], noise(1, 3, 64)
    assert isinstance(block, TextBlock)

    got = block(x, rotary_table(torch.zeros(1, 3), text.config.rotary_dim), 1, lambda layer, q, k, v: q)

    h = F.layer_norm(x, (64,), block.ln.weight, block.ln.bias, eps=1e-5)
    attention = block.attn.proj(block.attn.qkv(h)[..., :64])
    mlp = block.mlp.fc2(F.gelu(block.mlp.fc1(h), approximate="tanh"))
    torch.testing.assert_close(got, x + attention + mlp, atol=1e-4, rtol=1e-4)


def test_logits_are_those_of_the_normed_hidden_state(tiny_checkpoint: Checkpoint) -> None:
    text, hidden = tiny_checkpoint.model.text, noise(3, 64)

    normed = F.layer_norm(hidden, (64,), text.post_ln.weight, text.post_ln.bias, eps=1e-5)
    expected = normed @ text.lm_head.weight.T + text.lm_head.bias
    torch.testing.assert_close(text.logits(hidden), expected, atol=1e-4, rtol=1e-4)
