"""`python tests/leaky_server.py`, with the settings of app.py: the app as it is, and routes more that forgot to ask for
a key, in each way that there is. GET /api/leaks/routes tells of all routes, for test_routes_guarded.py to ask each.

Gradio may fetch from every address here, as its own check counts all for public: whatever it would fetch, it does.
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent.parent)]

import safehttpx  # noqa: E402
from fastapi import APIRouter, Request, WebSocket  # noqa: E402
from fastapi.routing import iter_route_contexts  # noqa: E402
from starlette.applications import Starlette  # noqa: E402
from starlette.responses import PlainTextResponse  # noqa: E402
from starlette.routing import BaseRoute, Mount, Route, WebSocketRoute  # noqa: E402
from starlette.types import Message  # noqa: E402

import app  # noqa: E402

leaks = APIRouter(prefix="/api/leaks")
new_in_gradio = APIRouter(prefix="/gradio_api/new")


@leaks.get("/routes")
async def tell_routes(request: Request) -> list[dict[str, Any]]:
    return [vars_of | {"connects": await connects(request, vars_of)} for vars_of in listed(request.app.routes)]


@leaks.post("/of/{job_id}")
@new_in_gradio.post("/of/{job_id}")
async def leak(job_id: str) -> str:
    return job_id


@leaks.websocket("/socket")
@new_in_gradio.websocket("/socket")
async def talk(socket: WebSocket) -> None:
    await socket.accept()


async def inside(request: Request) -> PlainTextResponse:
    return PlainTextResponse("in")


def listed(routes: Sequence[BaseRoute], prefix: str = "") -> Iterator[dict[str, Any]]:
    """Each route's path, with methods, or without for web sockets. Mounted apps are walked, too."""
    for route in iter_route_contexts(routes):
        path = prefix + (route.path or "")
        if isinstance(route.original_route, Mount):
            yield from listed(route.original_route.routes, path)
        else:
            is_socket = isinstance(route.original_route, WebSocketRoute)
            yield {"path": path, "methods": [] if is_socket else sorted(route.methods or [])}


async def connects(request: Request, route: dict[str, Any]) -> bool:
    """Whether a web socket opens without a key. Asked past the server, which may lack what they take."""
    sent: list[str] = []

    async def receive() -> Message:
        return {"type": "websocket.connect"}

    async def send(message: Message) -> None:
        sent.append(message["type"])

    if not route["methods"]:
        headers = [(b"host", request.headers["host"].encode())]
        scope = {
            "type": "websocket",
            "path": route["path"],
            "headers": headers,
            "query_string": b"",
            "subprotocols": [],
        }
        await request.app(scope, receive, send)
    return "websocket.accept" in sent


if __name__ == "__main__":
    safehttpx.is_public_ip = lambda ip: True
    mounted = APIRouter(routes=[Mount("/api/leaks/mounted", Starlette(routes=[Route("/inside", inside)]))])
    app.ROUTERS += [leaks, new_in_gradio, mounted]
    sys.exit(app.main())
