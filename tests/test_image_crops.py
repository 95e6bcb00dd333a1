"""How images are cut up. That crops equal the reference's to the byte is test_verify's business.

Run: pytest tests/test_image_crops.py
"""

import numpy as np
import pytest
from PIL import Image

from pipeline.errors import ImageUnreadable
from pipeline.moondream.config import VisionConfig
from pipeline.moondream.image_crops import choose_tiling, make_crops

REAL = VisionConfig()
SMALL = VisionConfig(crop_size=112, overlap_margin=1, max_crops=1)


def noise(height_px: int, width_px: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height_px, width_px, 3), dtype=np.uint8)


def resized(image: np.ndarray, height_px: int, width_px: int) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize((width_px, height_px), Image.Resampling.LANCZOS))


@pytest.mark.parametrize(
    ("height_px", "width_px", "tiling"),
    [
        (1, 1, (1, 1)),
        (360, 640, (1, 1)),  # less than a window high inside the margins
        (378, 5000, (1, 1)),  # exactly a window high
        (379, 5000, (1, 10)),  # 2 x 19 windows are too many: shrunk, and at least 1 row
        (480, 640, (2, 4)),
        (500, 500, (3, 3)),
        (720, 1280, (2, 4)),
        (1280, 720, (4, 2)),
        (1080, 1920, (2, 4)),
        (2160, 3840, (2, 4)),
        (400, 1500, (2, 6)),  # the shape asks for 2 x 7: the larger one gives way
        (1500, 400, (6, 2)),
    ],
)
def test_the_tiling_follows_the_shape(height_px: int, width_px: int, tiling: tuple[int, int]) -> None:
    inner = height_px - 2 * REAL.margin_px, width_px - 2 * REAL.margin_px

    assert choose_tiling(*inner, REAL.window_px, REAL.max_crops) == tiling


def test_a_small_image_is_one_crop_that_serves_as_both_views() -> None:
    image = noise(360, 640)

    crops = make_crops(image, REAL)

    assert (crops.tiling, crops.pixels.shape, crops.pixels.dtype) == ((1, 1), (1, 378, 378, 3), np.uint8)
    np.testing.assert_array_equal(crops.pixels[0], resized(image, 378, 378))


def test_the_global_crop_comes_first_and_then_the_tiles_row_by_row() -> None:
    image = noise(720, 1280)

    crops = make_crops(image, REAL)

    scaled = resized(image, 2 * 266 + 2 * 56, 4 * 266 + 2 * 56)
    assert (crops.tiling, crops.pixels.shape) == ((2, 4), (9, 378, 378, 3))
    np.testing.assert_array_equal(crops.pixels[0], resized(image, 378, 378))
    for index, tile in enumerate(crops.pixels[1:]):
        top, left = index // 4 * 266, index % 4 * 266
        np.testing.assert_array_equal(tile, scaled[top : top + 378, left : left + 378])


def test_the_last_tile_ends_where_the_image_ends() -> None:
    """A window and its two margins are exactly a crop: nothing is ever left to pad."""
    image = noise(500, 500)

    crops = make_crops(image, REAL)

    np.testing.assert_array_equal(crops.pixels[-1][-1, -1], resized(image, 3 * 266 + 112, 3 * 266 + 112)[-1, -1])


def test_neighbouring_tiles_overlap_by_both_margins() -> None:
    tiles = make_crops(noise(500, 500), REAL).pixels[1:]

    np.testing.assert_array_equal(tiles[0][:, -112:], tiles[1][:, :112])
    np.testing.assert_array_equal(tiles[0][-112:], tiles[3][:112])


@pytest.mark.parametrize("size", [(48, 64), (112, 112), (240, 320), (720, 1280), (1280, 720)])
def test_a_small_models_frames_are_one_crop(size: tuple[int, int]) -> None:
    crops = make_crops(noise(*size), SMALL)

    assert (crops.tiling, crops.pixels.shape) == ((1, 1), (1, 112, 112, 3))


def test_an_image_of_one_pixel_is_enough() -> None:
    crops = make_crops(np.full((1, 1, 3), 77, np.uint8), REAL)

    assert (crops.pixels == 77).all()


def test_views_that_are_not_contiguous_are_cut_alike() -> None:
    image = noise(400, 500)

    flipped = make_crops(image[:, ::-1], REAL)

    np.testing.assert_array_equal(flipped.pixels, make_crops(image[:, ::-1].copy(), REAL).pixels)


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((8, 8, 3), np.float32),
        np.zeros((8, 8, 3), np.uint16),
        np.zeros((8, 8, 4), np.uint8),
        np.zeros((8, 8), np.uint8),
        np.zeros((3, 8, 8), np.uint8),
        np.zeros((0, 8, 3), np.uint8),
        np.zeros((8, 0, 3), np.uint8),
    ],
    ids=lambda image: f"{image.dtype}{image.shape}",
)
def test_an_array_that_is_no_rgb_image_is_unreadable(image: np.ndarray) -> None:
    with pytest.raises(ImageUnreadable, match=r"RGB uint8 \(H, W, 3\)"):
        make_crops(image, REAL)
