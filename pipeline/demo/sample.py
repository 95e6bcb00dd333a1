"""Make the sample video and what is true in it: `python -m pipeline.demo.sample [FOLDER]`.

25 seconds: hard cuts between four scenes, one of them standing still for six seconds, and a star that wanders from cell
to cell, well inside one at each full second. `sample.json` says what the demo model should see at 1 frame per second.
"""

import argparse
import json
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from pipeline.demo.lessons import describe
from pipeline.demo.scenes import NORMAL_SIDES, SMALL_SIDES, Scene, Shape, draw_scene

WIDTH_PX, HEIGHT_PX, FPS, SEED = 640, 360, 24, 7
# Kind, colour, is_small, cell. The cells count row by row.
STILLS = (
    (5, "white", (("circle", "red", False, 0), ("square", "blue", True, 7))),
    (4, "gray", (("triangle", "yellow", False, 2), ("star", "pink", False, 3), ("circle", "green", True, 8))),
    (6, "beige gradient", (("square", "purple", False, 4), ("circle", "cyan", False, 6))),
)
MOVING_BACKGROUND, MOVING_STAR, STANDING = "black", ("star", "orange", False), ("square", "green", False, 1)
MOVING_CELLS = (3, 4, 5, 8, 7, 6)  # where the star is at each full second
LAST = (4, "white", (("star", "blue", False, 0), ("circle", "orange", True, 2), ("triangle", "red", False, 7)))
DESCRIPTION = "Drawn by pipeline/demo/sample.py: what each frame shows at 1 frame per second."


def shape_in(kind: str, color: str, is_small: bool, cell: int) -> Shape:
    """A shape in the middle of a cell, of the middle size."""
    low, high = SMALL_SIDES if is_small else NORMAL_SIDES
    row, column = divmod(cell, 3)
    x_px, y_px = (column + 0.5) * WIDTH_PX / 3, (row + 0.5) * HEIGHT_PX / 3
    return Shape(kind, color, is_small, cell, x_px, y_px, (low + high) / 2 * HEIGHT_PX)


def scene_of(background: str, shapes: list[Shape]) -> Scene:
    return Scene(WIDTH_PX, HEIGHT_PX, background, tuple(sorted(shapes, key=lambda shape: shape.cell)))


def moving_scene(time_s: float) -> Scene:
    """The scene with the wandering star, time_s after its start: it rests around each full second."""
    step = min(int(time_s), len(MOVING_CELLS) - 1)
    here, there = (shape_in(*MOVING_STAR, MOVING_CELLS[min(i, len(MOVING_CELLS) - 1)]) for i in (step, step + 1))
    way = np.clip((time_s - step - 0.2) / 0.6, 0, 1)
    way = way * way * (3 - 2 * way)  # gently off and to a stop
    x_px = here.center_x_px + (there.center_x_px - here.center_x_px) * way
    y_px = here.center_y_px + (there.center_y_px - here.center_y_px) * way
    cell = here.cell if way < 0.5 else there.cell
    star = Shape(here.kind, here.color, here.is_small, cell, x_px, y_px, here.side_px)
    return scene_of(MOVING_BACKGROUND, [star, shape_in(*STANDING)])


def frames() -> Iterator[tuple[Scene, np.ndarray]]:
    """Every frame of the video with its scene."""
    for seconds, background, shapes in STILLS:
        yield from _still(seconds, background, shapes)
    for i in range(len(MOVING_CELLS) * FPS):
        scene = moving_scene(i / FPS)
        yield scene, draw_scene(scene, np.random.default_rng(SEED), max_noise=0)
    yield from _still(*LAST)


def _still(
    seconds: int, background: str, shapes: tuple[tuple[str, str, bool, int], ...]
) -> Iterator[tuple[Scene, np.ndarray]]:
    scene = scene_of(background, [shape_in(*shape) for shape in shapes])
    image = draw_scene(scene, np.random.default_rng(SEED), max_noise=0)
    for _ in range(seconds * FPS):
        yield scene, image


def write_sample(folder: Path) -> None:
    """Write sample.mp4 (H.264, plays in browsers from its first bytes on) and sample.json."""
    truth = []
    with av.open(str(folder / "sample.mp4"), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=FPS, options={"crf": "20", "preset": "slow", "g": "48"})
        stream.width, stream.height, stream.pix_fmt, stream.time_base = WIDTH_PX, HEIGHT_PX, "yuv420p", Fraction(1, FPS)
        for index, (scene, image) in enumerate(frames()):
            if index % FPS == 0:
                truth.append({"timestamp_ms": index // FPS * 1000, "description": describe(scene)})
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts = index
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    text = json.dumps({"about": DESCRIPTION, "target_fps": 1, "frames": truth}, indent=1) + "\n"
    (folder / "sample.json").write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m pipeline.demo.sample", description=__doc__)
    parser.add_argument(
        "folder", type=Path, nargs="?", default=Path(__file__).parent, help="default: the package's own"
    )
    write_sample(parser.parse_args().folder)


if __name__ == "__main__":
    main()
