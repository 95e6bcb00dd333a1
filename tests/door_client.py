"""Doors around a small app, asked by bare ASGI, since no client sends what the tests of jobs/doors.py send."""

import asyncio
import json
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request, UploadFile
from fastapi.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jobs.doors import LOOPBACK_NAMES, BodyRefused, Doors

MAX_REQUESTS, MAX_BODY_BYTES, MAX_UPLOAD_BYTES = 10, 1000, 5000
HOST = ("Host", "localhost:7860")
Pairs = Sequence[tuple[str, str]]
App = Callable[[Scope, Receive, Send], Coroutine[Any, Any, None]]


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def code(self) -> str:
        """The code of a problem document, which has all that one must have."""
        assert self.headers["content-type"] == "application/problem+json"
        document = json.loads(self.body)
        assert document["type"] == "about:blank" and document["status"] == self.status
        assert document["title"] and document["detail"]
        return document["code"]


class LaxCors:
    """What Gradio puts around an app on hosts other than localhost: every site may read everything."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def opened(message: Message) -> None:
            if message["type"] == "http.response.start":
                origin = dict(scope["headers"]).get(b"origin", b"*")
                more = [(b"Access-Control-Allow-Origin", origin), (b"access-control-allow-credentials", b"true")]
                message["headers"] = [*message["headers"], *more]
            await send(message)

        await self.app(scope, receive, opened)


def build_app() -> FastAPI:
    app = FastAPI()
    app.add_middleware(LaxCors)

    @app.api_route("/", methods=["GET", "HEAD", "POST", "DELETE"])
    async def index() -> PlainTextResponse:
        return PlainTextResponse("in")

    @app.get("/framed")
    async def framed() -> PlainTextResponse:
        return PlainTextResponse("in", headers={"Content-Security-Policy": "sandbox", "X-Content-Type-Options": "x"})

    @app.post("/json")
    async def read_json(body: dict[str, Any]) -> dict[str, Any]:
        return body

    @app.post("/raw")
    async def read_raw(request: Request) -> int:
        return len(await request.body())

    @app.post("/careless")
    async def read_careless(request: Request) -> str:
        try:
            await request.body()
        except BodyRefused:
            return "never mind"
        return "fine"

    @app.post("/api/upload")
    async def upload(file: UploadFile) -> int:
        return len(await file.read())

    return app


def doors(app: ASGIApp | None = None, **options: Any) -> Doors:
    defaults: dict[str, Any] = {
        "allowed_hosts": [*LOOPBACK_NAMES, "Video.Example.org", "*.lan.example"],
        "cors_origins": [],
        "max_requests": MAX_REQUESTS,
        "max_body_bytes": MAX_BODY_BYTES,
        "max_upload_bytes": MAX_UPLOAD_BYTES,
        "upload_paths": ["/api/upload"],
    }
    return Doors(app or build_app(), **(defaults | options))


def scope_of(kind: str, method: str, path: str, headers: Pairs) -> Scope:
    raw = [(name.lower().encode(), value.encode("latin-1")) for name, value in headers]
    return {
        "type": kind,
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": raw,
        "client": ("192.0.2.1", 5),
        "server": ("127.0.0.1", 7860),
    }


def ask(
    app: App, method: str = "GET", path: str = "/", headers: Pairs = (HOST,), chunks: Sequence[bytes] = ()
) -> Answer:
    """Send one request as it is. Its body comes in these chunks, and only when asked for."""
    parts: list[Message] = [{"type": "http.request", "body": chunk, "more_body": True} for chunk in chunks]
    waiting = [*parts, {"type": "http.request", "body": b"", "more_body": False}]
    sent: list[Message] = []

    async def receive() -> Message:
        return waiting.pop(0) if waiting else {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)

    asyncio.run(app(scope_of("http", method, path, headers), receive, send))
    assert [message["type"] for message in sent].count("http.response.start") == 1
    pairs = [(name.decode().lower(), value.decode()) for name, value in sent[0]["headers"]]
    body = b"".join(message.get("body", b"") for message in sent[1:])
    return Answer(sent[0]["status"], dict(pairs), body)
