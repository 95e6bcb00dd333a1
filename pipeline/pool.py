"""The pool of loaded model instances, fed from a fair queue of the frames of all jobs (lanes.py).

    pool = Pool(lambda: Engine(checkpoint, num_slots=8), num_instances=2)
    with pool.lane() as lane:  # one job's view of the pool; describe.py takes it for an engine
        for batch in describe_batches(frames, lane, task, run):
            ...

Each instance is a thread with an engine of its own; instances may share a checkpoint, since an engine only reads the
weights. Whatever ends the work of an engine, its frames are tried again, each alone, by another instance if one works:
one that fails alone, too, is an error about that frame. The instance gets a new engine, which answers a picture of ours
before it is given frames. After MAX_FAILURES in a row it is taken out, and tried again after pauses. An engine that is
isolated, in a process of its own (cluster.py), fails without harm to others: its frames are tried MAX_TRIES times, each
alone in some engine, while the others work on.

The pool knows nothing of videos, jobs or files, and does without torch until an engine is made.
"""

import gc
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, as_completed, wait
from itertools import islice
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from pipeline.errors import DescriberError, ModelError
from pipeline.lanes import FrameQueue, Lane, PoolClosed, QueuedFrame
from pipeline.moondream.prompts import Query
from pipeline.nodes import Node, NodeTally, Place

if TYPE_CHECKING:  # they load torch
    from pipeline.cluster import RemoteEngine
    from pipeline.moondream.answer import Completed
    from pipeline.moondream.engine import Engine

    PooledEngine = Engine | RemoteEngine

FIRST_PAUSE_S, MAX_PAUSE_S = 1.0, 30.0  # between two attempts at a new engine; doubling
MAX_TRIES = 3  # of a frame, by isolated engines
MAX_FAILURES = 3  # in a row, with no frame answered in between: then an instance is taken out
PROOF_IMAGE, PROOF_IDX = np.zeros((64, 64, 3), np.uint8), -1

logger = logging.getLogger(__name__)


class _Instance:
    """A thread and its engine. Others only read its numbers."""

    def __init__(
        self,
        number: int,
        make_engine: "Callable[[], PooledEngine]",
        queue: FrameQueue,
        tally: NodeTally,
        *,
        may_be_late: bool,
    ) -> None:
        self.number = number
        self.is_awaited = may_be_late  # has had no engine yet, and nobody minds
        self.place: Place | None = None  # of its engine, where that is not here
        self.made: Future[None] = Future()  # the first engine, or why there is none
        self.num_slots = 0
        self.prepare: Callable[[np.ndarray], Any] | None = None  # what engines make of an image, for any thread
        self.trouble: str | None = None  # why there is no engine now that may be given frames
        self.num_failures = 0  # since a frame was answered, or was to blame for one
        self.num_tokens = 0
        self._make_engine, self._queue, self._tally = make_engine, queue, tally
        self._frames: dict[QueuedFrame, None] = {}  # in the engine, in the order of submission
        self._step_started_s: float | None = None
        self._has_answered = False  # the engine of now, anything
        self._is_isolated = False  # the engine of now
        self._needs_pause, self._pause_s = False, FIRST_PAUSE_S
        self.thread = threading.Thread(target=self._run, name=f"instance {number}", daemon=True)
        self.thread.start()

    @property
    def is_working(self) -> bool:
        """Whether there is an engine that may be given frames."""
        return self.trouble is None and not self.is_awaited

    @property
    def num_frames(self) -> int:
        return len(self._frames)

    @property
    def step_s(self) -> float:
        started_s = self._step_started_s  # read once: it may be gone the next moment
        return 0.0 if started_s is None else time.monotonic() - started_s

    def _run(self) -> None:
        is_to_go_on = True
        while is_to_go_on and not self._queue.is_closed:
            try:
                is_to_go_on = self._work()
            except BaseException as error:  # it came while another was noted
                self.trouble, self._needs_pause = _first_line(error), True
                self._queue.set_working(self.number, False)

    def _work(self) -> bool:
        """Make an engine and feed it, until the queue is closed or anything fails -> whether to do so again."""
        try:
            if self.trouble is not None:
                self._recover()
                if self._queue.is_closed:
                    return False
            self._serve(self._new_engine())
            return False
        except BaseException as error:  # SystemExit, too: a thread that ends would keep its frames for ever
            if not self.made.done():
                self.made.set_exception(error)
                if not self.is_awaited:
                    return False
            if self._queue.is_closed:
                return False
            self._note_failure(error)
            return True

    def _note_failure(self, error: BaseException) -> None:
        was_working = self.is_working
        self.trouble, self._step_started_s, self.is_awaited = _first_line(error), None, False
        self.num_failures += 1
        self._needs_pause = not was_working or self.num_failures >= MAX_FAILURES
        self._queue.set_working(self.number, False)
        logger.error(
            "Instance %d failed with %d frames in its engine, for the %d. time in a row",
            self.number,
            self.num_frames,
            self.num_failures,
            exc_info=error,
        )

    def _recover(self) -> None:
        """Clear up after a failure. The engine is gone by now, with the exception that held it."""
        gc.collect()  # the new engine needs its memory
        self._give_back()
        if self._needs_pause and not self._queue.held_by(self.number):
            self._needs_pause = False
            logger.warning("Instance %d is tried again in %g s", self.number, self._pause_s)
            self._queue.wait_for_close(self._pause_s)
            self._pause_s = min(2 * self._pause_s, MAX_PAUSE_S)

    def _give_back(self) -> None:
        """Have the frames of a failed engine tried again, but keep one that had its second chance: it is to blame if
        the next engine works."""
        assert self.trouble is not None
        self._frames.clear()
        for frame in reversed(self._queue.held_by(self.number)):
            frame.first_failure, frame.failed_in = frame.first_failure or self.trouble, self.number
            frame.num_failures += 1
            if frame.num_failures < (MAX_TRIES if self._is_isolated else 2):
                self._queue.retry_alone(frame, is_isolated=self._is_isolated)
            elif self._is_isolated:
                self._end(frame)
            elif not self._has_answered:  # perhaps it is the engine that fails
                self._queue.retry_alone(frame)

    def _blame(self) -> None:
        """End the frame, if one is kept, that the last engine failed on, as this one works."""
        for frame in self._queue.held_by(self.number):
            self._end(frame)

    def _end(self, frame: QueuedFrame) -> None:
        from pipeline.moondream.answer import Completed

        message = (
            f"The model fails on this frame, also when it is alone ({frame.first_failure}). Leave the frame out, "
            "or look at this host's log."
        )
        self._finish(frame, Completed(frame, (), ModelError(message)))
        self.num_failures, self._needs_pause = 0, False  # a job of such frames must not keep others waiting

    def _new_engine(self) -> "PooledEngine":
        """An engine that may be given frames. After a failure, one that has answered a picture of ours."""
        self._has_answered = False
        engine = self._make_engine()
        if self.trouble is not None:
            self._step_started_s = time.monotonic()
            engine.submit(None, PROOF_IMAGE, [Query(max_tokens=1)], PROOF_IDX)
            while engine.num_in_flight:
                for completed in engine.step():
                    if completed.error:
                        raise completed.error
            self._step_started_s = None
            self._has_answered = True
            self._blame()
            logger.info("Instance %d works again", self.number)
        self.num_slots, self.prepare, self.place = engine.num_slots, engine.prepare, engine.place
        self.trouble, self.is_awaited, self._is_isolated = None, False, engine.place is not None
        self._queue.set_working(self.number, True)
        if not self.made.done():
            self.made.set_result(None)
        return engine

    def _serve(self, engine: "PooledEngine") -> None:
        """Feed the engine until the queue is closed. Whatever it raises, the engine has to be replaced."""
        while True:
            taken = self._queue.take(
                engine.num_wanted,
                is_patient=not self._frames,
                instance=self.number,
                only_new=engine.is_for_urgent_only,
            )
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
                self._has_answered, self.num_failures, self._pause_s = True, 0, FIRST_PAUSE_S
                self.num_tokens += sum(answer.num_tokens for answer in completed.answers)
                if self.place is not None:
                    self._tally.count(self.place.node)
                refusal = completed.error if completed.is_refused else None
                self._finish(cast(QueuedFrame, completed.key), refusal or completed)

    def _submit(self, engine: "PooledEngine", frame: QueuedFrame) -> None:
        try:
            engine.submit(frame, frame.image, frame.tasks, frame.frame_idx, is_urgent=frame.is_urgent)
        except DescriberError as error:
            self._finish(frame, error.with_traceback(None))  # which holds the engine

    def _finish(self, frame: QueuedFrame, outcome: "Completed | DescriberError | None" = None) -> None:
        """In this order: whoever has its result finds its slot free, and if the thread is killed in between, the frame
        is done again, not lost."""
        self._frames.pop(frame, None)
        if outcome is not None:
            frame.lane.deliver(frame, outcome)
        self._queue.finish(frame)


class Pool:
    """`num_instances` engines, each made in the thread that it belongs to, by make_engine() or, where that is several
    (for devices of their own), by one after the other of them; one instance of each, unless it is said.

    Raises what make_engine raises, when everything is cleaned up again. All that can be asked may be asked from any
    thread; close() ends it."""

    def __init__(
        self,
        make_engine: "Callable[[], PooledEngine] | Sequence[Callable[[], PooledEngine]]",
        num_instances: int | None = None,
        batch_deadline_s: float = 300.0,
        *,
        num_needed: int | None = None,
        on_close: Callable[[], None] = lambda: None,
    ) -> None:
        """num_needed: engines to wait for, if not for all; the others join when they can be made. on_close: what ends
        those that are being made."""
        makers = [make_engine] if callable(make_engine) else make_engine
        num_instances = len(makers) if num_instances is None else num_instances
        assert num_instances >= 1
        self._batch_deadline_s = batch_deadline_s
        self._queue, self._tally = FrameQueue(), NodeTally()
        self._on_close = on_close
        may_be_late = num_needed is not None
        self._instances = [
            _Instance(1 + i, makers[i % len(makers)], self._queue, self._tally, may_be_late=may_be_late)
            for i in range(num_instances)
        ]
        try:
            made = [instance.made for instance in self._instances]
            if num_needed is None:
                wait(made)  # before what one of them raises: their threads have ended then
            for future in islice(as_completed(made), num_needed):
                future.result()
        except BaseException:  # Ctrl-C, too
            self.close()
            raise

    def lane(self, check: Callable[[], None] | None = None, weight: int = 1) -> Lane:
        """A job's way into the pool, with so many frames at each of its turns. `check` is called while the job waits;
        what it raises ends the waiting.

        Raises PoolClosed."""
        if self._queue.is_closed:
            raise PoolClosed
        prepare = next((instance.prepare for instance in self._instances if instance.prepare), None)
        return Lane(self._queue, lambda: self.num_slots, check, weight, prepare)

    @property
    def num_slots(self) -> int:
        """The slots of all instances."""
        return sum(instance.num_slots for instance in self._instances)

    @property
    def num_working(self) -> int:
        """Instances with an engine that can be given frames."""
        return sum(instance.is_working for instance in self._instances)

    @property
    def num_busy_slots(self) -> int:
        """Slots in use, where each frame has one task."""
        return sum(min(instance.num_frames, instance.num_slots) for instance in self._instances)

    @property
    def num_waiting(self) -> int:
        """Frames that are in no engine yet."""
        return self._queue.num_waiting

    @property
    def num_tokens(self) -> int:
        """Tokens of all answers so far."""
        return sum(instance.num_tokens for instance in self._instances)

    def nodes(self) -> dict[str, Node]:
        """Of engines that are elsewhere, by the name of the node."""
        return self._tally.nodes(each.place for each in self._instances if each.place is not None and each.is_working)

    def longest_step_s(self) -> float:
        """How long the longest of the steps now running has lasted; 0 when idle."""
        return max(instance.step_s for instance in self._instances)

    def problems(self) -> list[str]:
        """What keeps the pool from working, for people; empty when all is well, or when some instances work and the
        others are being tried again: that is in warnings()."""
        stuck = [problem for instance in self._instances if (problem := self._stuck(instance))]
        return stuck if self.num_working else [*stuck, *self._troubles()]

    def warnings(self) -> list[str]:
        """Which instances do not work, while others do."""
        return [f"{trouble} The others go on." for trouble in self._troubles()] if self.num_working else []

    def _stuck(self, instance: _Instance) -> str | None:
        step_s = instance.step_s  # it changes meanwhile
        if step_s <= self._batch_deadline_s:
            return None
        return (
            f"Instance {instance.number} has worked on one batch for {step_s:.0f} s; "
            f"{self._batch_deadline_s:g} s is the most (setting batch_deadline_s)."
        )

    def _troubles(self) -> list[str]:
        return [told for instance in self._instances if (told := _told(instance))]

    def close(self, timeout_s: float = 10) -> None:
        """End the threads after their step; one that is stuck is left behind. Lanes raise PoolClosed from now on."""
        self._queue.close()
        self._on_close()
        ends_s = time.monotonic() + timeout_s
        for instance in self._instances:
            instance.thread.join(max(0.0, ends_s - time.monotonic()))
            if instance.thread.is_alive():
                logger.warning("Instance %d does not end: it is left behind", instance.number)


def _told(instance: _Instance) -> str | None:
    """What is wrong with an instance, for people."""
    trouble, num_failures = instance.trouble, instance.num_failures  # both change meanwhile
    if trouble is None:
        return None
    if num_failures < MAX_FAILURES:
        return f"Instance {instance.number} has no engine ({trouble}). It keeps trying to make one: see the log."
    return (
        f"Instance {instance.number} is taken out after {num_failures} failures in a row ({trouble}). "
        f"It is tried again every {MAX_PAUSE_S:g} s: see the log."
    )


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0].removesuffix(": ")
