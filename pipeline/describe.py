"""Describe a stream of frames: keep the engine's slots full, give the answers back in frame order.

At most LOOKAHEAD frames per slot are in flight, so memory is bounded by the batch and never by the video; answers that
wait for an earlier frame's are text only.
"""

import time
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Protocol, cast

import numpy as np

from pipeline.errors import InputError
from pipeline.moondream.prompts import Task
from pipeline.results import FrameResult, RunStats
from pipeline.sampling import Frame

if TYPE_CHECKING:  # the first loads torch, the second's pool imports this module
    from pipeline.lanes import Lane
    from pipeline.moondream.answer import Completed

LOOKAHEAD = 2


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
    frames: Iterable[Frame], engine: Describer, task: Task, run: RunStats
) -> Generator[FrameResult, None, None]:
    """Yield the result of each frame, in order, keeping count in `run`. A frame that fails is a result, too.

    Raises what `frames` raises, after the results of the frames before, and InvalidOption or QuestionTooLong for a task
    that no frame can answer.
    """
    with closing(describe_batches(frames, engine, task, run)) as batches:
        for batch in batches:
            yield from batch


def describe_batches(
    frames: Iterable[Frame],
    engine: Describer,
    task: Task,
    run: RunStats,
    is_alone: Callable[[int], bool] | None = None,
) -> Generator[list[FrameResult], None, None]:
    """Like describe_frames, but yield the results that come together as one list, never an empty one.

    With a Lane, `is_alone` may say by frame_idx which frames share the pool with no other; the next frame is pulled
    when such a frame's result has been yielded.
    """
    in_order: dict[Hashable, tuple[int, FrameResult | None]] = {}  # frame_idx -> timestamp_ms, result; by frame
    try:
        yield from _batches(iter(frames), engine, task, run, is_alone, in_order)
    finally:
        for frame_idx in in_order:  # of a generator that is closed early: the engine stays usable
            engine.cancel(frame_idx)


def _batches(
    source: Iterator[Frame],
    engine: Describer,
    task: Task,
    run: RunStats,
    is_alone: Callable[[int], bool] | None,
    in_order: dict[Hashable, tuple[int, FrameResult | None]],
) -> Iterator[list[FrameResult]]:
    is_exhausted, broken_off, alone_idx = False, None, None
    while True:
        while not is_exhausted and alone_idx not in in_order and engine.num_in_flight < LOOKAHEAD * engine.num_slots:
            started_s = time.monotonic()
            try:
                frame = next(source, None)
            except InputError as error:  # the rest of the video is lost, but not what came before
                frame, broken_off = None, error
            run.timings.frame_extraction += time.monotonic() - started_s
            if frame is None:
                is_exhausted = True
            else:
                run.num_submitted += 1
                if is_alone is not None and is_alone(frame.frame_idx):
                    alone_idx = frame.frame_idx
                    lane = cast("Lane", engine)
                    lane.submit(frame.frame_idx, frame.image, [task], frame.frame_idx, is_alone=True)
                else:
                    engine.submit(frame.frame_idx, frame.image, [task], frame.frame_idx)
                in_order[frame.frame_idx] = (frame.timestamp_ms, None)
            if engine.has_completed:  # while the frame was decoded: answers need not wait for the next one
                break
        if not in_order:
            if broken_off:
                raise broken_off
            return
        started_s = time.monotonic()
        for completed in engine.step():
            timestamp_ms, _ = in_order[completed.key]
            in_order[completed.key] = (timestamp_ms, _frame_result(completed, timestamp_ms))
        run.timings.distributed_frame_processing_map += time.monotonic() - started_s
        if ready := list(_take_ready(in_order)):
            yield ready


def _take_ready(in_order: dict[Hashable, tuple[int, FrameResult | None]]) -> Iterator[FrameResult]:
    """The results before the first frame that has none yet."""
    while in_order and (result := next(iter(in_order.values()))[1]) is not None:
        del in_order[result.frame_idx]
        yield result


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
