"""The JSON API: submit, follow, list, cancel, retry and delete jobs. What a job has found out is in api_results.py.

A router for any FastAPI app. Routes are async and do what may wait in threads; submitting is one write to the store,
which wakes the worker. /docs shows all of it. Test: pytest tests/test_api.py
"""

import hashlib
import json
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Body, Depends, Header, Query, Request, Response
from fastapi.responses import FileResponse
from pydantic import BaseModel, Field

from jobs.api_results import Part, StoredFile, in_parts
from jobs.auth import Caller
from jobs.http import Api, Asking, Changing, TheApi, anybody, json_answer, refusals, submitted
from jobs.problems import problem
from jobs.record import IdempotencyKey, Record, Upload
from jobs.schema import (
    UPLOAD,
    Health,
    JobOptions,
    JobPage,
    JobRequest,
    JobStatus,
    JobStatusName,
    Ready,
    Submitted,
)
from jobs.uploads import Received, receive
from jobs.views import results_payload, status, summary
from jobs.webhooks import check_webhook_url
from pipeline.demo import SAMPLE_VIDEO
from pipeline.download import check_video_url
from pipeline.errors import InvalidOption, RateLimited, Unauthorized

SubmitKey = Annotated[str | None, Header(alias="Idempotency-Key", min_length=1, max_length=255)]


def _form_schema() -> dict[str, Any]:
    """JobOptions and the file. A form cannot say null: it leaves the field out."""
    schema = JobOptions.model_json_schema()
    for field in schema["properties"].values():
        for kind in field.pop("anyOf", ()):
            field |= kind if kind != {"type": "null"} else {}
        for name in [name for name in ("default", "examples") if field.get(name, 0) in (None, [None])]:
            del field[name]
    schema["properties"]["file"] = {
        "type": "string",
        "format": "binary",
        "description": "the video: MP4, MOV, WebM, MKV, AVI, MPEG-TS, MPEG, FLV, WMV, Ogg, IVF or GIF",
    }
    return {**schema, "title": "UploadForm", "required": ["file"]}


UPLOAD_FORM = {"required": True, "content": {"multipart/form-data": {"schema": _form_schema()}}}


class SubmitBody(JobOptions):
    """A JobRequest whose video_url may stand in the query instead."""

    video_url: str | None = Field(None, examples=["https://example.com/holiday.mp4"])


class Login(BaseModel):
    key: str = Field(max_length=1000)


router = APIRouter(prefix="/api", tags=["jobs"])


@router.post("/submit", status_code=202, response_model=Submitted, responses=refusals(422, 429, 507))
async def submit(
    request: Request,
    api: TheApi,
    caller: Changing,
    body: Annotated[SubmitBody | None, Body()] = None,
    video_url: Annotated[
        str | None, Query(min_length=1, max_length=8192, description="these three may also stand in the query")
    ] = None,
    target_fps: Annotated[float | None, Query(gt=0, le=1000)] = None,
    question: Annotated[str | None, Query(max_length=4000)] = None,
    key: SubmitKey = None,
) -> Response:
    """Submit a video by its URL. The answer comes at once; the job runs in the background."""
    in_query = {"video_url": video_url, "target_fps": target_fps, "question": question}
    asked = {name: value for name, value in in_query.items() if value is not None}
    asked |= body.model_dump(exclude_unset=True, exclude_none=True) if body else {}
    job = JobRequest.model_validate(asked)
    check_video_url(job.video_url, api.rules)
    return await _add(request, api, caller, job, key)


@router.post(
    "/upload",
    status_code=202,
    response_model=Submitted,
    responses=refusals(413, 415, 422, 429, 507),
    openapi_extra={"requestBody": UPLOAD_FORM},
)
async def upload(request: Request, api: TheApi, caller: Changing, key: SubmitKey = None) -> Response:
    """Submit a video file, with the same fields beside it."""
    if key is None:  # else it may be a repeat, which is answered in any case
        await api.in_thread(api.store.check_room, caller.owner)
    if not api.upload_slots.acquire(blocking=False):
        raise RateLimited("Too many uploads at once. Try again in a minute.", 60)
    try:
        received = await receive(request, api, caller, list(JobOptions.model_fields))
    finally:
        api.upload_slots.release()
    try:
        job = JobRequest.model_validate({**received.fields, "video_url": UPLOAD + received.name})
        return await _add(request, api, caller, job, key, received)
    finally:
        received.path.unlink(missing_ok=True)  # if it was not taken over


async def _add(
    request: Request, api: Api, caller: Caller, job: JobRequest, key: str | None, received: Received | None = None
) -> Response:
    asked = checked(job, api)
    upload = Upload(received.path, received.container) if received else None
    idempotency = idempotency_of(caller, key, asked, received.sha256 if received else "") if key else None
    job_id = await api.in_thread(api.store.add, asked, caller.owner, upload, idempotency)
    return submitted(request, api, caller, job_id)


@router.get("/status/{job_id}", response_model=JobStatus, responses=refusals(404, 409, 422))
async def get_status(
    job_id: str,
    api: TheApi,
    caller: Asking,
    include_results: Annotated[bool, Query(description="false leaves results_payload out")] = True,
) -> Response:
    """All about a job; once it is completed, with its results."""
    return json_answer(await api.in_thread(status_of, api, api.own(job_id, caller), include_results))


def status_of(api: Api, record: Record, include_results: bool) -> dict[str, Any]:
    """A JobStatus. Reads the disk."""
    job_id, results = record["job_id"], None
    if include_results and record["status"] == "completed":
        with api.store.frames(job_id) as frames:
            results = results_payload(record, frames.results())
    position = api.store.index.queue_position(job_id)
    shown = status(record, api.counts(record), api.store.live(job_id), position, results)
    if not include_results:
        del shown["results_payload"]
    return shown


@router.get("/jobs/list", response_model=JobPage, responses=refusals(422))
async def list_jobs(
    api: TheApi,
    caller: Asking,
    limit: Annotated[int, Query(ge=1, le=100)] = 10,
    status_filter: Annotated[JobStatusName | Literal[""], Query(description="only jobs in this status")] = "",
    cursor: Annotated[str, Query(pattern="^[0-9]{0,15}$", description="next_cursor of the page before")] = "",
) -> Response:
    """Your jobs, newest first; with an admin key, all."""
    return json_answer(await api.in_thread(page_of, api, caller, limit, status_filter or None, cursor))


def page_of(api: Api, caller: Caller, limit: int, status_filter: JobStatusName | None, cursor: str) -> dict[str, Any]:
    """A JobPage of what the caller may see."""
    owner = None if caller.is_admin else caller.owner
    page = api.store.page(owner, status_filter, int(cursor) if cursor else None, limit)
    return {
        "jobs": [summary(record, api.counts(record), api.store.live(record["job_id"])) for record in page.records],
        "total_count": page.total_count,
        "next_cursor": None if page.next_cursor is None else str(page.next_cursor),
    }


@router.post("/jobs/{job_id}/cancel", response_model=JobStatus, responses=refusals(404, 409, 422, 429, 507))
async def cancel(job_id: str, api: TheApi, caller: Changing) -> Response:
    """Cancel a job that waits or runs. What it described is kept; a repeat is harmless."""
    api.own(job_id, caller)
    record = await api.in_thread(api.store.cancel, job_id)
    return json_answer(await api.in_thread(status_of, api, api.shown(record, caller), True))


@router.post("/jobs/{job_id}/retry", response_model=JobStatus, responses=refusals(404, 409, 422, 429, 507))
async def retry(job_id: str, api: TheApi, caller: Changing) -> Response:
    """Queue a failed or canceled job again. It goes on after what it has; frames with an error are done again."""
    api.own(job_id, caller)
    record = await api.in_thread(api.store.retry, job_id)
    return json_answer(await api.in_thread(status_of, api, api.shown(record, caller), True))


@router.delete("/jobs/{job_id}", status_code=204, responses=refusals(404, 409, 422, 429, 507))
async def delete(job_id: str, api: TheApi, caller: Changing) -> Response:
    """Delete a job and all that is kept of it. A running one has to be canceled first."""
    api.own(job_id, caller)
    await api.in_thread(api.store.delete, job_id)
    return Response(status_code=204)


host_router = APIRouter(tags=["host"])
FOR_ALL: dict[str, Any] = {"security": []}  # asks for no key


@host_router.get("/api/health", response_model=Health, responses=refusals(), openapi_extra=FOR_ALL)
async def health() -> Response:
    """The server is alive."""
    return json_answer(Health().model_dump())


@host_router.get("/api/ready", response_model=Ready, responses=refusals(503), openapi_extra=FOR_ALL)
async def ready(api: TheApi) -> Response:
    """Jobs are being described, if perhaps by some instances only: or why not. Submitting is possible in any case."""
    model, problems = api.model(), api.problems()
    if problems or model is None:
        return problem(503, "not_ready", " ".join(problems), {"Retry-After": "5"})
    pool = api.pool()
    nodes = [vars(node) for node in pool.nodes().values()] if pool else []
    return json_answer({"status": "ready", "model": vars(model), "warnings": api.warnings(), "nodes": nodes})


@host_router.get("/api/sample.mp4", response_class=FileResponse, responses={**refusals(422), **in_parts("video/mp4")})
async def sample(caller: Asking, part: Part = None) -> Response:
    """A video to try: 25 seconds of coloured shapes, which the demo model knows."""
    return StoredFile(SAMPLE_VIDEO, media_type="video/mp4")


@host_router.get("/metrics", response_class=Response, responses=refusals())
async def metrics(api: TheApi, caller: Asking) -> Response:
    """For Prometheus; where keys are set, with an admin key."""
    if api.gate.has_keys and not caller.is_admin:
        raise Unauthorized("The metrics are for admin keys (setting ADMIN_KEYS).")
    text = await api.in_thread(api.metrics.text)
    return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


@host_router.post(
    "/api/session",
    status_code=204,
    responses=refusals(422, 429),
    openapi_extra=FOR_ALL,
    dependencies=[Depends(anybody)],
)
async def log_in(request: Request, api: TheApi, body: Login) -> Response:
    """Exchange a key for the page's session cookie, which serves where headers cannot be sent."""
    answer = Response(status_code=204)
    api.gate.set_session(request, answer, api.gate.session_cookie(api.gate.check_key(request, body.key)))
    return answer


@host_router.delete("/api/session", status_code=204, responses=refusals(), openapi_extra=FOR_ALL)
async def log_out(request: Request, api: TheApi) -> Response:
    answer = Response(status_code=204)
    api.gate.set_session(request, answer, "")
    return answer


def checked(job: JobRequest, api: Api) -> dict[str, Any]:
    """What is stored of a request, once its options fit this server. Raises InvalidOption, QuestionTooLong."""
    if job.max_tokens > api.max_tokens:
        if "max_tokens" in job.model_fields_set:
            raise InvalidOption(f"max_tokens: {api.max_tokens} is the most here (setting max_tokens).")
        job = job.model_copy(update={"max_tokens": api.max_tokens})
    if job.webhook_url:
        check_webhook_url(job.webhook_url, api.rules)
    api.check_task(job.task())
    return job.model_dump()


def idempotency_of(caller: Caller, key: str, asked: dict[str, Any], file_hash: str) -> IdempotencyKey:
    body = json.dumps([asked, file_hash], sort_keys=True)
    return IdempotencyKey(
        *(hashlib.sha256(text.encode(errors="replace")).hexdigest() for text in (f"{caller.owner} {key}", body))
    )
