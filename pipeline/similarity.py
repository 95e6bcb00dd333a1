"""Which frames look the same as the last described one, so that its answer holds for them, too.

Two pictures are compared as small ones, colour by colour, in blocks of 8 x 8 pixels: the block that differs most
decides, as a small thing that appears changes next to nothing of the whole. A frame is always compared with the one
that was described, never with the one before it: a slow drift adds up until it is seen. Knows no models or videos.

Check it against a folder of videos: python -m pipeline.similarity DIR
"""

import argparse
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.sampling import Frame

SIDE, BLOCK = 64, 8  # px
DEFAULT_THRESHOLD = 10.0  # a careful viewer calls what lies below "the same picture"
MAX_AGE_MS = 10_000  # one frame at least is described in so long


@dataclass(frozen=True)
class Repeat:
    """A sampled frame that looks like one before it."""

    frame_idx: int
    timestamp_ms: int
    original_idx: int  # frame_idx of the described one
    description: str | None  # of that one, if it was described in an earlier run


def signature(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """An RGB uint8 (H, W, 3) image as (SIDE, SIDE, 3)."""
    return cast(NDArray[np.uint8], cv2.resize(image, (SIDE, SIDE), interpolation=cv2.INTER_AREA))


def difference(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float:
    """How much two signatures differ, 0 to 255: the largest mean absolute difference of a block, wherever it lies, in
    one of the colours."""
    means = cv2.blur(
        cv2.absdiff(a, b).astype(np.float32), (BLOCK, BLOCK), anchor=(0, 0)
    )  # of the block beginning there
    return float(means[: SIDE - BLOCK + 1, : SIDE - BLOCK + 1].max())


@dataclass(frozen=True)
class _Original:
    """The last described frame."""

    frame_idx: int
    timestamp_ms: int
    signature: NDArray[np.uint8]
    description: str | None = None  # as Repeat.description


class Gate:
    """Decides, frame by frame, which ones are described. A threshold of 0 lets all through."""

    def __init__(self, threshold: float = DEFAULT_THRESHOLD) -> None:
        self._threshold = threshold
        self._original: _Original | None = None

    def repeat(self, frame: Frame) -> Repeat | None:
        """The frame as a repeat of the last described one; None if it is to be described itself."""
        if not self._threshold:
            return None
        original, small = self._original, signature(frame.image)
        if (
            original is not None
            and frame.timestamp_ms - original.timestamp_ms < MAX_AGE_MS
            and difference(original.signature, small) <= self._threshold
        ):
            return Repeat(frame.frame_idx, frame.timestamp_ms, original.frame_idx, original.description)
        self._original = _Original(frame.frame_idx, frame.timestamp_ms, small)
        return None

    def restore(self, frame: Frame, description: str) -> None:
        """Go on from a frame that an earlier run described."""
        if self._threshold:
            self._original = _Original(frame.frame_idx, frame.timestamp_ms, signature(frame.image), description)

    def sift(self, frames: Iterable[Frame]) -> Iterator[Frame | Repeat]:
        """All frames, repeats marked."""
        for frame in frames:
            yield self.repeat(frame) or frame


def main() -> int:
    """Check a folder of videos against its expected.json; exit 0 if every video comes out right."""
    from pipeline.similarity_check import check_folder  # which imports this module

    parser = argparse.ArgumentParser(prog="python -m pipeline.similarity", description=main.__doc__)
    parser.add_argument("folder", type=Path, help="holds videos and expected.json")
    return check_folder(parser.parse_args().folder)


if __name__ == "__main__":
    sys.exit(main())
