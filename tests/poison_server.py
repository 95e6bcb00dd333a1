"""A server without HTTP that certain pictures kill, started again each time by a supervisor: as a device's driver does.

    python tests/poison_server.py DATA_DIR INDEX ...    works all jobs off, however many starts that takes

A picture as write_video's frames of such an index, in the engine at a step, ends the process by SIGKILL. The supervisor
loads torch and the model once, and each start is a fork of it. It prints how many there were.
"""

import os
import signal
import sys
from collections.abc import Hashable, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import torch

from jobs.job_run import RunOptions
from jobs.job_store import JobStore
from jobs.worker import Worker
from pipeline.moondream.answer import Completed
from pipeline.moondream.checkpoint import Checkpoint, load_checkpoint
from pipeline.moondream.engine import Engine
from pipeline.moondream.image_crops import Crops
from pipeline.moondream.prompts import Task
from pipeline.pool import Pool
from pipeline.results import ModelName

MAX_STARTS, MAX_FAILURES_IN_ROW, NUM_JOBS = 12, 3, 2
POISON_WIDTH = 64  # wider pictures are harmless, so that a second job's are


class Poison(Crops):
    """Of a picture that kills."""


class PoisonedEngine(Engine):
    def __init__(self, checkpoint: Checkpoint, poisonous: set[int]) -> None:
        super().__init__(checkpoint, num_slots=2)
        self.poison = set[Hashable]()
        prepare = self.prepare

        def prepare_poison(image: np.ndarray) -> Crops:
            crops = prepare(image)
            is_poison = image.shape[1] <= POISON_WIDTH and round(image.mean() / 3) in poisonous
            return Poison(crops.pixels, crops.tiling) if is_poison else crops

        self.prepare = prepare_poison

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
        if isinstance(image, Poison):
            self.poison.add(key)

    def step(self) -> list[Completed]:
        if self.poison:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().step()


def work(data_dir: Path, checkpoint: Checkpoint, poisonous: set[int]) -> None:
    """One start: until no job waits or runs."""
    with closing(JobStore(data_dir)) as store, closing(Pool(lambda: PoisonedEngine(checkpoint, poisonous))) as pool:
        store.recover()
        options = RunOptions(max_failures_in_row=MAX_FAILURES_IN_ROW)
        worker = Worker(store, pool, ModelName("demo", None, "cpu", "float32"), options, max_running_jobs=NUM_JOBS)
        worker.start()
        while store.index.count(None, "submitted") or store.index.count(None, "processing"):
            signal.sigtimedwait([], 0.02)
        worker.stop()


def main() -> int:
    data_dir, poisonous = Path(sys.argv[1]), set(map(int, sys.argv[2:]))
    torch.set_num_threads(1)  # a fork has no other threads
    checkpoint = load_checkpoint("demo", device="cpu")
    for num_starts in range(1, MAX_STARTS + 1):
        child = os.fork()
        if not child:
            work(data_dir, checkpoint, poisonous)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if not status:
            print(num_starts)
            return 0
        assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
    return 1


if __name__ == "__main__":
    sys.exit(main())
