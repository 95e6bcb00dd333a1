"""Describe a stream of frames: keep the engine's slots full, give the answers back in frame order.

At most LOOKAHEAD frames per slot are in flight, so memory is bounded by the batch and never by the video; answers that
wait for an earlier frame's are text only.
"""

import time
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol, cast

import numpy as np

from pipeline.errors import InputError
from pipeline.moondream.prompts import Task
from pipeline.results import FrameResult, RunStats
from pipeline.sampling import Frame
from pipeline.similarity import Repeat

if TYPE_CHECKING:  # the first loads torch, the second's pool imports this module
    from pipeline.lanes import Lane
    from pipeline.moondream.answer import Completed

LOOKAHEAD = 2
NO_IMAGE = np.zeros((0, 0, 3), np.uint8)


class Describer(Protocol):
    """What answers frames: an Engine, or a Lane of a pool of them."""

    @property
    def num_slots(self) -> int: ...
    @property
    def num_in_flight(self) -> int: ...
    @property
    def has_completed(self) -> bool: ...
    def submit(self, key: Hashable, image: np.ndarray, tasks: Sequence[Task], frame_idx: int = 0) -> None: ...
    def step(self) -> "list[Completed]": ...
    def cancel(self, key: Hashable) -> None: ...


def describe_frames(
    frames: Iterable[Frame | Repeat | FrameResult], engine: Describer, task: Task, run: RunStats
) -> Generator[FrameResult, None, None]:
    """Yield the result of each frame, in order, keeping count in `run`. A frame that fails is a result, too. A repeat
    has the description of its original, which must come before it, unless it brings that along. What comes as a result
    already keeps its place.

    Raises what `frames` raises, after the results of the frames before, and InvalidOption or QuestionTooLong for a task
    that no frame can answer.
    """
    with closing(describe_batches(frames, engine, task, run)) as batches:
        for batch in batches:
            yield from batch


def describe_batches(
    frames: Iterable[Frame | Repeat | FrameResult],
    engine: Describer,
    task: Task,
    run: RunStats,
    is_alone: Callable[[int], bool] | None = None,
) -> Generator[list[FrameResult], None, None]:
    """Like describe_frames, but yield the results that come together as one list, never an empty one.

    With a Lane, `is_alone` may say by frame_idx which frames share the pool with no other; the next frame is pulled
    when such a frame's result has been yielded.
    """
    in_order = _InOrder()
    try:
        yield from _batches(iter(frames), engine, task, run, is_alone, in_order)
    finally:
        for frame_idx in in_order.waiting:  # of a generator that is closed early: the engine stays usable
            engine.cancel(frame_idx)


class _InOrder:
    """Frames whose results have not been yielded: they are, in frame order, up to the first that has none yet."""

    def __init__(self) -> None:
        self.waiting: dict[Hashable, Frame | Repeat | FrameResult] = {}  # by frame_idx; of a frame without its image
        self._original: FrameResult | None = None  # the last result that is no repeat's

    def add(self, frame: Frame | Repeat | FrameResult) -> None:
        self.waiting[frame.frame_idx] = replace(frame, image=NO_IMAGE) if isinstance(frame, Frame) else frame

    def complete(self, completed: "Completed") -> None:
        frame = self.waiting[completed.key]
        assert isinstance(frame, Frame)
        self.waiting[completed.key] = _frame_result(completed, frame.timestamp_ms)

    def has_ready(self) -> bool:
        return bool(self.waiting) and not isinstance(next(iter(self.waiting.values())), Frame)

    def take_ready(self) -> Iterator[FrameResult]:
        while self.has_ready():
            frame_idx, entry = next(iter(self.waiting.items()))
            del self.waiting[frame_idx]
            if isinstance(entry, FrameResult):
                self._original = entry
                yield entry
            elif isinstance(entry, Repeat):
                yield _repeated(entry, self._original)


def _repeated(repeat: Repeat, original: FrameResult | None) -> FrameResult:
    """The result of a repeat. Its original is the last described frame, unless an earlier run described it."""
    idx = repeat.original_idx
    if repeat.description is not None:
        return FrameResult(repeat.frame_idx, repeat.timestamp_ms, repeat.description, reused_from_frame_idx=idx)
    assert original is not None and original.frame_idx == idx
    error_message = original.error_message
    if original.status == "error":
        error_message = f"This frame looks like frame {idx}, which could not be described. {error_message}"
    return FrameResult(
        repeat.frame_idx,
        repeat.timestamp_ms,
        original.description,
        original.status,
        error_message,
        finish_reason=original.finish_reason,
        reused_from_frame_idx=idx,
    )


def _batches(
    source: Iterator[Frame | Repeat | FrameResult],
    engine: Describer,
    task: Task,
    run: RunStats,
    is_alone: Callable[[int], bool] | None,
    in_order: _InOrder,
) -> Iterator[list[FrameResult]]:
    is_exhausted, broken_off, alone_idx = False, None, None
    while True:
        while (
            not is_exhausted
            and alone_idx not in in_order.waiting
            and engine.num_in_flight < LOOKAHEAD * engine.num_slots
        ):
            started_s = time.monotonic()
            try:
                frame = next(source, None)
            except InputError as error:  # the rest of the video is lost, but not what came before
                frame, broken_off = None, error
            run.timings.frame_extraction += time.monotonic() - started_s
            if frame is None:
                is_exhausted = True
            else:
                if isinstance(frame, Frame):
                    if is_alone is not None and is_alone(frame.frame_idx):
                        alone_idx = frame.frame_idx
                    _submit(engine, frame, task, is_alone=frame.frame_idx == alone_idx)
                    run.num_submitted += 1
                in_order.add(frame)
            if engine.has_completed or in_order.has_ready():  # while the frame was decoded: answers need not wait
                break
        if not in_order.waiting:
            if broken_off:
                raise broken_off
            return
        if not in_order.has_ready() or engine.has_completed:
            started_s = time.monotonic()
            for completed in engine.step():
                in_order.complete(completed)
            run.timings.distributed_frame_processing_map += time.monotonic() - started_s
        if ready := list(in_order.take_ready()):
            yield ready


def _submit(engine: Describer, frame: Frame, task: Task, *, is_alone: bool) -> None:
    if is_alone:
        lane = cast("Lane", engine)
        lane.submit(frame.frame_idx, frame.image, [task], frame.frame_idx, is_alone=True)
    else:
        engine.submit(frame.frame_idx, frame.image, [task], frame.frame_idx)


def _frame_result(completed: "Completed", timestamp_ms: int) -> FrameResult:
    assert isinstance(completed.key, int)
    if completed.error:
        return FrameResult(completed.key, timestamp_ms, "", "error", str(completed.error))
    answer = completed.answers[0]
    return FrameResult(
        completed.key,
        timestamp_ms,
        answer.text,
        image_encode_ms=answer.image_encode_ms,
        llm_inference_ms=answer.llm_inference_ms,
        total_ms=answer.total_ms,
        num_tokens=answer.num_tokens,
        finish_reason=answer.finish_reason,
    )
