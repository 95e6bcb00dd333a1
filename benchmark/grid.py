"""The search for the best setting: which numbers of instances and slots are measured, and which of them is best.

Knows figures only; closed_loop.py measures them. Test: pytest tests/test_benchmark_grid.py
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

GAIN = 0.03  # less is none: runs of the same setting differ by as much
MAX_VAIN = 2  # settings in a row without a gain, then a direction is given up
INSTANCE_COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)


@dataclass(frozen=True)
class Row:
    """What one setting reached. A peak is that of the run; latency is from a frame's submission to its answer, waiting
    included."""

    instances: int
    slots: int  # of each instance
    frames_per_s: float
    tokens_per_s: float
    latency_p50_s: float
    latency_p95_s: float
    peak_memory_bytes: int
    utilisation: float | None  # of the device, 0 to 1; None where it cannot be read
    num_frames: int  # that count
    run_s: float

    @property
    def num_slots(self) -> int:
        return self.instances * self.slots


@dataclass(frozen=True)
class OutOfMemoryRow:
    """A setting that did not fit."""

    instances: int
    slots: int


AnyRow = Row | OutOfMemoryRow


def instance_counts(most: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, ... up to `most`, which is one of them."""
    return [*(count for count in INSTANCE_COUNTS if count < most), most]


class _Direction:
    """Settings of growing size: is it worth going on?"""

    def __init__(self) -> None:
        self._best, self._num_vain = 0.0, 0

    def goes_on(self, rate: float | None) -> bool:
        """After a setting that reached `rate`, or that did not fit (None)."""
        if rate is None:
            return False
        self._num_vain = 0 if rate > self._best * (1 + GAIN) else self._num_vain + 1
        self._best = max(self._best, rate)
        return self._num_vain < MAX_VAIN


def search(
    instance_counts: Sequence[int], slot_counts: Sequence[int], measure: Callable[[int, int], AnyRow]
) -> Iterator[AnyRow]:
    """Measure settings, for each number of instances with ever more slots, as long as that gains. Yields each row."""
    over_instances = _Direction()
    for instances in instance_counts:
        over_slots, rates = _Direction(), []
        for slots in slot_counts:
            row = measure(instances, slots)
            yield row
            rate = row.frames_per_s if isinstance(row, Row) else None
            rates += [] if rate is None else [rate]
            if not over_slots.goes_on(rate):
                break
        if not over_instances.goes_on(max(rates, default=None)):
            return


def best(rows: Sequence[Row]) -> Row | None:
    """The setting with the fewest slots, then instances, of those that are as fast as the fastest, but for noise."""
    fastest = max((row.frames_per_s for row in rows), default=0.0)
    as_fast = [row for row in rows if row.frames_per_s * (1 + GAIN) >= fastest]
    return min(as_fast, key=lambda row: (row.num_slots, row.instances), default=None)


def best_under_latency(rows: Sequence[Row], bound_s: float) -> Row | None:
    """The best setting of those by which 95 of 100 frames are answered within `bound_s`."""
    return best([row for row in rows if row.latency_p95_s <= bound_s])
