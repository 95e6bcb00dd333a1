"""Check which frames of a folder of clips are described, against its expected.json: python -m pipeline.similarity DIR

expected.json maps a file name to must_keep_ms (a frame is described at that time, or within one sampling interval
after it), at_least and at_most (described frames at 5 per second, in all).
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import InputError
from pipeline.frames import sample_frames
from pipeline.similarity import MAX_AGE_MS, Gate, Repeat, difference, signature

TARGET_FPS = 5.0
NUM_SHOWN = 12


@dataclass(frozen=True)
class Kept:
    """A frame that is described, and why."""

    timestamp_ms: int
    why: str

    def __str__(self) -> str:
        return f"{self.timestamp_ms} ms ({self.why})"


def check_folder(folder: Path) -> int:
    """Print a line per clip and a JSON summary; return the exit code, 0 if every clip comes out right."""
    expected = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
    wrong = []
    for name, expectation in expected.items():
        try:
            kept = list(_kept(folder / name))
            finding = _finding([frame.timestamp_ms for frame in kept], expectation)
        except InputError as error:
            kept, finding = [], f"{type(error).__name__}: {error}"
        more = f", and {len(kept) - NUM_SHOWN} more" if len(kept) > NUM_SHOWN else ""
        shown = ", ".join(map(str, kept[:NUM_SHOWN])) + more
        print(f"{name}: {f'WRONG: {finding}' if finding else 'ok'}; {len(kept)} described: {shown}", flush=True)
        if finding:
            wrong.append(name)
    print(json.dumps({"clips": len(expected), "ok": len(expected) - len(wrong), "wrong": wrong}))
    return 1 if wrong else 0


def _kept(video: Path) -> Iterator[Kept]:
    gate, last, last_ms = Gate(), None, 0
    for frame in sample_frames(video, TARGET_FPS):
        if isinstance(gate.repeat(frame), Repeat):
            continue
        small = signature(frame.image)
        yield Kept(frame.timestamp_ms, _reason(last, small, frame.timestamp_ms - last_ms))
        last, last_ms = small, frame.timestamp_ms


def _reason(last: NDArray[np.uint8] | None, small: NDArray[np.uint8], age_ms: int) -> str:
    if last is None:
        return "the first"
    if age_ms >= MAX_AGE_MS:
        return f"{age_ms / 1000:g} s after the last"
    return f"differs by {difference(last, small):.1f}"


def _finding(kept_ms: list[int], expectation: dict[str, Any]) -> str | None:
    interval_ms = 1000 / TARGET_FPS
    for wanted_ms in expectation.get("must_keep_ms", ()):
        if not any(wanted_ms <= ms < wanted_ms + interval_ms for ms in kept_ms):
            return f"nothing is described at {wanted_ms} ms"
    if len(kept_ms) < expectation.get("at_least", 0):
        return f"only {len(kept_ms)} are described, {expectation['at_least']} are to be"
    if len(kept_ms) > expectation.get("at_most", len(kept_ms)):
        return f"{len(kept_ms)} are described, {expectation['at_most']} are the most"
    return None
