"""What is there of Gradio, and what asks for a key, however a path is spelled. Asked as door_client.py does.

With Gradio itself behind it: test_routes_guarded.py.
"""

import asyncio
from collections.abc import Sequence

import pytest
from door_client import HOST, Answer, Pairs, ask, scope_of
from starlette.responses import HTMLResponse
from starlette.types import Message, Receive, Scope, Send

from jobs import csp
from jobs.auth import Gate, parse_keys
from jobs.guard import GRADIO, PUBLIC, guard

KEY = "alice-key-0123456789"
LOCKED, OPEN = Gate(parse_keys(f"alice:{KEY}"), bytes(32)), Gate({}, bytes(32), is_local=True)
WITH_KEY = (HOST, ("Authorization", f"Bearer {KEY}"))
GUARDED = sorted(set(GRADIO) - set(PUBLIC))


async def inside(scope: Scope, receive: Receive, send: Send) -> None:
    await HTMLResponse("<script>1</script>")(scope, receive, send)


def asked(method: str, path: str, headers: Pairs = (HOST,), gate: Gate = LOCKED, root_path: str = "") -> Answer:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await guard(inside, gate)({**scope, "root_path": root_path}, receive, send)

    return ask(app, method, path, headers)


def filled(path: str) -> str:
    return path.replace("{path:path}", "a/b.js").replace("{", "").replace("}", "")


def is_closed(answer: Answer) -> bool:
    return (answer.status, answer.code) == (404, "not_found")


@pytest.mark.parametrize("path", GUARDED)
def test_a_door_of_gradio_asks_for_a_key_where_keys_are_set(path: str) -> None:
    method, path = GRADIO[path], filled(path)
    refused = asked(method, path)

    assert (refused.status, refused.code, refused.headers["www-authenticate"]) == (401, "unauthorized", "Bearer")
    assert asked(method, path, [HOST, ("Authorization", "Bearer wrong-key-0123456789")]).status == 401
    assert asked(method, path, WITH_KEY).status == 200
    assert asked(method, path, gate=OPEN).status == 200


@pytest.mark.parametrize("path", sorted(set(GRADIO) & set(PUBLIC)))
def test_what_the_form_for_the_key_needs_asks_for_none(path: str) -> None:
    assert asked("GET", filled(path)).status == 200


@pytest.mark.parametrize(
    "path",
    [
        "/login",
        "/logout",
        "/monitoring/summary",
        "/robots.txt",
        "/gradio_api/user",
        "/gradio_api/token",
        "/gradio_api/app_id",
        "/gradio_api/deep_link",
        "/gradio_api/dev/reload",
        "/gradio_api/openapi.json",
        "/gradio_api/process_recording",
        "/gradio_api/component_server",
        "/gradio_api/run/status",
        "/gradio_api/api/status",
        "/gradio_api/call/v2/status/1",
        "/gradio_api/proxy=https://example.com/",
        "/gradio_api/file=/etc/passwd",
        "/gradio_api/file/etc/passwd",
        "/gradio_api/stream/1",
        "/gradio_api/queue/status",
        "/gradio_api/upload_progress",
        "/gradio_api/mcp/sse",
        "/gradio_api/vibe-code",
        "/gradio_api/run-history/records",
        "/gradio_api/profiling/traces",
        "/svelte/x.js",
        "/redoc",
        "/new-in-the-next-version",
    ],
)
@pytest.mark.parametrize("gate", [LOCKED, OPEN])
def test_everything_else_of_gradio_is_not_there_even_with_a_key(path: str, gate: Gate) -> None:
    for method in ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS"):
        assert is_closed(asked(method, path, WITH_KEY, gate))


SPELLINGS = ["{}/", "/{}", "{}//", "{}%2f", "{} ", "{};x", "{}/.", "/x/..{}", "/.{}", "{}\0", "\\{}"]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_no_other_spelling_of_a_door_leads_in(spelling: str) -> None:
    """Paths come here decoded, and routing looks at the same text: what is another path here is another one there."""
    for path in ("/config", "/gradio_api/info", "/gradio_api/queue/join"):
        for method in ("GET", "POST"):
            assert is_closed(asked(method, spelling.format(path), WITH_KEY))


def test_a_line_s_end_behind_a_door_s_name_is_the_door_itself() -> None:
    """As to routing: "$" matches before it, too."""
    assert asked("GET", "/config\n").status == 401 and asked("GET", "/config\n", WITH_KEY).status == 200


@pytest.mark.parametrize("path", ["/CONFIG", "/Gradio_api/info", "/gradio_api/INFO", "/GRADIO_API/queue/join"])
def test_capitals_lead_nowhere(path: str) -> None:
    assert is_closed(asked("GET", path, WITH_KEY)) and is_closed(asked("POST", path, WITH_KEY))


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "QUERY", "get", ""])
def test_a_door_takes_its_own_methods_only(method: str) -> None:
    assert is_closed(asked(method, "/config", WITH_KEY)) and is_closed(asked(method, "/gradio_api/info", WITH_KEY))


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/video/gradio_api/info", 401),
        ("/gradio_api/info", 401),
        ("/video/gradio_api/file=/etc/passwd", 404),
        ("/video/video/gradio_api/info", 404),
        ("/videos/gradio_api/info", 404),
        ("/video//gradio_api/info", 404),
        ("/video", 404),
        ("/video/", 200),
        ("/", 200),
    ],
)
def test_the_prefix_of_a_proxy_leads_past_nothing(path: str, status: int) -> None:
    assert asked("GET", path, root_path="/video").status == status


def test_our_own_routes_pass_and_ask_by_themselves() -> None:
    for path in ("/api/jobs/list", "/metrics", "/docs", "/openapi.json"):
        assert asked("GET", path).status == 200


def test_only_the_page_has_a_policy_under_which_scripts_run() -> None:
    assert asked("GET", "/").headers["content-security-policy"] == csp.for_page(b"<script>1</script>")
    assert "content-security-policy" not in asked("GET", "/theme.css").headers


def connected(paths: Sequence[str]) -> list[Message]:
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        return {"type": "websocket.connect"}

    async def connect() -> None:
        for path in paths:
            await guard(inside, LOCKED)(scope_of("websocket", "GET", path, WITH_KEY), receive, send)

    asyncio.run(connect())
    return sent


def test_there_are_no_web_sockets() -> None:
    assert connected(["/gradio_api/queue/join", "/config", "/x"]) == [{"type": "websocket.close", "code": 1008}] * 3
