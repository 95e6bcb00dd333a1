"""Describe a stream of frames: keep the engine's slots full, give the answers back in frame order.

At most LOOKAHEAD frames per slot are in flight, so memory is bounded by the batch and never by the video; answers that
wait for an earlier frame's are text only.
"""

import time
from collections.abc import Generator, Hashable, Iterable, Iterator

from pipeline.errors import InputError
from pipeline.moondream.answer import Completed
from pipeline.moondream.engine import Engine
from pipeline.moondream.prompts import Task
from pipeline.results import FrameResult, RunStats
from pipeline.sampling import Frame

LOOKAHEAD = 2


def describe_frames(
    frames: Iterable[Frame], engine: Engine, task: Task, run: RunStats
) -> Generator[FrameResult, None, None]:
    """Yield the result of each frame, in order, keeping count in `run`. A frame that fails is a result, too.

    Raises what `frames` raises, after the results of the frames before, and InvalidOption or QuestionTooLong for a task
    that no frame can answer.
    """
    in_order: dict[Hashable, tuple[int, FrameResult | None]] = {}  # frame_idx -> timestamp_ms, result; by frame
    try:
        yield from _described(iter(frames), engine, task, run, in_order)
    finally:
        for frame_idx in in_order:  # of a generator that is closed early: the engine stays usable
            engine.cancel(frame_idx)


def _described(
    source: Iterator[Frame],
    engine: Engine,
    task: Task,
    run: RunStats,
    in_order: dict[Hashable, tuple[int, FrameResult | None]],
) -> Iterator[FrameResult]:
    is_exhausted, broken_off = False, None
    while True:
        while not is_exhausted and engine.num_in_flight < LOOKAHEAD * engine.num_slots:
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
                engine.submit(frame.frame_idx, frame.image, [task], frame.frame_idx)
                in_order[frame.frame_idx] = (frame.timestamp_ms, None)
        if not in_order:
            if broken_off:
                raise broken_off
            return
        started_s = time.monotonic()
        for completed in engine.step():
            timestamp_ms, _ = in_order[completed.key]
            in_order[completed.key] = (timestamp_ms, _frame_result(completed, timestamp_ms))
        run.timings.distributed_frame_processing_map += time.monotonic() - started_s
        while in_order and (result := next(iter(in_order.values()))[1]) is not None:
            del in_order[result.frame_idx]
            yield result


def _frame_result(completed: Completed, timestamp_ms: int) -> FrameResult:
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
