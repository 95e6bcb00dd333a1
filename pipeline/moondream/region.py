"""Coordinates and sizes as inputs and outputs of the text model, for detect, point and grounded reasoning.

Values are fractions of the frame. Parameter names equal the checkpoint's keys under `model.region.`.
"""

import math

import torch
from torch import Tensor, nn

from pipeline.moondream.config import RegionConfig
from pipeline.moondream.vision import Mlp

# The reference maps a size bin b of 0..1023 to 2^(b / 1023 * 10 - 10): fractions from 1/1024 to 1.
MAX_SIZE_BIN, SIZE_OCTAVES = 1023, 10.0


class RegionModel(nn.Module):
    def __init__(self, config: RegionConfig) -> None:
        super().__init__()
        self.config = config
        self.coord_encoder = nn.Linear(config.coord_feat_dim, config.dim)
        self.coord_decoder = Mlp(config.dim, config.inner_dim, config.coord_out_dim)
        self.size_encoder = nn.Linear(config.size_feat_dim, config.dim)
        self.size_decoder = Mlp(config.dim, config.inner_dim, config.size_out_dim)
        self.coord_features = nn.Parameter(torch.zeros(1, config.coord_feat_dim // 2))
        self.size_features = nn.Parameter(torch.zeros(2, config.size_feat_dim // 2))

    def encode_coord(self, coord: Tensor) -> Tensor:
        """Coordinates (..., 1) -> embeddings (..., dim)."""
        return self.coord_encoder(fourier(coord, self.coord_features))

    def encode_size(self, size: Tensor) -> Tensor:
        """Widths and heights (..., 2) -> embeddings (..., dim)."""
        return self.size_encoder(fourier(size, self.size_features))

    def decode_coord(self, hidden: Tensor) -> Tensor:
        """Hidden states (N, dim) -> the likeliest coordinate of each, float32 (N,)."""
        return self.coord_decoder(hidden).argmax(-1).float() / self.config.coord_out_dim

    def decode_size(self, hidden: Tensor) -> Tensor:
        """Hidden states (N, dim) -> the likeliest width and height of each, float32 (N, 2)."""
        bins = self.size_decoder(hidden).unflatten(-1, (2, -1)).argmax(-1).float()  # (N, 2)
        return torch.exp2(bins / MAX_SIZE_BIN * SIZE_OCTAVES - SIZE_OCTAVES)


def fourier(values: Tensor, features: Tensor) -> Tensor:
    """Random Fourier features of values (..., k) with frequencies (k, f) -> (..., 2 f)."""
    angles = 2 * math.pi * values.to(features.dtype) @ features
    return torch.cat([angles.cos(), angles.sin()], dim=-1)
