"""Generated scenes: one to four coloured shapes in the nine cells of a frame, and the picture of them.

Knows nothing of language (lessons.py) or of the model. Everything follows from the random generator passed in.
"""

import math
from dataclasses import dataclass

import cv2
import numpy as np

SHAPES = ("circle", "square", "triangle", "star")
COLORS = {
    "red": (215, 30, 35),
    "orange": (245, 130, 20),
    "yellow": (245, 225, 40),
    "green": (35, 150, 60),
    "cyan": (50, 205, 225),
    "blue": (35, 70, 215),
    "purple": (125, 40, 165),
    "pink": (245, 130, 190),
}
# Both ends of the background, RGB; a plain one has two equal ends.
BACKGROUNDS = {
    "white": ((248, 248, 248), (248, 248, 248)),
    "gray": ((128, 128, 128), (128, 128, 128)),
    "black": ((14, 14, 14), (14, 14, 14)),
    "beige": ((222, 204, 170), (222, 204, 170)),
    "gray gradient": ((70, 70, 70), (195, 195, 195)),
    "beige gradient": ((160, 130, 95), (245, 234, 210)),
}
POSITIONS = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")
# An object's side as a fraction of the frame's short side.
SMALL_SIDES, NORMAL_SIDES = (0.14, 0.18), (0.26, 0.31)
LANDSCAPE_ASPECTS, PORTRAIT_ASPECT = (4 / 3, 21 / 9), 9 / 16
CELL_MARGIN = 0.01  # of the short side, kept free along each edge of a cell
COLOR_JITTER = 9
SUBPIXEL_BITS = 4  # cv2 draws at 1/16 pixel


@dataclass(frozen=True)
class Shape:
    """One object. `cell` counts row by row from the top left; centre and side are in pixels of its scene."""

    kind: str
    color: str
    is_small: bool
    cell: int
    center_x_px: float
    center_y_px: float
    side_px: float

    @property
    def position(self) -> str:
        return POSITIONS[self.cell]

    @property
    def outline(self) -> np.ndarray:
        """Its corners (or 64 points of a circle), float64 (n, 2) in pixels."""
        return UNIT_OUTLINES[self.kind] * self.side_px + (self.center_x_px, self.center_y_px)


@dataclass(frozen=True)
class Scene:
    """What a frame shows. `shapes` are in reading order: by cell, row by row."""

    width_px: int
    height_px: int
    background: str
    shapes: tuple[Shape, ...]

    def box(self, shape: Shape) -> tuple[float, float, float, float]:
        """x_min, y_min, x_max, y_max of a shape as fractions of the frame."""
        (x_min, y_min), (x_max, y_max) = shape.outline.min(axis=0), shape.outline.max(axis=0)
        return x_min / self.width_px, y_min / self.height_px, x_max / self.width_px, y_max / self.height_px


def _polygon(radii: list[float], num_points: int, start_degrees: float) -> np.ndarray:
    angles = np.radians(start_degrees) + np.arange(num_points) * 2 * math.pi / num_points
    radius = np.resize(radii, num_points)
    points = np.stack([radius * np.cos(angles), radius * np.sin(angles)], axis=1)
    low, high = points.min(axis=0), points.max(axis=0)
    return (points - (low + high) / 2) / (high - low).max()  # longest side 1, box centred at 0


UNIT_OUTLINES = {
    "circle": _polygon([1.0], 64, 0),
    "square": _polygon([1.0], 4, 45),
    "triangle": _polygon([1.0], 3, -90),
    "star": _polygon([1.0, 0.42], 10, -90),
}


def random_scene(rng: np.random.Generator, height_range: tuple[int, int] = (240, 360)) -> Scene:
    """Draw a scene whose short side lies in height_range: 4:3 to 21:9, or (1 in 8) 9:16."""
    short_px = int(rng.integers(height_range[0], height_range[1] + 1))
    if rng.random() < 1 / 8:
        width_px, height_px = short_px, round(short_px / PORTRAIT_ASPECT)
    else:
        width_px, height_px = round(short_px * rng.uniform(*LANDSCAPE_ASPECTS)), short_px
    cells = sorted(rng.choice(len(POSITIONS), size=rng.integers(1, 5), replace=False))
    shapes = tuple(random_shape(rng, width_px, height_px, int(cell)) for cell in cells)
    return Scene(width_px, height_px, str(rng.choice(list(BACKGROUNDS))), shapes)


def random_shape(rng: np.random.Generator, width_px: int, height_px: int, cell: int) -> Shape:
    """Draw a shape that lies well inside its cell."""
    is_small = bool(rng.random() < 0.4)
    short_px = min(width_px, height_px)
    side_px = short_px * rng.uniform(*(SMALL_SIDES if is_small else NORMAL_SIDES))
    reach_px = side_px / 2 + CELL_MARGIN * short_px
    row, column = divmod(cell, 3)
    return Shape(
        kind=str(rng.choice(SHAPES)),
        color=str(rng.choice(list(COLORS))),
        is_small=is_small,
        cell=cell,
        center_x_px=rng.uniform(column * width_px / 3 + reach_px, (column + 1) * width_px / 3 - reach_px),
        center_y_px=rng.uniform(row * height_px / 3 + reach_px, (row + 1) * height_px / 3 - reach_px),
        side_px=side_px,
    )


def draw_scene(
    scene: Scene, rng: np.random.Generator, max_noise: float = 7.0, size_px: tuple[int, int] | None = None
) -> np.ndarray:
    """Paint a scene as RGB uint8 (height, width, 3), with small variations of colour, and noise on every third.

    `size_px`, width and height, squeezes it into another frame: much faster than painting it in full and resizing.
    """
    size_px = size_px or (scene.width_px, scene.height_px)
    image = _background(scene, rng, size_px)
    scale = np.array(size_px) / (scene.width_px, scene.height_px)
    for shape in scene.shapes:
        color = np.clip(np.array(COLORS[shape.color]) + rng.integers(-COLOR_JITTER, COLOR_JITTER + 1, 3), 0, 255)
        points = np.round((shape.outline * scale - 0.5) * (1 << SUBPIXEL_BITS)).astype(np.int32)
        cv2.fillPoly(image, [points], color.tolist(), cv2.LINE_AA, SUBPIXEL_BITS)
    if max_noise > 0 and rng.random() < 1 / 3:
        cv2.setRNGSeed(int(rng.integers(1 << 31)))  # OpenCV draws from a generator of its own
        noise = np.empty(image.shape, np.int16)
        cv2.randn(noise, np.zeros(3), np.full(3, rng.uniform(1, max_noise)))
        image = cv2.add(image, noise, dtype=cv2.CV_8U)
    return image


def compress(image: np.ndarray, quality: int) -> np.ndarray:
    """What JPEG at a quality of 0-100 leaves of an RGB image: stands in for a video codec, which is slower."""
    coded = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    decoded = cv2.imdecode(coded, cv2.IMREAD_COLOR)
    assert decoded is not None
    return cv2.cvtColor(decoded, cv2.COLOR_BGR2RGB)


def _background(scene: Scene, rng: np.random.Generator, size_px: tuple[int, int]) -> np.ndarray:
    ends = np.array(BACKGROUNDS[scene.background], np.float32) + rng.uniform(-6, 6, 3)
    if rng.random() < 0.5:
        ends = ends[::-1]
    is_vertical = rng.random() < 0.5
    steps = np.linspace(0, 1, size_px[1] if is_vertical else size_px[0], dtype=np.float32)[:, None]
    ramp = np.clip(ends[0] + (ends[1] - ends[0]) * steps, 0, 255).astype(np.uint8)  # (length, 3)
    ramp = ramp[:, None] if is_vertical else ramp[None]
    return cv2.resize(ramp, size_px, interpolation=cv2.INTER_NEAREST)
