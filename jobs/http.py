"""What the API's routes share: errors as problem+json, answers as JSON, work off the event loop, and who asks.

HTTP's numbers for the errors of pipeline/errors.py stand here and nowhere else.
"""

import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from threading import BoundedSemaphore
from typing import Annotated, Any, TypeVar

import anyio
import orjson
from anyio import CapacityLimiter
from fastapi import Depends, FastAPI, Request, Response
from fastapi.exception_handlers import http_exception_handler
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.routing import iter_route_contexts
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection
from starlette.routing import Match

from jobs.auth import SESSION_COOKIE, Caller, Gate, RateLimit, rate_key
from jobs.doors import route_path
from jobs.frame_store import FrameStore
from jobs.job_store import JobStore
from jobs.metrics import Metrics
from jobs.problems import problem
from jobs.record import Record
from jobs.schema import Problem, Submitted
from jobs.views import FrameCounts, stored_counts
from pipeline.errors import (
    AccessError,
    CrossSite,
    DescriberError,
    ForeignHost,
    FrameNotFound,
    IdempotencyMismatch,
    InputError,
    InvalidOption,
    JobError,
    JobNotFound,
    QueueFull,
    RateLimited,
    StorageFull,
    Unauthorized,
    UnexpectedFailure,
    UnsupportedUrl,
    VideoNotKept,
    VideoTooLarge,
    VideoUnreadable,
)
from pipeline.moondream.prompts import Task
from pipeline.pool import Pool
from pipeline.results import ModelName
from pipeline.sampling import DecodeLimits
from pipeline.urls import UrlRules

OURS = ("/api/", "/metrics", "/docs", "/openapi.json")  # the paths of our routes
MAX_UPLOADS = 16  # at a time: each may bring max_video_bytes
MAX_ASKED, MAX_ASKED_BY_ONE = 16, 4  # questions about single frames that are in the works at a time
MAX_FRAMES_DECODED = 2  # of these; each may take a decoder's max_memory_bytes
NUM_THREADS = 32  # our own: Gradio's events may hold all of anyio's 40
HTTP_STATUS: dict[type[DescriberError], int] = {  # the nearest ancestor counts
    InputError: 422,
    UnsupportedUrl: 400,
    VideoTooLarge: 413,
    VideoUnreadable: 415,
    JobError: 409,
    JobNotFound: 404,
    FrameNotFound: 404,
    VideoNotKept: 404,
    QueueFull: 429,
    RateLimited: 429,
    StorageFull: 507,
    IdempotencyMismatch: 422,
    AccessError: 403,
    Unauthorized: 401,
    CrossSite: 403,
    ForeignHost: 400,
    DescriberError: 503,
}
WHEN = {  # what the numbers mean, for /docs
    400: "The URL may not be followed, or the request is for another host.",
    401: "No valid key came along.",
    403: "A page of another site sent this.",
    404: "There is no such job, or it is not yours.",
    409: "The job's state does not allow this.",
    413: "Too large.",
    415: "The file is no video.",
    422: "A field is out of range; the message names it.",
    429: "Too much at once. Retry-After says when to come back.",
    503: "Not now; the message says why.",
    507: "This host has no room for more.",
}

UNEXPECTED = "Something failed that should not have. The server's log tells more."

logger = logging.getLogger(__name__)
Result = TypeVar("Result")


@dataclass(frozen=True)
class Api:
    """What the routes work with."""

    store: JobStore
    gate: Gate
    metrics: Metrics
    rules: UrlRules
    rate_limit: RateLimit
    upload_limit: RateLimit  # of bytes
    decode_limits: DecodeLimits
    max_tokens: int
    model: Callable[[], ModelName | None]  # None: not loaded yet
    pool: Callable[[], Pool | None]  # likewise
    problems: Callable[[], list[str]]  # why jobs do not move; empty: ready
    warnings: Callable[[], list[str]]  # what is wrong although they do
    check_task: Callable[[Task], None]  # raises QuestionTooLong, as far as that is known yet
    is_stopping: Callable[[], bool]
    upload_slots: BoundedSemaphore = field(default_factory=lambda: BoundedSemaphore(MAX_UPLOADS))
    limiter: CapacityLimiter = field(default_factory=lambda: CapacityLimiter(NUM_THREADS))
    ask_limiter: CapacityLimiter = field(default_factory=lambda: CapacityLimiter(MAX_ASKED))
    asked: Counter[str] = field(default_factory=Counter)  # by whom; for the event loop's thread
    decode_slots: BoundedSemaphore = field(default_factory=lambda: BoundedSemaphore(MAX_FRAMES_DECODED))

    async def in_thread(self, function: Callable[..., Result], *args: Any) -> Result:
        """Run what reads or writes the disk, and so may wait."""
        return await anyio.to_thread.run_sync(function, *args, limiter=self.limiter)

    def own(self, job_id: str, caller: Caller) -> Record:
        """A job that the caller may see. Raises JobNotFound, also for somebody else's."""
        record = self.store.get(job_id)
        if not caller.may_see(record["owner"], has_keys=self.gate.has_keys):
            raise JobNotFound("Job ID not found in store. It may have been deleted, or belong to another key.")
        return self.shown(record, caller)

    def shown(self, record: Record, caller: Caller) -> Record:
        """What a caller may know of a job: not the id of the one it was asked of, if that is somebody else's key."""
        if caller.is_admin or record["owner"] == caller.owner:
            return record
        return {**record, "request": {**record["request"], "source_job_id": None}}

    def counts(self, record: Record) -> FrameCounts:
        """How many frames of a job have results: counted while it runs, from its record else."""
        if record["status"] != "processing":
            return stored_counts(record)
        with self.store.frames(record["job_id"]) as frames:
            return count(frames)


async def the_api(request: Request) -> Api:
    return request.app.state.api


async def asking(request: Request) -> Caller:
    """Raises Unauthorized."""
    api: Api = request.app.state.api
    return api.gate.identify(request)


async def changing(request: Request) -> Caller:
    """Who asks for a change, which is counted. Raises Unauthorized, RateLimited."""
    api: Api = request.app.state.api
    caller = api.gate.identify(request)
    count_request(api, request, caller)
    return caller


async def anybody(request: Request) -> None:
    """For a log-in, which is counted too: keys are not there to be guessed. Raises RateLimited."""
    count_request(request.app.state.api, request, Caller("visitor:"))


def count_request(api: Api, request: Request, caller: Caller) -> None:
    """Raises RateLimited."""
    if wait_s := api.rate_limit.take(rate_key(request, caller)):
        raise RateLimited(f"Too many requests from you. Try again in {math.ceil(wait_s)} s.", wait_s)


def count_upload(api: Api, request: HTTPConnection, caller: Caller, num_bytes: int) -> None:
    """Raises RateLimited if somebody without a key has uploaded too much within a day."""
    if caller.is_visitor and (wait_s := api.upload_limit.take(rate_key(request, caller), num_bytes)):
        raise RateLimited(
            "As much was uploaded from your address as may be in a day without a key (setting ANONYMOUS_UPLOAD_BYTES). "
            f"Try again in {math.ceil(wait_s / 60)} min.",
            wait_s,
        )


# What a route asks for in its parameters.
TheApi = Annotated[Api, Depends(the_api)]
Asking = Annotated[Caller, Depends(asking)]
Changing = Annotated[Caller, Depends(changing)]


def count(frames: FrameStore) -> FrameCounts:
    return FrameCounts(len(frames), frames.num_failed, frames.num_reused, frames.last_seq)


def refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The errors of a route, for /docs. Those of the doors and of keys are any route's."""
    return {
        status: {"description": WHEN[status], "content": {"application/problem+json": {"schema": PROBLEM_SCHEMA}}}
        for status in sorted({400, 401, 403, 413, 429, 503, *statuses})
    }


PROBLEM_SCHEMA = {"$ref": "#/components/schemas/Problem"}
KEY_SCHEMES = {
    "key": {"type": "http", "scheme": "bearer"},
    "session": {"type": "apiKey", "in": "cookie", "name": SESSION_COOKIE},
}


def json_answer(document: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """JSON without a detour through pydantic, which would take a second for a long job's results."""
    return Response(orjson.dumps(document), status, dict(headers or {}), media_type="application/json")


def submitted(request: Request, api: Api, caller: Caller, job_id: str) -> Response:
    """The answer to whoever made a job: where it is, and for a new visitor the cookie to be known by."""
    location = f"{request.scope.get('root_path', '')}/api/status/{job_id}"
    answer = json_answer(Submitted(job_id=job_id).model_dump(), 202, {"Location": location})
    api.gate.set_visitor(request, answer, caller)
    return answer


def http_status(error: DescriberError) -> int:
    return next(HTTP_STATUS[kind] for kind in type(error).__mro__ if kind in HTTP_STATUS)


def invalid(error: ValidationError | RequestValidationError) -> InvalidOption:
    """Put what pydantic found into words."""
    found = []
    for item in error.errors():
        names = [str(part) for part in item["loc"] if part not in ("body", "query", "path", "header")]
        text = item["msg"].removeprefix("Value error, ")
        found.append(f"{'.'.join(names)}: {text}" if names else text)
    return InvalidOption("; ".join(found[:5]).encode(errors="replace").decode())


async def _describe(request: Request, error: Exception) -> Response:
    if isinstance(error, RequestValidationError | ValidationError):
        error = invalid(error)
    assert isinstance(error, DescriberError)
    return refusal(error)


def refusal(error: DescriberError) -> Response:
    """An error as its answer, with the headers that belong to it."""
    headers = {}
    if isinstance(error, QueueFull | RateLimited):
        headers["Retry-After"] = str(math.ceil(error.retry_after_s))
    if isinstance(error, Unauthorized):
        headers["WWW-Authenticate"] = "Bearer"
    return problem(http_status(error), error.code, str(error), headers)


async def _refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if not route_path(request.scope).startswith(OURS):
        return await http_exception_handler(request, error)  # Gradio's
    if error.status_code == 400:  # FastAPI could not even take the body for JSON
        return problem(422, InvalidOption.code, "The request's body cannot be read. Send JSON, in UTF-8.")
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, InvalidOption.code)
    texts = {404: "There is nothing at this address. See /docs.", 405: "Other methods work here. See /docs."}
    detail = texts.get(error.status_code, str(error.detail))
    headers = {"Allow": _methods(request)} if error.status_code == 405 else error.headers
    return problem(error.status_code, code, detail, headers)


async def _fail(request: Request, error: Exception) -> Response:
    return problem(500, UnexpectedFailure.code, UNEXPECTED)


# Every error of the API as problem+json: what FastAPI takes as exception_handlers.
ERROR_HANDLERS: dict[Any, Any] = {
    DescriberError: _describe,
    RequestValidationError: _describe,
    ValidationError: _describe,
    HTTPException: _refuse,
    Exception: _fail,
}


def _methods(request: Request) -> str:
    """What works at the address of a request. Starlette names the methods of the first route only that has its path."""

    def works(method: str) -> bool:
        scope = {**request.scope, "method": method}
        return any(route.matches(scope)[0] is Match.FULL for route in request.app.routes)

    return ", ".join(filter(works, ("DELETE", "GET", "HEAD", "PATCH", "POST", "PUT")))


def add_problem_schema(app: FastAPI) -> None:
    """Describe our routes in /openapi.json, and none of Gradio's; put Problem, which no route returns by itself, among
    the schemas; and what stands for keys."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            ours = [route for route in iter_route_contexts(app.routes) if (route.path or "").startswith(OURS)]
            document = get_openapi(title=app.title, version=app.version, description=app.description, routes=ours)
            schemas = document.setdefault("components", {}).setdefault("schemas", {})
            schema = Problem.model_json_schema(ref_template="#/components/schemas/{model}")
            schemas.update(schema.pop("$defs", {}))
            schemas["Problem"] = schema
            if app.state.api.gate.has_keys:
                document["components"]["securitySchemes"] = KEY_SCHEMES
                document["security"] = [{name: []} for name in KEY_SCHEMES]  # either of them
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
