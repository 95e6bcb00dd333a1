"""The rows of a grid as a picture: frames per second and latency against the number of frames described together.

Drawn with Pillow, three times as large and scaled down, which smooths the lines. Test:
pytest tests/test_benchmark_grid.py
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from benchmark.grid import Row

SCALE = 3
WIDTH, HEIGHT = 1280, 560
PANEL_WIDTH, PANEL_HEIGHT, PANEL_TOP = 510, 350, 100
PANEL_LEFTS = (80, 720)
INK, PALE, GRID = "#22252b", "#6b7280", "#e5e7eb"
# Told apart also by people who see few colours (Okabe and Ito).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#8c6d31", "#7f7f7f", "#b2182b")
Series = dict[int, list[tuple[float, float]]]  # by number of instances: slots in all, value


def draw(path: Path, title: str, rows: Sequence[Row], best: Row | None, bound_s: float | None) -> None:
    """Write the picture as PNG. `best` is ringed, `bound_s` is the line that latency should stay below."""
    picture = _Picture()
    picture.text((PANEL_LEFTS[0], 22), title, 20, INK)
    counts = sorted({row.instances for row in rows})
    rates: Series = {n: [(r.num_slots, r.frames_per_s) for r in rows if r.instances == n] for n in counts}
    latencies: Series = {n: [(r.num_slots, r.latency_p95_s) for r in rows if r.instances == n] for n in counts}
    _panel(picture, PANEL_LEFTS[0], "Frames per second", rates, best and (best.num_slots, best.frames_per_s))
    _panel(
        picture,
        PANEL_LEFTS[1],
        "Latency, 95th percentile, in seconds",
        latencies,
        best and (best.num_slots, best.latency_p95_s),
        is_log=True,
        bound=bound_s,
    )
    _legend(picture, counts)
    picture.save(path)


class _Picture:
    """A canvas in the units of the finished picture."""

    def __init__(self) -> None:
        self._image = Image.new("RGB", (WIDTH * SCALE, HEIGHT * SCALE), "white")
        self._draw = ImageDraw.Draw(self._image)

    def line(self, points: Sequence[tuple[float, float]], colour: str, width: float) -> None:
        scaled = [(x * SCALE, y * SCALE) for x, y in points]
        self._draw.line(scaled, fill=colour, width=round(width * SCALE), joint="curve")

    def dot(self, at: tuple[float, float], radius: float, colour: str, is_ring: bool = False) -> None:
        x, y, r = at[0] * SCALE, at[1] * SCALE, radius * SCALE
        box = (x - r, y - r, x + r, y + r)
        if is_ring:
            self._draw.ellipse(box, outline=colour, width=2 * SCALE)
        else:
            self._draw.ellipse(box, fill=colour)

    def text(self, at: tuple[float, float], text: str, size: int, colour: str, anchor: str = "la") -> None:
        font = ImageFont.load_default(size * SCALE)
        self._draw.text((at[0] * SCALE, at[1] * SCALE), text, fill=colour, font=font, anchor=anchor)

    def save(self, path: Path) -> None:
        self._image.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS).save(path, optimize=True)


def _panel(
    picture: _Picture,
    left: float,
    title: str,
    series: Series,
    best: tuple[float, float] | None,
    is_log: bool = False,
    bound: float | None = None,
) -> None:
    """Axes, ticks, a line per number of instances, all on a logarithmic x axis."""
    right, bottom = left + PANEL_WIDTH, PANEL_TOP + PANEL_HEIGHT
    values = [value for points in series.values() for _, value in points] + ([bound] if bound else [])
    y_ticks = log_ticks(min(values), max(values)) if is_log else linear_ticks(max(values))
    most_slots = max(slots for points in series.values() for slots, _ in points)
    x_ticks = [2**power for power in range(math.ceil(math.log2(most_slots)) + 1)]
    x_of = _axis(1, max(2, x_ticks[-1]), left + 14, right - 14, is_log=True)
    y_of = _axis(y_ticks[0], y_ticks[-1], bottom, PANEL_TOP + 6, is_log)

    picture.text((left, PANEL_TOP - 30), title, 15, INK)
    for tick in y_ticks:
        y = y_of(tick)
        picture.line([(left, y), (right, y)], GRID, 1)
        picture.text((left - 10, y), f"{tick:g}", 13, PALE, "rm")
    for tick in x_ticks:
        picture.line([(x_of(tick), bottom), (x_of(tick), bottom + 5)], PALE, 1)
        picture.text((x_of(tick), bottom + 10), str(tick), 13, PALE, "ma")
    picture.line([(left, bottom), (right, bottom)], PALE, 1.3)
    picture.text(((left + right) / 2, bottom + 32), "slots in all: instances x slots", 13, PALE, "ma")
    if bound:
        y = y_of(bound)
        for x in range(round(left), round(right), 12):
            picture.line([(x, y), (min(x + 7, right), y)], PALE, 1.3)
        picture.text((right, y + 5), f"bound {bound:.3g} s", 13, PALE, "ra")  # where latencies are above it
    for (_, points), colour in zip(series.items(), _colours(), strict=False):
        at = [(x_of(slots), y_of(value)) for slots, value in points]
        picture.line(at, colour, 2)
        for point in at:
            picture.dot(point, 4, colour)
    if best:
        picture.dot((x_of(best[0]), y_of(best[1])), 9, INK, is_ring=True)


def _legend(picture: _Picture, counts: Sequence[int]) -> None:
    x, y = PANEL_LEFTS[0], HEIGHT - 38
    step = min(130, (WIDTH - 2 * x) // (len(counts) + 1))
    for count, colour in zip(counts, _colours(), strict=False):
        picture.line([(x, y), (x + 26, y)], colour, 2)
        picture.dot((x + 13, y), 4, colour)
        picture.text(
            (x + 34, y), str(count) if step < 120 else f"{count} instance{'s' if count > 1 else ''}", 14, INK, "lm"
        )
        x += step
    picture.dot((x + 9, y), 9, INK, is_ring=True)
    picture.text((x + 26, y), "best", 14, INK, "lm")


def _colours() -> list[str]:
    return [*COLOURS, *COLOURS]


def _axis(low: float, high: float, start: float, end: float, is_log: bool) -> Callable[[float], float]:
    """Where on the picture a value lies."""
    scaled = math.log if is_log else float

    def place(value: float) -> float:
        return start + (scaled(value) - scaled(low)) / (scaled(high) - scaled(low)) * (end - start)

    return place


def linear_ticks(high: float) -> list[float]:
    """Round numbers from 0 to the first that is not below `high`, at most eight."""
    step = 10 ** math.floor(math.log10(high))
    step = next(size for size in (step / 5, step / 2, step, 2 * step) if high / size <= 7)
    return [index * step for index in range(math.ceil(high / step) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten, from the last that is not above `low` to the first not below `high`."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [float(f"{digit}e{power}") for power in powers for digit in (1, 2, 5)]
    first = max(index for index, tick in enumerate(ticks) if tick <= low)
    last = min(index for index, tick in enumerate(ticks) if tick >= high)
    return ticks[first : max(last, first + 1) + 1]
