"""The text model: a decoder of parallel blocks with partial rotary positions.

It does not know how keys and values are kept: every layer hands its q, k and v to the `attend` function of the caller,
which is the KV cache while answering and a plain masked attention while training. Parameter names equal the
checkpoint's keys under `model.text.`.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from pipeline.moondream.config import TextConfig
from pipeline.moondream.vision import Mlp

ROPE_THETA = 10000.0

# (layer, q (B, n_heads, T, D), k and v (B, n_kv_heads, T, D)) -> attention output (B, n_heads, T, D)
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


class TextAttention(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.qkv = nn.Linear(config.dim, config.qkv_dim)
        self.proj = nn.Linear(config.dim, config.dim)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], layer: int, attend: Attend) -> Tensor:
        (B, T, _), c = x.shape, self.config
        qkv = self.qkv(x).view(B, T, -1, c.head_dim).transpose(1, 2)  # (B, n_heads + 2 n_kv_heads, T, D)
        q, k, v = qkv.split([c.n_heads, c.n_kv_heads, c.n_kv_heads], dim=1)
        out = attend(layer, rotate(q, rotary), rotate(k, rotary), v)  # (B, n_heads, T, D)
        return self.proj(out.transpose(1, 2).reshape(B, T, c.dim))


class TextBlock(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.ln = nn.LayerNorm(config.dim)
        self.attn = TextAttention(config)
        self.mlp = Mlp(config.dim, config.ff_dim, config.dim)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], layer: int, attend: Attend) -> Tensor:
        h = self.ln(x)
        return x + self.attn(h, rotary, layer, attend) + self.mlp(h)


class TextModel(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Parameter(torch.zeros(config.vocab_size, config.dim))
        self.blocks = nn.ModuleList(TextBlock(config) for _ in range(config.n_layers))
        self.post_ln = nn.LayerNorm(config.dim)
        self.lm_head = nn.Linear(config.dim, config.vocab_size)

    def forward(self, x: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Run embeddings x (B, T, dim) at positions (B or 1, T) -> hidden states (B, T, dim), before `post_ln`."""
        rotary = rotary_table(positions, self.config.rotary_dim)
        for layer, block in enumerate(self.blocks):
            x = block(x, rotary, layer, attend)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states (..., dim) -> next-token logits (..., vocab_size)."""
        return self.lm_head(self.post_ln(hidden))


def rotary_table(positions: Tensor, rotary_dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin of each position's angles, float32 (B, 1, T, rotary_dim / 2)."""
    exponents = torch.arange(0, rotary_dim, 2, device=positions.device, dtype=torch.float32) / rotary_dim
    angles = positions[:, None, :, None] * ROPE_THETA**-exponents
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Turn the first rotary dims of each head of x (B, heads, T, D) by its position; the others pass through.

    The reference implementation writes the pairs interleaved; scores are the same while q and k share one layout.
    """
    cos, sin = rotary
    half = cos.shape[-1]
    a, b = x[..., :half].float(), x[..., half : 2 * half].float()
    turned = torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x.dtype)
    return torch.cat([turned, x[..., 2 * half :]], dim=-1)
