"""The keys and values of every slot, allocated once.

One tensor of each per layer: (num_slots, n_kv_heads, context_len, head_dim). A slot's first `prefix_len` positions hold
its image, the prompt and the answer follow. Attention reads only as far as the longest sequence of a step reaches.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.moondream.config import MoondreamConfig
from pipeline.moondream.text import Attend


class KVCache:
    def __init__(
        self, config: MoondreamConfig, num_slots: int, context_len: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.prefix_len = config.prefix_len
        self.context_len = context_len
        shape = (num_slots, config.text.n_kv_heads, context_len, config.text.head_dim)
        # Zeros, not empty: a masked position still counts with weight 0, and 0 x NaN would be NaN.
        self.k = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.text.n_layers)]
        self.v = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.text.n_layers)]
        self._is_grouped = config.text.n_kv_heads < config.text.n_heads
        # On a CPU, bfloat16 attention of single positions takes 12 ms a layer for 8 slots of 780 positions, and 4 ms
        # slot by slot in float32, which is also more exact (AVX512_BF16, torch 2.13).
        self._decodes_in_float32 = device.type == "cpu" and dtype == torch.bfloat16

    def copy_prefix(self, source_slot: int, slot: int) -> None:
        """Give `slot` the image of `source_slot`."""
        for kept in (*self.k, *self.v):
            kept[slot, :, : self.prefix_len] = kept[source_slot, :, : self.prefix_len]

    def clear(self, slot: int) -> None:
        for kept in (*self.k, *self.v):
            kept[slot].zero_()

    def prefill_prefix(self, slots: list[int]) -> Attend:
        """Attention of whole prefixes, one per slot: stored, and each attends to itself both ways, without a mask."""
        rows = _rows(slots)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.k[layer][rows, :, : self.prefix_len] = k
            self.v[layer][rows, :, : self.prefix_len] = v
            return self._attention(q, k, v, None)

        return attend

    def prefill_prompt(self, slots: list[int], num_positions: int) -> Attend:
        """Attention of prompts that follow the prefixes, padded on the right to `num_positions`: causal. What the
        padding leaves behind is overwritten before it is ever attended to."""
        rows, start, end = _rows(slots), self.prefix_len, self.prefix_len + num_positions
        mask = torch.ones(num_positions, end, dtype=torch.bool, device=self.k[0].device).tril(start)  # (T, S)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.k[layer][rows, :, start:end] = k
            self.v[layer][rows, :, start:end] = v
            return self._attention(q, self.k[layer][rows, :, :end], self.v[layer][rows, :, :end], mask)

        return attend

    def decode(self, first_slot: int, positions: list[int]) -> Attend:
        """Attention of one step of neighbouring slots: slot first_slot + i stores at positions[i], attends up to it."""
        slots, end = slice(first_slot, first_slot + len(positions)), max(positions) + 1
        at = torch.tensor(positions, device=self.k[0].device)  # (B,)
        rows = first_slot + torch.arange(len(positions), device=at.device)
        is_ragged = min(positions) + 1 < end
        mask = (torch.arange(end, device=at.device) <= at[:, None])[:, None, None] if is_ragged else None  # (B,1,1,S)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.k[layer][rows, :, at] = k[:, :, 0]
            self.v[layer][rows, :, at] = v[:, :, 0]
            if self._decodes_in_float32:
                return self._slot_by_slot(q, self.k[layer][slots], self.v[layer][slots], positions)
            return self._attention(q, self.k[layer][slots, :, :end], self.v[layer][slots, :, :end], mask)

        return attend

    def _slot_by_slot(self, q: Tensor, k: Tensor, v: Tensor, positions: list[int]) -> Tensor:
        """In float32: q (B, n_heads, 1, D), each row of it over its own slot of k and v, up to its own position."""
        slots = zip(q.float().split(1), k.split(1), v.split(1), positions, strict=True)
        out = [self._attention(q, k[:, :, : at + 1].float(), v[:, :, : at + 1].float(), None) for q, k, v, at in slots]
        return torch.cat(out).to(q.dtype)

    def _attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=self._is_grouped)


def _rows(slots: list[int]) -> slice | list[int]:
    """Neighbouring slots as a slice, which reads the cache without copying it."""
    return slice(slots[0], slots[-1] + 1) if slots == list(range(slots[0], slots[-1] + 1)) else slots
