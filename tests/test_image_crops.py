"""How images are cut up. That the crops equal the reference's to the byte is test_verify's. Run: pytest tests/test_image_crops.py"""

import numpy as np
import pytest
from PIL import Image

from pipeline.errors import ImageUnreadable
from pipeline.moondream.config import MoondreamConfig, VisionConfig
from pipeline.moondream.image_crops import choose_tiling, make_crops

REAL = VisionConfig()
SMALL = VisionConfig(crop_size=112, overlap_margin=1, max_crops=1)


def noise(height_px: int, width_px: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height_px, width_px, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("height_px", "width_px", "tiling"),
    [
        (1, 1, (1, 1)),
        (360, 640, (1, 1)),  # 248 high inside the margins: below the window of 266
        (378, 5000, (1, 1)),  # exactly one window high
        (379, 5000, (1, 5)),  # 2 x 19 windows are too many: shrunk
        (480, 640, (3, 4)),
        (720, 1280, (2, 4)),  # rows 2 from the shape, columns 5 cut to 12 // 2... see choose_tiling
        (1080, 1920, (2, 4)),
        (1280, 720, (4, 2)),
        (500, 500, (3, 3)),
        (2160, 3840, (2, 4)),
        (1000, 1000, (3, 3)),
    ],
)
def test_the_tiling_follows_the_shape(height_px: int, width_px: int, tiling: tuple[int, int]) -> None:
    height_px, width_px = height_px - 2 * REAL.margin_px, width_px - 2 * REAL.margin_px

    assert choose_tiling(height_px, width_px, REAL.window_px, REAL.max_crops) == tiling
