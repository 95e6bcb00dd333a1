"""What the tests of the pool share: engines that tell what they are given, and fail on demand."""

import threading
import time
import weakref
from collections.abc import Callable, Hashable, Sequence

import numpy as np

from pipeline.describe import describe_batches, describe_frames
from pipeline.moondream.answer import Completed
from pipeline.moondream.checkpoint import Checkpoint
from pipeline.moondream.engine import Engine
from pipeline.moondream.image_crops import Crops
from pipeline.moondream.prompts import Query, Task
from pipeline.pool import Pool
from pipeline.results import FrameResult, RunStats
from pipeline.sampling import Frame

QUERY = Query(max_tokens=8)
DEVICE_ERROR = "CUDA error: an illegal memory access\nwas encountered"


def frames(count: int, seed: int = 0) -> list[Frame]:
    rng = np.random.default_rng(seed)
    return [Frame(index, 40 * index, rng.integers(0, 256, (48, 64, 3), np.uint8)) for index in range(count)]


def told(results: Sequence[FrameResult]) -> list[tuple[int, str]]:
    return [(result.frame_idx, result.description) for result in results]


def alone_with_an_engine(demo: Checkpoint, of: Sequence[Frame]) -> list[tuple[int, str]]:
    return told(list(describe_frames(of, Engine(demo, 1), QUERY, RunStats())))


def patience(seconds: float = 60) -> Callable[[], None]:
    """A check that ends a test that would hang."""
    ends_s = time.monotonic() + seconds

    def check() -> None:
        assert time.monotonic() < ends_s, "nothing comes"

    return check


class Watch:
    """What the engines of a pool are told, and how they fail: `fails` sees the frames of an engine before a step."""

    def __init__(self, checkpoint: Checkpoint, num_slots: int = 2) -> None:
        self.checkpoint, self.num_slots = checkpoint, num_slots
        self.engines: list[weakref.ref[Engine]] = []
        self.submitted: list[int] = []
        self.num_prepared = 0  # of these
        self.steps: list[set[int]] = []  # the frames in all engines, at the beginning of each step
        self.in_flight: dict[Hashable, int] = {}  # in all engines
        self.is_slow_to_begin = False
        self.fails: Callable[[set[int]], bool] = lambda in_engine: False
        self.failure: Callable[[], Exception] = lambda: RuntimeError(DEVICE_ERROR)
        self.has_begun, self.may_go_on = threading.Event(), threading.Event()
        self.may_go_on.set()

    def make_engine(self) -> Engine:
        engine = WatchedEngine(self)
        self.engines.append(weakref.ref(engine))
        return engine


class WatchedEngine(Engine):
    def __init__(self, watch: Watch) -> None:
        super().__init__(watch.checkpoint, watch.num_slots)
        self.watch = watch
        self.frame_idxs: dict[Hashable, int] = {}

    def submit(
        self,
        key: Hashable,
        image: np.ndarray | Crops,
        tasks: Sequence[Task],
        frame_idx: int = 0,
        *,
        has_trace: bool = False,
        is_urgent: bool = False,
    ) -> None:
        super().submit(key, image, tasks, frame_idx, has_trace=has_trace, is_urgent=is_urgent)
        self.watch.submitted.append(frame_idx)
        self.watch.num_prepared += isinstance(image, Crops)
        self.watch.in_flight[key] = self.frame_idxs[key] = frame_idx

    def step(self) -> list[Completed]:
        self.watch.has_begun.set()
        assert self.watch.may_go_on.wait(60)
        self.watch.steps.append(set(self.watch.in_flight.copy().values()))
        if self.watch.fails(set(self.frame_idxs.values())):
            for key in self.frame_idxs:
                del self.watch.in_flight[key]
            raise self.watch.failure()
        completed = super().step()
        if self.watch.is_slow_to_begin:
            self._admission_s = 100.0
        return completed

    def cancel(self, key: Hashable) -> None:  # the engine's own way of forgetting a completed image, too
        super().cancel(key)
        self.frame_idxs.pop(key, None)
        self.watch.in_flight.pop(key, None)


def describe(pool: Pool, of: Sequence[Frame], is_alone: Callable[[int], bool] | None = None) -> list[FrameResult]:
    with pool.lane(patience()) as lane:
        batches = list(describe_batches(of, lane, QUERY, RunStats(), is_alone))
    assert all(batches)
    return [result for batch in batches for result in batch]


def instance_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("instance ")]
