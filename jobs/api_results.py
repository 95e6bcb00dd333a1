"""What a job has found out, over HTTP: frame results as they come, pictures, the video, exports, and events.

A reader of events holds nothing: each time the job changes, it reads from the store what came after the last event it
was sent, at its own pace. Test: pytest tests/test_api_results.py
"""

import asyncio
import re
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Header, Query, Response
from fastapi.responses import FileResponse, StreamingResponse
from fastapi.sse import format_sse_event
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import Receive, Scope, Send

from jobs.auth import Caller
from jobs.export import FORMATS, content_disposition, file_name
from jobs.http import Api, Asking, TheApi, count, json_answer, refusals
from jobs.record import FINISHED, Record
from jobs.schema import ExportFormat, FramePage
from jobs.views import FrameCounts, results_payload, status, summary
from pipeline.errors import FrameNotFound, JobNotFound, VideoNotKept

HEARTBEAT_S = 15.0  # proxies close a connection that is silent for longer
MIN_PAUSE_S = 0.1  # between two looks at a job that changes all the time
PAGE = 200  # frames that an event stream reads at a time
VIDEO_TYPES = {
    "mp4": "video/mp4",
    "webm": "video/webm",
    "matroska": "video/x-matroska",
    "avi": "video/x-msvideo",
    "mpegts": "video/mp2t",
    "flv": "video/x-flv",
    "asf": "video/x-ms-asf",
    "ogg": "video/ogg",
    "mpeg": "video/mpeg",
    "gif": "image/gif",
}
# Vary: after a log-out, or for another key, the browser asks again.
FOREVER = {"Cache-Control": "private, max-age=31536000, immutable", "Vary": "Authorization, Cookie"}
RANGE = re.compile(r"bytes=(?:(\d{1,15})-(\d{0,15})|-\d{1,15})", re.ASCII)
NO_STORE = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # the second: nginx passes events on at once


class StoredFile(FileResponse):
    """A file that may be deleted at any time. Of a Range that names no single part, it sends the whole, as HTTP allows:
    FileResponse would refuse with a plain text, and send parts in a form that no player asks for."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not _is_range(Headers(scope=scope).get("range", "")):
            scope = {**scope, "headers": list(scope["headers"])}
            del MutableHeaders(scope=scope)["range"]
        try:
            await super().__call__(scope, receive, send)
        except (FileNotFoundError, RuntimeError) as error:  # the second: it was gone before the answer began
            raise JobNotFound("Job ID not found in store. It was deleted just now.") from error


def _is_range(text: str) -> bool:
    match = RANGE.fullmatch(text)
    return match is not None and not (match[2] and int(match[2]) < int(match[1]))


def in_parts(*media_types: str) -> dict[int | str, dict[str, Any]]:
    """The answers with a StoredFile, for /docs."""
    content = {media_type: {} for media_type in media_types}
    return {
        200: {"content": content},
        206: {"description": "A part, by Range", "content": content},
        416: {"description": "No such part"},
    }


result_router = APIRouter(prefix="/api/jobs/{job_id}", tags=["results"])
Since = Annotated[str | None, Header(alias="If-None-Match")]
Part = Annotated[str | None, Header(alias="Range", description="one part, as in bytes=0-999")]  # StoredFile reads it


@result_router.get("/frames", response_model=FramePage, responses=refusals(404, 409, 422))
async def frames(
    job_id: str,
    api: TheApi,
    caller: Asking,
    after: Annotated[int, Query(ge=0, le=1 << 53, description="next_after of the page before")] = 0,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> Response:
    """Frame results in the order in which they were stored, also while the job runs."""
    return json_answer(await api.in_thread(_frames, api, api.own(job_id, caller), after, limit))


def _frames(api: Api, record: Record, after: int, limit: int) -> dict[str, Any]:
    with api.store.frames(record["job_id"]) as stored:
        found = stored.after(after, limit)
    next_after = found[-1]["seq"] if found else after
    is_finished = record["status"] in FINISHED and len(found) < limit
    return {"frames": found, "next_after": next_after, "is_finished": is_finished}


@result_router.get(
    "/events",
    response_class=StreamingResponse,
    responses={
        **refusals(404, 409, 422),
        200: {"description": "Events: frame, progress, done", "content": {"text/event-stream": {}}},
    },
)
async def events(
    job_id: str,
    api: TheApi,
    caller: Asking,
    after: Annotated[int, Query(ge=0, le=1 << 53)] = 0,
    last_event_id: Annotated[str, Header(alias="Last-Event-ID", pattern="^[0-9]{0,15}$")] = "",
) -> Response:
    """Follow a job. `frame` carries a frame result, its id is the result's seq; `progress` a summary; `done` the
    last summary, and then the stream ends. A reconnect goes on after Last-Event-ID."""
    api.own(job_id, caller)
    stream = _events(api, caller, job_id, int(last_event_id or after))
    return StreamingResponse(stream, media_type="text/event-stream", headers=NO_STORE)


@result_router.get(
    "/frames/{frame_idx}.jpg",
    response_class=FileResponse,
    responses={**refusals(404, 409, 422), **in_parts("image/jpeg"), 304: {"description": "Not modified"}},
)
async def picture(
    job_id: str, frame_idx: int, api: TheApi, caller: Asking, known: Since = None, part: Part = None
) -> Response:
    """A described frame, small."""
    api.own(job_id, caller)
    path = api.store.files.picture(job_id, frame_idx)
    etag = await api.in_thread(_etag, path)
    if etag is None:
        raise FrameNotFound(f"There is no picture of a frame {frame_idx} here. GET /api/jobs/{{id}}/frames lists them.")
    headers = {**FOREVER, "ETag": etag}
    if known == etag:
        return Response(status_code=304, headers=headers)
    return StoredFile(path, media_type="image/jpeg", headers=headers)


@result_router.get(
    "/video",
    response_class=FileResponse,
    responses={**refusals(404, 409, 422), **in_parts("video/*", "image/gif", "application/octet-stream")},
)
async def video(job_id: str, api: TheApi, caller: Asking, part: Part = None) -> Response:
    """The job's video, also in parts (Range)."""
    record, path = api.own(job_id, caller), api.store.files.video(job_id)
    if not await api.in_thread(path.exists):
        raise VideoNotKept("The job's video is not here. It comes with the download.")
    media_type = VIDEO_TYPES.get(record["container"] or "", "application/octet-stream")
    return StoredFile(path, media_type=media_type, content_disposition_type="inline", headers=FOREVER)


@result_router.get(
    "/export",
    response_class=StreamingResponse,
    responses={
        **refusals(404, 409, 422),
        200: {"content": {format.media_type.partition(";")[0]: {} for format in FORMATS.values()}},
        304: {"description": "Not modified"},
    },
)
async def export(
    job_id: str, api: TheApi, caller: Asking, format: ExportFormat = "json", known: Since = None
) -> Response:
    """All results as a file; of a job that is not finished, those so far."""
    record = api.own(job_id, caller)
    found, counts = await api.in_thread(_results, api, record)
    etag = f'"{record["status"]}-{counts.last_seq}-{format}"'
    headers = {"Cache-Control": "private, no-cache", "ETag": etag}
    if known == etag:
        return Response(status_code=304, headers=headers)
    name = file_name(record["request"]["video_url"], format, job_id)
    headers["Content-Disposition"] = content_disposition(name)
    results = results_payload(record, found) if record["status"] == "completed" else None
    shown = status(record, counts, api.store.live(job_id), api.store.index.queue_position(job_id), results)
    chunks = FORMATS[format].write(shown, found, _end_ms(record))
    return StreamingResponse(_written(api, chunks), media_type=FORMATS[format].media_type, headers=headers)


def _results(api: Api, record: Record) -> tuple[list[Any], FrameCounts]:
    with api.store.frames(record["job_id"]) as stored:
        return stored.results(), count(stored)


async def _written(api: Api, chunks: Iterator[bytes]) -> AsyncIterator[bytes]:
    while chunk := await api.in_thread(_next, chunks):
        yield chunk


def _next(chunks: Iterator[bytes]) -> bytes:
    return next(chunks, b"")


async def _events(api: Api, caller: Caller, job_id: str, seq: int) -> AsyncIterator[bytes]:
    shown: dict[str, Any] = {}
    while not api.is_stopping():
        version = api.store.changes.version(job_id)
        try:
            found, state = await api.in_thread(_news, api, caller, job_id, seq)
        except JobNotFound:  # deleted meanwhile
            return
        for result in found:
            yield format_sse_event(data_str=_text(result), event="frame", id=str(result["seq"]))
            seq = result["seq"]
        if len(found) == PAGE:
            continue
        if state["status"] in FINISHED:
            yield format_sse_event(data_str=_text(state), event="done")
            return
        if state != shown:
            shown = state
            yield format_sse_event(data_str=_text(state), event="progress")
        started_s = time.monotonic()
        await api.store.changes.wait(job_id, version, HEARTBEAT_S)
        if time.monotonic() - started_s >= HEARTBEAT_S:
            yield format_sse_event(comment="still here")
        await asyncio.sleep(MIN_PAUSE_S)


def _news(api: Api, caller: Caller, job_id: str, seq: int) -> tuple[list[Any], dict[str, Any]]:
    """What was stored after seq, and how the job was before that was read: a finished one has no more."""
    record, live = api.shown(api.store.get(job_id), caller), api.store.live(job_id)
    with api.store.frames(job_id) as stored:
        return stored.after(seq, PAGE), summary(record, count(stored), live)


def _text(value: Any) -> str:
    return orjson.dumps(value).decode()


def _etag(path: Path) -> str | None:
    try:
        of = path.stat()
    except OSError:
        return None
    return f'"{of.st_size:x}-{of.st_mtime_ns:x}"'


def _end_ms(record: Record) -> int | None:
    """When the last subtitle ends. Of a part of a video, or of a job that is not completed, nobody knows."""
    if (
        record["status"] != "completed"
        or record["is_truncated"]
        or record["request"]["end_s"]
        or not record["duration_s"]
    ):
        return None
    return round(record["duration_s"] * 1000)
