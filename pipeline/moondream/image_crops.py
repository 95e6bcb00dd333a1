"""An image becomes crops: one global view, and a grid of overlapping tiles at a finer scale.

Plain NumPy and Pillow, no torch, so that it can run beside the model on other cores. Follows the tiling of the
reference implementation to the pixel; the golden vectors hold the hashes of its crops.
"""

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

from pipeline.errors import ImageUnreadable
from pipeline.moondream.config import VisionConfig


@dataclass(frozen=True)
class Crops:
    """The crops of one image. `pixels` is uint8 (n, crop_size, crop_size, 3): the global crop, then the tiles row by
    row. A (1, 1) tiling has only n = 1: its one tile and the global crop are the same picture."""

    pixels: np.ndarray
    tiling: tuple[int, int]


def choose_tiling(height_px: int, width_px: int, window_px: int, max_crops: int) -> tuple[int, int]:
    """How many rows and columns of windows cover an area, at most max_crops where its shape allows it."""
    if height_px <= window_px or width_px <= window_px:
        return 1, 1
    min_rows, min_columns = math.ceil(height_px / window_px), math.ceil(width_px / window_px)
    if min_rows * min_columns > max_crops:
        shrink = math.sqrt(max_crops / (min_rows * min_columns))
        return max(1, math.floor(min_rows * shrink)), max(1, math.floor(min_columns * shrink))
    rows = max(math.floor(math.sqrt(max_crops * height_px / width_px)), min_rows)
    columns = max(math.floor(math.sqrt(max_crops * width_px / height_px)), min_columns)
    if rows * columns > max_crops:
        if columns > rows:
            columns = math.floor(max_crops / rows)
        else:
            rows = math.floor(max_crops / columns)
    return max(1, rows), max(1, columns)


def make_crops(image: np.ndarray, config: VisionConfig) -> Crops:
    """Cut an RGB uint8 image (H, W, 3) into Crops. Raises ImageUnreadable for any other array."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ImageUnreadable(f"An image must be RGB uint8 (H, W, 3); this one is {image.dtype} {image.shape}.")
    margin, window, size = config.margin_px, config.window_px, config.crop_size
    rows, columns = choose_tiling(image.shape[0] - 2 * margin, image.shape[1] - 2 * margin, window, config.max_crops)
    picture = Image.fromarray(image)
    crops = [_resize(picture, size, size)]
    if (rows, columns) != (1, 1):
        scaled = _resize(picture, rows * window + 2 * margin, columns * window + 2 * margin)
        crops += [
            scaled[i * window : i * window + size, j * window : j * window + size]
            for i in range(rows)
            for j in range(columns)
        ]
    return Crops(np.stack(crops), (rows, columns))


def _resize(picture: Image.Image, height_px: int, width_px: int) -> np.ndarray:
    return np.asarray(picture.resize((width_px, height_px), Image.Resampling.LANCZOS))
