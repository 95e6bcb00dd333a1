"""The pool of loaded model instances, fed from a fair queue of the frames of all jobs (lanes.py).

    pool = Pool(lambda: Engine(checkpoint, num_slots=8), num_instances=2)
    with pool.lane() as lane:  # one job's view of the pool; describe.py takes it for an engine
        for batch in describe_batches(frames, lane, task, run):
            ...

Each instance is a thread with an engine of its own; instances may share a checkpoint, since an engine only reads the
weights. An engine that raises is replaced, and its frames are tried again, each alone: one that fails alone, too, is an
error about that frame. The pool knows nothing of videos, jobs or files, and does without torch until an engine is made.
"""

import gc
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TYPE_CHECKING, cast

from pipeline.describe import LOOKAHEAD
from pipeline.errors import DescriberError, ModelError
from pipeline.lanes import FrameQueue, Lane, PoolClosed, QueuedFrame

if TYPE_CHECKING:  # they load torch
    from pipeline.moondream.answer import Completed
    from pipeline.moondream.engine import Engine

FIRST_PAUSE_S, MAX_PAUSE_S = 1.0, 30.0  # between two attempts at a new engine; doubling

logger = logging.getLogger(__name__)


class _Instance:
    """A thread and its engine. Others only read its numbers."""

    def __init__(self, number: int, make_engine: "Callable[[], Engine]", queue: FrameQueue) -> None:
        self.number = number
        self.made: Future[int] = Future()  # the first engine's num_slots, or why there is none
        self.trouble: str | None = None  # why there is no engine now
        self.num_tokens = 0
        self._make_engine, self._queue = make_engine, queue
        self._frames: dict[QueuedFrame, None] = {}  # in the engine, in the order of submission
        self._step_started_s: float | None = None
        self.thread = threading.Thread(target=self._run, name=f"instance {number}", daemon=True)
        self.thread.start()

    @property
    def num_frames(self) -> int:
        return len(self._frames)

    @property
    def step_s(self) -> float:
        started_s = self._step_started_s  # read once: it may be gone the next moment
        return 0.0 if started_s is None else time.monotonic() - started_s

    def _run(self) -> None:
        try:
            engine = self._make_engine()
        except BaseException as error:
            self.made.set_exception(error)
            return
        self.made.set_result(engine.num_slots)
        while engine is not None:
            try:
                self._serve(engine)
                return
            except Exception as error:
                logger.exception("Instance %d failed with %d frames in its engine", self.number, self.num_frames)
                failure = _first_line(error)
            # Outside the handler, whose exception holds the engine: the new one needs its memory.
            engine = None
            self.trouble, self._step_started_s = failure, None
            self._give_back(failure)
            engine = self._make_another()

    def _serve(self, engine: "Engine") -> None:
        """Feed the engine until the queue is closed. Whatever the engine raises, it has to be replaced."""
        while True:
            room = LOOKAHEAD * engine.num_slots - len(self._frames)
            taken = self._queue.take(room, is_patient=not self._frames)
            if taken is None:
                return
            self._frames.update(dict.fromkeys(taken))
            self._step_started_s = time.monotonic()
            for frame in taken:
                self._submit(engine, frame)
            for frame in [frame for frame in self._frames if frame.is_canceled]:
                engine.cancel(frame)
                self._finish(frame)
            all_completed = engine.step() if self._frames else ()
            self._step_started_s = None
            for completed in all_completed:
                self.num_tokens += sum(answer.num_tokens for answer in completed.answers)
                self._finish(cast(QueuedFrame, completed.key), completed)

    def _submit(self, engine: "Engine", frame: QueuedFrame) -> None:
        try:
            engine.submit(frame, frame.image, frame.tasks, frame.frame_idx)
        except DescriberError as error:
            self._finish(frame, error.with_traceback(None))  # which holds the engine

    def _finish(self, frame: QueuedFrame, outcome: "Completed | DescriberError | None" = None) -> None:
        del self._frames[frame]
        self._queue.finish(frame)
        if outcome is not None:
            frame.lane.deliver(frame, outcome)

    def _give_back(self, failure: str) -> None:
        """Have the frames of a failed engine tried again, or end those that had their second chance."""
        from pipeline.moondream.answer import Completed

        for frame in reversed(list(self._frames)):
            if frame.first_failure is None:
                frame.first_failure = failure
                del self._frames[frame]
                self._queue.retry_alone(frame)
            else:
                message = (
                    f"The model fails on this frame, also when it is alone ({frame.first_failure}). Leave the frame "
                    "out, or look at this host's log."
                )
                self._finish(frame, Completed(frame, (), ModelError(message)))

    def _make_another(self) -> "Engine | None":
        """A new engine, however long it takes; None if the pool is closed first."""
        pause_s = FIRST_PAUSE_S
        while not self._queue.is_closed:
            gc.collect()
            try:
                engine = self._make_engine()
                self.trouble = None
                return engine
            except Exception as error:
                logger.exception("Instance %d gets no new engine; next attempt in %g s", self.number, pause_s)
                self.trouble = _first_line(error)
            self._queue.wait_for_close(pause_s)
            pause_s = min(2 * pause_s, MAX_PAUSE_S)
        return None


class Pool:
    """`num_instances` engines, each made by make_engine() in the thread that it belongs to.

    Raises what make_engine raises, when everything is cleaned up again. All that can be asked may be asked from any
    thread; close() ends it."""

    def __init__(
        self, make_engine: "Callable[[], Engine]", num_instances: int = 1, batch_deadline_s: float = 300.0
    ) -> None:
        assert num_instances >= 1
        self._batch_deadline_s = batch_deadline_s
        self._queue = FrameQueue()
        self._instances = [_Instance(1 + i, make_engine, self._queue) for i in range(num_instances)]
        try:
            wait([instance.made for instance in self._instances])
            self._slots = [instance.made.result() for instance in self._instances]
        except BaseException:  # Ctrl-C, too
            self.close()
            raise

    def lane(self, check: Callable[[], None] | None = None) -> Lane:
        """A job's way into the pool. `check` is called while the job waits; what it raises ends the waiting.

        Raises PoolClosed."""
        if self._queue.is_closed:
            raise PoolClosed
        return Lane(self._queue, sum(self._slots), check)

    @property
    def num_busy_slots(self) -> int:
        """Slots in use, where each frame has one task."""
        return sum(min(i.num_frames, slots) for i, slots in zip(self._instances, self._slots, strict=True))

    @property
    def num_waiting(self) -> int:
        """Frames that are in no engine yet."""
        return self._queue.num_waiting

    @property
    def num_tokens(self) -> int:
        """Tokens of all answers so far."""
        return sum(instance.num_tokens for instance in self._instances)

    def longest_step_s(self) -> float:
        """How long the longest of the steps now running has lasted; 0 when idle."""
        return max(instance.step_s for instance in self._instances)

    def problems(self) -> list[str]:
        """What keeps the pool from working, for people; empty when all is well."""
        problems = []
        for instance in self._instances:
            step_s, trouble = instance.step_s, instance.trouble  # both change meanwhile
            if trouble is not None:
                problems.append(
                    f"Instance {instance.number} has no engine ({trouble}). It keeps trying to make one: see the log."
                )
            elif step_s > self._batch_deadline_s:
                problems.append(
                    f"Instance {instance.number} has worked on one batch for {step_s:.0f} s; "
                    f"{self._batch_deadline_s:g} s is the most (setting batch_deadline_s)."
                )
        return problems

    def close(self, timeout_s: float = 10) -> None:
        """End the threads after their step; one that is stuck is left behind. Lanes raise PoolClosed from now on."""
        self._queue.close()
        ends_s = time.monotonic() + timeout_s
        for instance in self._instances:
            instance.thread.join(max(0.0, ends_s - time.monotonic()))
            if instance.thread.is_alive():
                logger.warning("Instance %d does not end: it is left behind", instance.number)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
