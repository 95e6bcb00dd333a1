"""The vision encoder: crops become patch features, and an image's features become its tokens for the text model.

Knows tensors only; image_crops.py makes the crops. Parameter names equal the checkpoint's keys under `model.vision.`.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.moondream.config import VisionConfig
from pipeline.moondream.device import has_native_bfloat16

# oneDNN applies GELU to a product before it writes it: one pass over memory less, and one rounding. The operation is
# torch.compile's; torch does not document it, and it knows no gradients.
HAS_FUSED_GELU = has_native_bfloat16() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class Mlp(nn.Module):
    """fc2(gelu(fc1(x))), with the tanh approximation that the checkpoints were trained with."""

    def __init__(self, dim: int, inner_dim: int, out_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, inner_dim)
        self.fc2 = nn.Linear(inner_dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        can_fuse = x.device.type == "cpu" and x.dtype == torch.bfloat16 and not torch.is_grad_enabled()
        if HAS_FUSED_GELU and can_fuse:
            linear_gelu = torch.ops.mkldnn._linear_pointwise
            return self.fc2(linear_gelu(x, self.fc1.weight, self.fc1.bias, "gelu", [], "tanh"))
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class VisionAttention(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.n_heads = config.enc_n_heads
        self.qkv = nn.Linear(config.enc_dim, 3 * config.enc_dim)
        self.proj = nn.Linear(config.enc_dim, config.enc_dim)

    def forward(self, x: Tensor) -> Tensor:
        N, T, C = x.shape
        qkv = self.qkv(x).view(N, T, 3, self.n_heads, C // self.n_heads).permute(2, 0, 3, 1, 4)  # (3, N, heads, T, D)
        out = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])  # (N, heads, T, D)
        return self.proj(out.transpose(1, 2).reshape(N, T, C))


class VisionBlock(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.ln1 = nn.LayerNorm(config.enc_dim)
        self.attn = VisionAttention(config)
        self.ln2 = nn.LayerNorm(config.enc_dim)
        self.mlp = Mlp(config.enc_dim, config.enc_ff_dim, config.enc_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln1(x))
        return x + self.mlp(self.ln2(x))


class VisionModel(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_emb = nn.Linear(config.in_channels * config.enc_patch_size**2, config.enc_dim)
        self.pos_emb = nn.Parameter(torch.zeros(1, config.num_patches, config.enc_dim))
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.enc_n_layers))
        self.post_ln = nn.LayerNorm(config.enc_dim)
        self.proj_mlp = Mlp(2 * config.enc_dim, config.proj_inner_dim, config.proj_out_dim)

    def encode_crops(self, pixels: Tensor) -> Tensor:
        """Encode crops, uint8 (N, crop_size, crop_size, 3), of any number of images -> (N, num_patches, enc_dim)."""
        x = self.patch_emb(self._patchify(pixels)) + self.pos_emb  # (N, num_patches, enc_dim)
        for block in self.blocks:
            x = block(x)
        return self.post_ln(x)

    def image_tokens(self, features: Sequence[Tensor], tilings: Sequence[tuple[int, int]]) -> Tensor:
        """Join each image's crop features (n_crops, num_patches, enc_dim) into its tokens
        -> (num_images, num_patches, proj_out_dim). A (1, 1) tiling has one crop that serves as both views."""
        pairs = [
            torch.cat([crops[0], crops[0] if tiling == (1, 1) else self._pool_tiles(crops[1:], tiling)], dim=-1)
            for crops, tiling in zip(features, tilings, strict=True)
        ]  # each (num_patches, 2 enc_dim)
        return self.proj_mlp(torch.stack(pairs))

    def _patchify(self, pixels: Tensor) -> Tensor:
        N, patch, grid = pixels.shape[0], self.config.enc_patch_size, self.config.grid_size
        x = pixels.to(self.patch_emb.weight.dtype).div(255).sub(0.5).div(0.5)
        x = x.view(N, grid, patch, grid, patch, self.config.in_channels)
        return x.permute(0, 1, 3, 5, 2, 4).reshape(N, grid**2, -1)  # patch content is channel-major: (c, y, x)

    def _pool_tiles(self, tiles: Tensor, tiling: tuple[int, int]) -> Tensor:
        """Stitch the tiles' features into one map and pool it to the size of one crop -> (num_patches, enc_dim)."""
        (rows, columns), grid, margin = tiling, self.config.grid_size, self.config.overlap_margin
        tiles = tiles.view(rows, columns, grid, grid, -1)
        # Each tile keeps its overlap only at the outer edges of the image: elsewhere its neighbour covers it.
        stitched = torch.cat(
            [
                torch.cat([tiles[i, j][_inner(i, rows, margin), _inner(j, columns, margin)] for j in range(columns)], 1)
                for i in range(rows)
            ]
        )  # (rows * (grid - 2 margin) + 2 margin, columns * (grid - 2 margin) + 2 margin, enc_dim)
        # Apple's MPS has no adaptive pooling for sizes that do not divide each other.
        device = torch.device("cpu") if stitched.device.type == "mps" else stitched.device
        pooled = F.adaptive_avg_pool2d(stitched.to(device).permute(2, 0, 1), (grid, grid))  # (enc_dim, grid, grid)
        return pooled.permute(1, 2, 0).reshape(grid**2, -1).to(stitched.device)


def _inner(index: int, count: int, margin: int) -> slice:
    return slice(0 if index == 0 else margin, None if index == count - 1 or margin == 0 else -margin)
