"""One setting under full load: a closed loop of frames through a pool of instances, all at the same time.

As many frames are in the pool as a job of the app keeps there, LOOKAHEAD (2) per slot, one new for each answer: no slot
waits for a frame, and crops are encoded ahead. Latency so contains the wait for a slot: about LOOKAHEAD times as long
as a frame is in one. No frame takes over another's answer, and no cache is asked. The first answers, one per slot, warm
up; the clock runs from there until two per slot and `min_s` are over, with all slots busy to the end. After `max_s`,
one answer per slot is enough.
"""

import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch

from benchmark.grid import OutOfMemoryRow, Row
from benchmark.hardware import num_cores, peak_rss_bytes, reset_peak_rss
from benchmark.phases import PhaseWatch
from pipeline.describe import LOOKAHEAD
from pipeline.errors import DescriberError, ModelError, OutOfMemory
from pipeline.lanes import Lane
from pipeline.moondream.capacity import Setting
from pipeline.moondream.checkpoint import Checkpoint
from pipeline.moondream.device import free_bytes, is_out_of_memory, out_of_memory
from pipeline.moondream.engine import Engine
from pipeline.moondream.instances import engine_makers
from pipeline.moondream.prompts import Task
from pipeline.pool import Pool


@dataclass(frozen=True)
class Load:
    """What every setting is measured with."""

    checkpoint: Checkpoint
    images: Sequence[np.ndarray]  # RGB uint8 (H, W, 3), submitted in turn, again from the first
    task: Task
    min_s: float
    max_s: float

    def is_enough(self, answers_per_slot: float, run_s: float) -> bool:
        return (answers_per_slot >= 2 and run_s >= self.min_s) or (answers_per_slot >= 1 and run_s >= self.max_s)


def measure(
    load: Load,
    instances: int,
    slots: int,
    watch: PhaseWatch | None = None,
) -> Row | OutOfMemoryRow:
    """Run a pool of this size under the load, perhaps watched. Raises what ends a frame, unless that is memory."""
    try:
        return _measure(load, instances, slots, watch)
    except DescriberError as error:
        if isinstance(error, OutOfMemory) or is_out_of_memory(error):  # an engine's own, or its pool's word for it
            return OutOfMemoryRow(instances, slots)
        raise
    finally:
        gc.collect()  # engines, caches and all
        if load.checkpoint.device.type == "cuda":
            torch.cuda.empty_cache()


def _measure(load: Load, instances: int, slots: int, watch: PhaseWatch | None) -> Row:
    checkpoint, context_len = load.checkpoint, load.checkpoint.config.text.max_context  # as much as the app gives
    # Each engine looks for itself whether its cache fits, and a CPU's memory is taken only when it is written.
    cache_bytes = instances * slots * context_len * checkpoint.kv_bytes_per_position
    if cache_bytes > free_bytes(checkpoint.device):
        raise out_of_memory(f"The cache of {instances} x {slots} slots", checkpoint.device, cache_bytes)
    reset_peak_memory(checkpoint.device)
    makers = engine_makers([checkpoint], [Setting(instances, slots, "to be measured")], context_len)
    pool = Pool([partial(_watched, make, watch) for make in makers], batch_deadline_s=math.inf)

    def check() -> None:
        """The pool mends itself; but a run in which it did is worth nothing, and one in which it cannot has no end."""
        for trouble in [*pool.problems(), *pool.warnings()]:
            raise ModelError(trouble)

    try:
        with pool.lane(check) as lane:
            loop = _Loop(lane, load)
            loop.run(until=lambda: loop.num_answers >= lane.num_slots)
            if watch:
                watch.start()
            loop.start_clock()
            loop.run(until=lambda: load.is_enough(loop.num_answers / lane.num_slots, loop.run_s))
            if watch:
                watch.stop()
    finally:
        pool.close(timeout_s=600)  # a step of a large batch may take minutes on a CPU, and shall not slow the next run
    latency_p50_s, latency_p95_s = np.percentile(loop.latencies_s, (50, 95))
    return Row(
        instances,
        slots,
        frames_per_s=loop.num_answers / loop.run_s,
        tokens_per_s=loop.num_tokens / loop.run_s,
        latency_p50_s=float(latency_p50_s),
        latency_p95_s=float(latency_p95_s),
        peak_memory_bytes=peak_memory_bytes(checkpoint.device),
        utilisation=loop.utilisation,
        num_frames=loop.num_answers,
        run_s=loop.run_s,
    )


def _watched(make_engine: Callable[[], Engine], watch: PhaseWatch | None) -> Engine:
    engine = make_engine()
    if watch:
        watch.watch(engine)
    return engine


@dataclass
class _Loop:
    """Keeps the lane full, and counts what comes out of it. Time stands still between two arrivals of answers, so that
    runs of equal answers, which come in waves, begin and end with a wave."""

    lane: Lane
    load: Load
    num_answers: int = 0
    num_tokens: int = 0
    latencies_s: list[float] = field(default_factory=list)
    _submitted_s: dict[int, float] = field(default_factory=dict)
    _next: int = 0
    _now_s: float = 0.0
    _started_s: float = 0.0
    _started_cpu_s: float = 0.0
    _cpu_s: float = 0.0
    _device_shares: list[float] = field(default_factory=list)

    @property
    def run_s(self) -> float:
        return self._now_s - self._started_s

    @property
    def utilisation(self) -> float | None:
        """A CPU: its time that this process took. CUDA: the mean of what the driver said when answers came."""
        if self.load.checkpoint.device.type == "cpu":
            return (self._cpu_s - self._started_cpu_s) / (self.run_s * (num_cores() or 1))
        return sum(self._device_shares) / len(self._device_shares) if self._device_shares else None

    def start_clock(self) -> None:
        """Forget the answers so far."""
        self.num_answers = self.num_tokens = 0
        self.latencies_s, self._device_shares = [], []
        self._started_s, self._started_cpu_s = self._now_s, self._cpu_s

    def run(self, until: Callable[[], bool]) -> None:
        while not until():
            while self.lane.num_in_flight < LOOKAHEAD * self.lane.num_slots:
                self._submitted_s[self._next] = time.monotonic()
                image = self.load.images[self._next % len(self.load.images)]
                self.lane.submit(self._next, image, [self.load.task], self._next)
                self._next += 1
            self._take_answers()

    def _take_answers(self) -> None:
        all_completed = self.lane.step()
        self._now_s, self._cpu_s = time.monotonic(), time.process_time()
        for completed in all_completed:
            if completed.error:
                raise completed.error
            assert isinstance(completed.key, int)
            self.num_answers += 1
            self.num_tokens += sum(answer.num_tokens for answer in completed.answers)
            self.latencies_s.append(self._now_s - self._submitted_s.pop(completed.key))
        share = cuda_utilisation(self.load.checkpoint.device)
        self._device_shares += [] if share is None else [share]


def cuda_utilisation(device: torch.device) -> float | None:
    """The share of the last moments in which the device computed; None where the driver's library is not here."""
    if device.type != "cuda":
        return None
    try:
        return torch.cuda.utilization(device) / 100
    except (ModuleNotFoundError, RuntimeError):  # no pynvml; a driver that does not tell
        return None


def reset_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        reset_peak_rss()


def peak_memory_bytes(device: torch.device) -> int:
    """CUDA: the most that tensors took, weights included. Else: the most that the process had resident."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_rss_bytes()
