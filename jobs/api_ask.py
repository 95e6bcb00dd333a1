"""Other questions about the video of a job: about one frame, answered at once and not stored, or about all of its
frames, as a new job over the same video.

A frame is decoded again from the kept video, as its picture is too small to be asked about; the picture proves that it
is the same frame. Test: pytest tests/test_api_ask.py
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import anyio
import numpy as np
from fastapi import APIRouter, Body, Request, Response
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from jobs.api import SubmitKey, checked, idempotency_of
from jobs.auth import Caller, rate_key
from jobs.http import MAX_ASKED_BY_ONE, Api, Changing, TheApi, json_answer, refusals, submitted
from jobs.job_files import storing
from jobs.record import FINISHED, Record, Upload
from jobs.schema import FrameAnswer, JobRequest, Submitted
from pipeline.errors import Canceled, FrameNotFound, InvalidOption, JobRunning, NotReady, RateLimited, VideoNotKept
from pipeline.frames import sample_frames, seek_frame
from pipeline.moondream.prompts import DEFAULT_MAX_TOKENS, Query
from pipeline.pool import Lane, PoolClosed
from pipeline.thumbnail import thumbnail

MAX_WAITING = 64  # questions about single frames
NOT_KEPT = "The job's video is not here, so nothing more can be asked about it."


class Ask(BaseModel):
    """A question about a job's video."""

    model_config = ConfigDict(extra="forbid", str_strip_whitespace=True)

    question: str = Field(min_length=1, max_length=4000, examples=["How many people are there?"])
    frame_idx: int | None = Field(
        None,
        ge=0,
        le=1 << 53,
        strict=True,
        description="a described frame, answered at once; without it, all of them, as a new job",
    )


ask_router = APIRouter(prefix="/api/jobs/{job_id}", tags=["results"])


@ask_router.post(
    "/ask",
    status_code=202,
    response_model=Submitted,
    responses={
        **refusals(404, 409, 422, 429, 503, 507),
        200: {"model": FrameAnswer, "description": "The answer to a question about one frame; it is not stored"},
    },
)
async def ask(
    request: Request, job_id: str, api: TheApi, caller: Changing, body: Annotated[Ask, Body()], key: SubmitKey = None
) -> Response:
    """Ask something else about one described frame (200 with the answer), or, of a finished job, about all of its
    frames (202: a new job over the same video, with `source_job_id`)."""
    if body.frame_idx is not None:
        who = rate_key(request, caller)
        return json_answer(await ask_frame(api, caller, who, job_id, body.frame_idx, body.question))
    new_id = await api.in_thread(_ask_all, api, api.own(job_id, caller), caller, body.question, key)
    return submitted(request, api, caller, new_id)


async def ask_frame(api: Api, caller: Caller, who: str, job_id: str, frame_idx: int, question: str) -> dict[str, Any]:
    """A FrameAnswer. `who` is whom it counts for, as by rate_key. Raises JobNotFound, FrameNotFound, VideoNotKept,
    RateLimited, NotReady, QuestionTooLong, InvalidOption, ResultsDamaged, and what decoder and model raise."""
    asked = Ask(question=question, frame_idx=frame_idx)
    if asked.frame_idx is None:
        raise InvalidOption("frame_idx: say which frame the question is about.")
    record = api.own(job_id, caller)
    if api.asked[who] >= MAX_ASKED_BY_ONE or api.ask_limiter.statistics().tasks_waiting >= MAX_WAITING:
        raise RateLimited("Too many questions about single frames at once. Ask again when one is answered.", 10)
    api.asked[who] += 1
    try:
        return await anyio.to_thread.run_sync(_ask_frame, api, record, asked, limiter=api.ask_limiter)
    finally:
        api.asked[who] -= 1
        if not api.asked[who]:
            del api.asked[who]


def _ask_frame(api: Api, record: Record, asked: Ask) -> dict[str, Any]:
    job_id, frame_idx = record["job_id"], asked.frame_idx
    assert frame_idx is not None
    task = Query(asked.question, max_tokens=min(DEFAULT_MAX_TOKENS, api.max_tokens))
    api.check_task(task)
    pool = api.pool()
    if pool is None:
        raise NotReady(" ".join(api.problems()))

    def check() -> None:
        if api.is_stopping():
            raise Canceled("The server is stopping.")
        api.store.get(job_id)  # or JobNotFound: who deletes a job wants no more answers

    try:
        with api.store.frames(job_id) as frames:
            result = frames.get(frame_idx)
        if result is None:
            raise FrameNotFound(
                f"The job has no result for a frame {frame_idx}. GET /api/jobs/{{id}}/frames lists those it has."
            )
        with api.decode_slots:
            image = _image(api, job_id, frame_idx, result["timestamp_ms"], check)
        with pool.lane(check) as lane:
            text = _answer(lane, image, task)
    except (PoolClosed, Canceled):
        raise NotReady("The server is stopping. Ask again when it is back.") from None
    shown = {"job_id": job_id, "frame_idx": frame_idx, "timestamp_ms": result["timestamp_ms"]}
    return {**shown, "question": asked.question, "answer": text}


def _image(api: Api, job_id: str, frame_idx: int, timestamp_ms: int, check: Callable[[], None]) -> NDArray[np.uint8]:
    """A described frame at its full size, RGB uint8 (H, W, 3)."""
    video, picture = api.store.files.video(job_id), api.store.files.picture(job_id, frame_idx)
    if not video.exists():
        raise VideoNotKept(NOT_KEPT)
    found = seek_frame(video, timestamp_ms, api.decode_limits)
    if found is not None and _is_of(picture, found.image):
        return found.image
    # The file's index leads astray: decode all that comes before, as when the frame was described.
    for frame in sample_frames(
        video,
        1.0,
        start_s=timestamp_ms / 1000,
        end_s=(timestamp_ms + 1) / 1000,
        limits=api.decode_limits,
        on_progress=lambda time_s: check(),
    ):
        if frame.frame_idx == frame_idx:
            return frame.image
    raise FrameNotFound(f"The video of the job does not give frame {frame_idx} any more.")


def _is_of(picture: Path, image: NDArray[np.uint8]) -> bool:
    try:
        return picture.read_bytes() == thumbnail(image)
    except OSError:
        return False


def _answer(lane: Lane, image: NDArray[np.uint8], task: Query) -> str:
    lane.submit(0, image, [task])
    (completed,) = lane.step()
    if completed.error:
        raise completed.error
    return completed.answers[0].text


def _ask_all(api: Api, record: Record, caller: Caller, question: str, key: str | None) -> str:
    """Queue a job like an earlier one, but for the question, over the same video -> its id"""
    job_id = record["job_id"]
    if record["status"] not in FINISHED:
        raise JobRunning("The job is not finished. Ask about all of its frames when it is, or about one of them now.")
    max_tokens = min(record["request"]["max_tokens"], api.max_tokens)
    changed = {"question": question, "caption_length": None, "webhook_url": None, "max_tokens": max_tokens}
    job = JobRequest.model_validate({**record["request"], **changed, "source_job_id": job_id})
    asked = checked(job, api)
    idempotency = idempotency_of(caller, key, asked, "") if key else None
    if not idempotency:  # else it may be a repeat, which is answered in any case
        api.store.check_room(caller.owner)
    with storing():
        try:
            video = api.store.files.link_video(job_id)
        except FileNotFoundError:
            raise VideoNotKept(NOT_KEPT) from None
    try:
        return api.store.add(asked, caller.owner, Upload(video, record["container"] or ""), idempotency)
    finally:
        video.unlink(missing_ok=True)  # if it was not taken over
