"""Attention over the cache equals attention over whole sequences. Run: pytest tests/test_kv_cache.py"""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from pipeline.moondream.checkpoint import Checkpoint
from pipeline.moondream.kv_cache import KVCache
from pipeline.moondream.text import TextModel

CPU = torch.device("cpu")


@pytest.fixture
def text(tiny_checkpoint: Checkpoint) -> TextModel:
    return tiny_checkpoint.model.text


@pytest.fixture
def prefix_len(tiny_checkpoint: Checkpoint) -> int:
    return tiny_checkpoint.config.prefix_len


@pytest.fixture
def cache(tiny_checkpoint: Checkpoint) -> KVCache:
    """4 slots of 90 positions: 65 of them for the image."""
    return KVCache(tiny_checkpoint.config, 4, 90, CPU, torch.float32)


def noise(text: TextModel, *shape: int) -> Tensor:
    return torch.randn(*shape, text.config.dim, generator=torch.Generator().manual_seed(0))


def uncached(text: TextModel, x: Tensor, prefix_len: int) -> Tensor:
    """Hidden states of a whole sequence x (T, dim): both ways over the prefix, causal after; one head at a time."""
    T, group = len(x), text.config.n_heads // text.config.n_kv_heads
    may_see = torch.ones(T, T).tril().bool()
    may_see[:prefix_len, :prefix_len] = True

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads = []
        for head in range(q.shape[1]):
            scores = q[0, head] @ k[0, head // group].T / q.shape[-1] ** 0.5  # (T, T)
            heads.append(scores.masked_fill(~may_see, -torch.inf).softmax(-1) @ v[0, head // group])
        return torch.stack(heads)[None]

    return text(x[None], torch.arange(T)[None], attend)[0]


def prefill_prefix(text: TextModel, cache: KVCache, slots: list[int], prefixes: Tensor) -> Tensor:
    return text(prefixes, torch.arange(cache.prefix_len)[None], cache.prefill_prefix(slots))


def prefill_prompt(text: TextModel, cache: KVCache, slots: list[int], prompts: Tensor) -> Tensor:
    positions = cache.prefix_len + torch.arange(prompts.shape[1])[None]
    return text(prompts, positions, cache.prefill_prompt(slots, prompts.shape[1]))


def decode(text: TextModel, cache: KVCache, first_slot: int, x: Tensor, positions: Sequence[int]) -> Tensor:
    """One step of neighbouring slots, x (B, dim)."""
    return text(x[:, None], torch.tensor(positions)[:, None], cache.decode(first_slot, list(positions)))[:, 0]


def assert_close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, atol=2e-4, rtol=1e-4)


def test_prefill_and_decode_equal_one_pass_over_the_whole_sequence(
    text: TextModel, cache: KVCache, prefix_len: int
) -> None:
    x = noise(text, prefix_len + 5 + 4)

    prefix = prefill_prefix(text, cache, [2], x[None, :prefix_len])[0]
    prompt = prefill_prompt(text, cache, [2], x[None, prefix_len : prefix_len + 5])[0]
    steps = [decode(text, cache, 2, x[None, at], [at])[0] for at in range(prefix_len + 5, len(x))]

    assert_close(torch.cat([prefix, prompt, torch.stack(steps)]), uncached(text, x, prefix_len))


@pytest.mark.parametrize("slots", [[0, 1, 2], [3, 1, 0], [1, 3]], ids=str)
def test_slots_prefilled_together_do_not_see_each_other(
    text: TextModel, cache: KVCache, prefix_len: int, slots: list[int]
) -> None:
    x = noise(text, len(slots), prefix_len + 5)

    prefill_prefix(text, cache, slots, x[:, :prefix_len])
    hidden = prefill_prompt(text, cache, slots, x[:, prefix_len:])

    for row, whole in zip(hidden, x, strict=True):
        assert_close(row, uncached(text, whole, prefix_len)[prefix_len:])


def test_padding_behind_a_prompt_leaves_no_trace(text: TextModel, cache: KVCache, prefix_len: int) -> None:
    """A prompt of 2 is padded to 6, then decodes over what the padding left."""
    x = noise(text, prefix_len + 4)
    padded = torch.cat([x[prefix_len : prefix_len + 2], noise(text, 4)])

    prefill_prefix(text, cache, [0], x[None, :prefix_len])
    hidden = [prefill_prompt(text, cache, [0], padded[None])[0, 1]]
    hidden += [decode(text, cache, 0, x[None, at], [at])[0] for at in (prefix_len + 2, prefix_len + 3)]

    assert_close(torch.stack(hidden), uncached(text, x, prefix_len)[prefix_len + 1 :])


def test_sequences_of_different_lengths_decode_together(text: TextModel, cache: KVCache, prefix_len: int) -> None:
    x = noise(text, 3, prefix_len + 6)
    lengths = [6, 1, 3]  # prompts of that many less one, then one step
    for slot, length in enumerate(lengths):
        prefill_prefix(text, cache, [slot + 1], x[None, slot, :prefix_len])
        if length > 1:
            prefill_prompt(text, cache, [slot + 1], x[None, slot, prefix_len : prefix_len + length - 1])

    at = [prefix_len + length - 1 for length in lengths]
    hidden = decode(text, cache, 1, x[torch.arange(3), torch.tensor(at)], at)

    for row, whole, last in zip(hidden, x, at, strict=True):
        assert_close(row, uncached(text, whole[: last + 1], prefix_len)[-1])


def test_a_copied_prefix_serves_like_a_computed_one(text: TextModel, cache: KVCache, prefix_len: int) -> None:
    x = noise(text, prefix_len + 3)
    prefill_prefix(text, cache, [3], x[None, :prefix_len])

    cache.copy_prefix(3, 0)

    hidden = prefill_prompt(text, cache, [0], x[None, prefix_len:])[0]
    assert_close(hidden, uncached(text, x, prefix_len)[prefix_len:])


def test_a_kept_prefix_serves_a_second_prompt(text: TextModel, cache: KVCache, prefix_len: int) -> None:
    x, other = noise(text, prefix_len + 3), noise(text, 8)
    prefill_prefix(text, cache, [1], x[None, :prefix_len])
    prefill_prompt(text, cache, [1], other[None])

    hidden = prefill_prompt(text, cache, [1], x[None, prefix_len:])[0]

    assert_close(hidden, uncached(text, x, prefix_len)[prefix_len:])


def test_an_idle_slot_between_busy_ones_keeps_its_prefix(text: TextModel, cache: KVCache, prefix_len: int) -> None:
    x = noise(text, 3, prefix_len + 1)
    prefill_prefix(text, cache, [0, 1, 2], x[:, :prefix_len])
    before = [kept[1, :, :prefix_len].clone() for kept in (*cache.k, *cache.v)]

    decode(text, cache, 0, x[:, prefix_len], [prefix_len] * 3)

    assert all(
        torch.equal(kept[1, :, :prefix_len], old) for kept, old in zip((*cache.k, *cache.v), before, strict=True)
    )


def test_in_bfloat16_a_step_reads_the_cache_exactly(tiny_checkpoint: Checkpoint) -> None:
    """Its attention is that of float64 over the same numbers, rounded once: no rounding between scores and values."""
    config, generator = tiny_checkpoint.config, torch.Generator().manual_seed(0)
    cache, positions = KVCache(config, 4, 90, CPU, torch.bfloat16), [88, 70, 66]
    for kept in (*cache.k, *cache.v):
        kept.normal_(generator=generator)
    heads, kv_heads, D = config.text.n_heads, config.text.n_kv_heads, config.text.head_dim
    q = torch.randn(3, heads, 1, D, generator=generator).bfloat16()
    k, v = torch.randn(2, 3, kv_heads, 1, D, generator=generator).bfloat16()

    out = cache.decode(1, positions)(1, q, k, v)

    for row, at in enumerate(positions):
        for head in range(heads):
            seen = (1 + row, head // (heads // kv_heads), slice(at + 1))
            scores = cache.k[1][seen].double() @ q[row, head, 0].double() / D**0.5  # (S,)
            expected = scores.softmax(-1) @ cache.v[1][seen].double()  # (D,)
            torch.testing.assert_close(out[row, head, 0], expected.bfloat16(), atol=1e-5, rtol=2**-7)
