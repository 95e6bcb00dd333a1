"""Which of Gradio's routes there are, and which routes of the whole server ask for no key.

Gradio brings some eighty routes: logins, proxies, file serving, recordings, statistics. Here stand those that our page
and gradio_client use; all others are not found, so that none opens unseen with another version of Gradio. Where keys
are set, every route asks for one that is not in PUBLIC: ours by themselves (Asking, Changing in http.py), Gradio's
here.

Compares paths as routing does, on the same text, so that no other spelling leads past it.
Test: pytest tests/test_guard.py; tests/test_routes_guarded.py asks every route of the running app
"""

from starlette.datastructures import MutableHeaders
from starlette.requests import HTTPConnection
from starlette.responses import Response
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jobs import csp
from jobs.auth import Gate
from jobs.doors import route_path
from jobs.http import OURS, refusal
from jobs.problems import problem
from pipeline.errors import DescriberError

# Where keys are set, these routes ask for none. Nothing of any job is told or done there.
PUBLIC = {
    "/": "the page, with the form for the key; the same for everybody",
    "/assets/{path:path}": "the page's scripts and styles, as Gradio ships them",
    "/static/{path:path}": "its fonts and pictures, likewise",
    "/theme.css": "its colours",
    "/favicon.ico": "browsers ask for it by themselves, without cookies",
    "/manifest.json": "likewise: the name of the page and its icon",
    "/gradio_api/startup-events": "Gradio asks for it when it starts; says no more than that it has started",
    "/api/session": "exchanges a key for a cookie, and forgets it",
    "/api/health": "supervisors have no key; says that the server is alive",
    "/api/ready": "likewise; says whether the model works, and which one it is",
    "/docs": "describes the API, as the README does",
    "/docs/swagger-ui.css": "its styles",
    "/docs/swagger-ui-bundle.js": "its script, as Swagger UI ships it",
    "/openapi.json": "what /docs shows; the same on every server of this version",
}
# What is there of Gradio: path and methods. The page uses the public ones and call; gradio_client uses the others.
GRADIO = {
    "/": "GET HEAD",
    "/assets/{path:path}": "GET",
    "/static/{path:path}": "GET",
    "/theme.css": "GET",
    "/favicon.ico": "GET",
    "/manifest.json": "GET",
    "/gradio_api/startup-events": "GET",
    "/config": "GET",
    "/gradio_api/info": "GET",
    "/gradio_api/upload": "POST",
    "/gradio_api/queue/join": "POST",
    "/gradio_api/queue/data": "GET",
    "/gradio_api/call/{api_name}": "POST",
    "/gradio_api/call/{api_name}/{event_id}": "GET",
    "/gradio_api/cancel": "POST",
    "/gradio_api/reset": "POST",
    "/gradio_api/heartbeat/{session_hash}": "GET",
}

NOT_HERE = "This is not served here."


def guard(app: ASGIApp, gate: Gate) -> ASGIApp:
    """Close what we do not use of Gradio, and where keys are set, ask for one on the rest; give its page a policy."""
    routes = [Route(path, _nothing, methods=methods.split()) for path, methods in GRADIO.items()]

    async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or route_path(scope).startswith(OURS):
            return await app(scope, receive, send)
        route = next((route for route in routes if route.matches(scope)[0] is Match.FULL), None)
        refused = None
        if route is None:
            refused = problem(404, "not_found", NOT_HERE)
        elif route.path not in PUBLIC and gate.has_keys:
            try:
                gate.identify(HTTPConnection(scope))
            except DescriberError as error:
                refused = refusal(error)
        if refused is None:
            await app(scope, receive, _with_policy(send) if route_path(scope) == "/" else send)
        elif scope["type"] == "http":
            await refused(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008})  # the server makes it a 403

    return guarded


async def _nothing() -> Response:
    raise AssertionError  # these routes are there to be compared with


def _with_policy(send: Send) -> Send:
    """The page comes in one piece: its head waits until the scripts in it are known."""
    head: Message | None = None

    async def completed(message: Message) -> None:
        nonlocal head
        if message["type"] == "http.response.start":
            head = message
            return
        if head is not None:
            headers = MutableHeaders(scope=head)
            if headers.get("content-type", "").startswith("text/html"):
                headers["Content-Security-Policy"] = csp.for_page(message.get("body", b""))
            await send(head)
            head = None
        await send(message)

    return completed
