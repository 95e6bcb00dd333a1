"""Jobs' ways into the pool: lanes, and the fair queue between them and the engines. No engine, no thread in here.

Lanes take turns, by weight, new ones every second turn. Test: pytest tests/test_lanes.py
"""

import threading
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import DescriberError
from pipeline.moondream.prompts import Task

if TYPE_CHECKING:  # it loads torch
    from pipeline.moondream.answer import Completed

NUM_FIRST = 5  # frames of a lane that go before those of older lanes: a preview, or the answer to a question
CHECK_S = 0.1  # between two looks at whether a waiting job has been canceled


class PoolClosed(Exception):
    """The pool was closed under a lane. Callers of the library never see it: who closes the pool ends the jobs."""


@dataclass(eq=False)
class QueuedFrame:
    """A frame on its way through the pool; it is its own key in an engine, as two lanes may use the same keys."""

    lane: "Lane"
    key: Hashable
    image: Any  # RGB uint8 (H, W, 3), or what the engines' prepare() made of it
    tasks: Sequence[Task]
    frame_idx: int = 0
    is_alone: bool = False  # nothing else may be in any engine beside it
    is_solo: bool = False  # nothing else may be in its engine beside it
    is_urgent: bool = False  # the first of a job that came while others ran, or a question: somebody waits
    is_canceled: bool = False
    num_failures: int = 0  # of engines, while the frame was in them
    first_failure: str | None = None  # what the first of them raised
    failed_in: int | None = None  # the instance of the last engine that failed with it


class FrameQueue:
    """The frames of all lanes, waiting and in flight. Lanes take turns, of `weight` frames each: no backlog starves
    another. Every second frame at most is the first of a new lane, so these do not starve the others either.

    A frame to be alone that comes to its turn holds up the others until the engines are empty. One that failed is left
    to another instance where one works. Instances are numbers here."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: dict[Lane, deque[QueuedFrame]] = {}  # none is empty; the first lane is next
        self._in_flight: dict[QueuedFrame, int] = {}  # and in which instance; in the order of taking
        self._working: set[int] = set()  # instances
        self._was_first = False  # the last frame that was taken was one of a lane's first
        self._is_closed = False

    @property
    def num_waiting(self) -> int:
        with self._changed:
            return sum(map(len, self._waiting.values()))

    @property
    def is_closed(self) -> bool:
        return self._is_closed

    def put(self, frame: QueuedFrame) -> None:
        """Raises PoolClosed."""
        with self._changed:
            if self._is_closed:
                raise PoolClosed
            self._waiting.setdefault(frame.lane, deque()).append(frame)
            self._changed.notify_all()

    def take(
        self, limit: int, is_patient: bool = False, instance: int = 1, only_new: bool = False
    ) -> list[QueuedFrame] | None:
        """Up to `limit` frames, in flight from now on, `only_new` ones of lanes that had none yet; a patient caller
        waits for the first. None if closed."""
        with self._changed:
            while not self._is_closed:
                taken: list[QueuedFrame] = []
                while len(taken) < limit and (frame := self._next(instance, only_new)):
                    taken.append(frame)
                if taken or not is_patient:
                    return taken
                self._changed.wait()
            return None

    def held_by(self, instance: int) -> list[QueuedFrame]:
        """What an instance has in flight, in the order of taking."""
        with self._changed:
            return [frame for frame, holder in self._in_flight.items() if holder == instance]

    def set_working(self, instance: int, is_working: bool) -> None:
        """Whether an instance can be left a frame that failed in another."""
        with self._changed:
            (self._working.add if is_working else self._working.discard)(instance)
            self._changed.notify_all()

    def finish(self, frame: QueuedFrame) -> None:
        """The frame has left its engine."""
        with self._changed:
            self._in_flight.pop(frame, None)
            self._changed.notify_all()

    def retry_alone(self, frame: QueuedFrame, *, is_isolated: bool = False) -> None:
        """The frame has left its engine and waits again, before the others of its lane: for a time when no engine holds
        another, or, where a failing engine does no harm to others, for an engine that holds no other."""
        with self._changed:
            self._in_flight.pop(frame, None)
            if not frame.is_canceled:
                frame.is_alone, frame.is_solo = frame.is_alone or not is_isolated, is_isolated
                self._waiting.setdefault(frame.lane, deque()).appendleft(frame)
            self._changed.notify_all()

    def cancel(self, frames: Iterable[QueuedFrame]) -> None:
        """Forget frames that wait. One in flight is so until its instance has taken it out of the engine."""
        with self._changed:
            for frame in frames:
                frame.is_canceled = True
            kept = {lane: deque(f for f in waiting if not f.is_canceled) for lane, waiting in self._waiting.items()}
            self._waiting = {lane: waiting for lane, waiting in kept.items() if waiting}
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def wait_for_close(self, timeout_s: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed, timeout_s)

    def _next(self, instance: int, only_new: bool) -> QueuedFrame | None:
        if only_new:
            lane = next((lane for lane in self._waiting if lane.num_taken == 0), None)
        else:
            lane = self._next_lane() if self._waiting else None
        if lane is None:
            return None
        waiting = self._waiting[lane]
        # A frame that is alone in flight is the only one there.
        if self._in_flight and (waiting[0].is_alone or next(iter(self._in_flight)).is_alone):
            return None
        if waiting[0].failed_in == instance and self._working - {instance}:
            return None
        mine = next((frame for frame, holder in self._in_flight.items() if holder == instance), None)
        if mine and (waiting[0].is_solo or mine.is_solo):
            return None
        frame = waiting.popleft()
        frame.is_urgent = lane.num_taken == 0 and any(other.lane is not lane for other in self._in_flight)
        self._was_first = lane.num_taken < NUM_FIRST and len(self._waiting) > 1
        lane.num_taken += 1
        lane.num_in_turn += 1
        if lane.num_in_turn >= lane.weight or not waiting:
            lane.num_in_turn = 0
            del self._waiting[lane]
            if waiting:
                self._waiting[lane] = waiting  # as the last one
        self._in_flight[frame] = instance
        return frame

    def _next_lane(self) -> "Lane":
        lanes = list(self._waiting)
        old = next((lane for lane in lanes if lane.num_taken >= NUM_FIRST), None)
        # One that has nothing yet first: where many are new, it would wait behind all of them.
        new = next((lane for lane in lanes if lane.num_taken == 0), None)
        new = new or next((lane for lane in lanes if lane.num_taken < NUM_FIRST), None)
        chosen = (old or new) if self._was_first else (new or old)
        assert chosen
        return chosen


class Lane:
    """One job's view of the pool: used like an Engine, by one thread. Closing it cancels what is in flight."""

    def __init__(
        self,
        queue: FrameQueue,
        count_slots: Callable[[], int],
        check: Callable[[], None] | None = None,
        weight: int = 1,
        prepare: Callable[[np.ndarray], Any] | None = None,
    ) -> None:
        """count_slots: of the pool, which may grow. weight: frames of a turn. prepare: what a frame goes through in the
        lane's thread, beside the model."""
        assert weight >= 1
        self.weight = weight
        self.num_taken = self.num_in_turn = 0  # by engines; the queue counts them
        self._queue, self._count_slots, self._check, self._prepare = queue, count_slots, check, prepare
        self._changed = threading.Condition()
        self._frames: dict[Hashable, QueuedFrame] = {}  # submitted, and neither returned by step() nor canceled
        self._completed: dict[Hashable, Completed] = {}
        self._refused: dict[Hashable, DescriberError] = {}

    @property
    def num_slots(self) -> int:
        return max(1, self._count_slots())

    @property
    def num_in_flight(self) -> int:
        """Frames submitted and not yet returned by step()."""
        return len(self._frames)

    @property
    def has_completed(self) -> bool:
        """Whether step() would not wait."""
        return bool(self._completed or self._refused)

    def submit(
        self, key: Hashable, image: np.ndarray, tasks: Sequence[Task], frame_idx: int = 0, *, is_alone: bool = False
    ) -> None:
        """Queue the tasks of an image, as Engine.submit does; what that raises, step() does. Raises PoolClosed.

        A frame that `is_alone` shares the pool with no other: if the process dies of it, it is known which it was."""
        assert tasks and key not in self._frames
        prepared: Any = image
        if self._prepare is not None:
            with suppress(Exception):  # the engine will raise it, too, where it becomes an error about the frame
                prepared = self._prepare(image)
        frame = QueuedFrame(self, key, prepared, tasks, frame_idx, is_alone)
        with self._changed:
            self._frames[key] = frame
        self._queue.put(frame)

    def step(self) -> list["Completed"]:
        """Wait for frames to be done and return all that are; none if nothing is in flight.

        Raises what an engine's submit() raised for a frame, what `check` raises (it is called now, and every CHECK_S
        while waiting), or PoolClosed."""
        while True:
            if self._check is not None:
                self._check()
            with self._changed:
                if self._frames and not self.has_completed:
                    self._changed.wait(CHECK_S)
                if self._completed or not self._frames:
                    completed, self._completed = self._completed, {}
                    for key in completed:
                        del self._frames[key]
                    return list(completed.values())
                for key, error in self._refused.items():
                    del self._frames[key], self._refused[key]
                    raise error
            if self._queue.is_closed:
                raise PoolClosed

    def cancel(self, key: Hashable) -> None:
        """Forget a frame. Its engine does so before its next step."""
        self._cancel([key])

    def close(self) -> None:
        """Cancel all frames."""
        self._cancel(list(self._frames))

    def deliver(self, frame: QueuedFrame, outcome: "Completed | DescriberError") -> None:
        """Take in, from an instance's thread, how a frame ended. A canceled one is nobody's."""
        with self._changed:
            if self._frames.get(frame.key) is frame:
                if isinstance(outcome, DescriberError):
                    self._refused[frame.key] = outcome
                else:
                    self._completed[frame.key] = replace(outcome, key=frame.key)
                self._changed.notify_all()

    def _cancel(self, keys: Iterable[Hashable]) -> None:
        with self._changed:
            canceled = [self._frames.pop(key) for key in keys if key in self._frames]
            for frame in canceled:
                self._completed.pop(frame.key, None)
                self._refused.pop(frame.key, None)
        self._queue.cancel(canceled)

    def __enter__(self) -> "Lane":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
