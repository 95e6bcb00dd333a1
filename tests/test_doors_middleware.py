"""The doors: which requests come in, how much they carry, and which headers answers have. Driven by bare ASGI, since
no client sends what these tests send."""

import asyncio
import json
import socket
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from http.client import HTTPConnection
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI, Request, UploadFile
from fastapi.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jobs.doors import (
    LOOPBACK_NAMES,
    MULTIPART_BYTES,
    BodyTooLarge,
    Doors,
    Site,
    default_allowed_hosts,
    is_loopback,
    parse_origin,
    parse_site,
)
from jobs.problems import problem
from pipeline.errors import InvalidOption

MAX_BODY_BYTES, MAX_UPLOAD_BYTES = 1000, 5000
FRIEND = "https://friend.example"  # listed in CORS_ORIGINS
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
        except BodyTooLarge:
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


# Hosts


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "LocalHost:7860",
        "localhost.",
        "localhost.:80",
        "localhost:",
        "127.0.0.1:7860",
        "[::1]:7860",
        "[::1]",
        "[0:0:0:0:0:0:0:1]:7860",
        "video.example.org",
        "VIDEO.example.org.:443",
        "a.lan.example",
        "a.b.lan.example:8080",
    ],
)
def test_a_name_of_this_server_comes_in(host: str) -> None:
    assert ask(doors(), headers=[("Host", host)]).status == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "localhost.evil.example",
        "evil-localhost",
        "www.video.example.org",
        "lan.example",
        "evillan.example",
        ".lan.example",
        "*.lan.example",
        "127.0.0.2",
        "[::2]",
        "[::1",
        "::1",
        "[127.0.0.1]",
        "[::1%lo]",
        "[:::]",
        "user@localhost",
        "localhost:7860:1",
        "localhost:x",
        "localhost:99999",
        "localhost..",
        "localhost/",
        "localhost, localhost",
        " localhost",
        "löcalhost",
        "",
        ".",
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_another_name_or_a_malformed_one_stays_out(host: str, method: str) -> None:
    """DNS rebinding: the page of evil.example, whose name leads to 127.0.0.1 now, is of this origin to its browser."""
    answer = ask(doors(), method, headers=[("Host", host)])

    assert (answer.status, answer.code) == (400, "foreign_host")


@pytest.mark.parametrize("headers", [[], [HOST, HOST], [HOST, ("Host", "evil.example")]])
@pytest.mark.parametrize("allowed_hosts", [None, ["localhost"]])
def test_a_missing_or_repeated_host_stays_out(headers: Pairs, allowed_hosts: list[str] | None) -> None:
    assert ask(doors(allowed_hosts=allowed_hosts), headers=headers).code == "foreign_host"


def test_the_refusal_says_which_setting_to_change() -> None:
    answer = ask(doors(), headers=[("Host", "Nas.Local:7860")])

    assert "by the name nas.local." in json.loads(answer.body)["detail"]
    assert "ALLOWED_HOSTS" in json.loads(answer.body)["detail"]


def test_any_name_comes_in_where_names_are_not_known_but_no_malformed_one() -> None:
    app = doors(allowed_hosts=None)

    assert ask(app, headers=[("Host", "someone-video.hf.space")]).status == 200
    assert ask(app, headers=[("Host", "a b")]).code == "foreign_host"


def test_names_known_by_default_are_those_of_the_address_listened_on() -> None:
    assert default_allowed_hosts("127.0.0.1", []) == {"localhost", "127.0.0.1", "::1"}
    assert default_allowed_hosts("127.0.0.7", ["nas.local"]) == {*LOOPBACK_NAMES, "127.0.0.7", "nas.local"}
    assert default_allowed_hosts("0.0.0.0", ["nas.local"]) == {*LOOPBACK_NAMES, "0.0.0.0", "nas.local"}
    assert default_allowed_hosts("0.0.0.0", []) is None
    assert doors(allowed_hosts=default_allowed_hosts("[::1]", ["::2"]))._allowed_hosts == {*LOOPBACK_NAMES, "::2"}


def test_loopback_is_what_leads_to_this_computer_only() -> None:
    assert all(map(is_loopback, ["localhost", "LOCALHOST", "127.0.0.1", "127.9.9.9", "::1", "[::1]"]))
    assert not any(map(is_loopback, ["", "0.0.0.0", "::", "10.0.0.1", "example.org", "localhost.example.org"]))


@pytest.mark.parametrize("entry", ["https://a.example", "a b", "*", "*.", "a.*.example", "", "::x"])
def test_a_setting_that_names_no_host_is_refused(entry: str) -> None:
    with pytest.raises(InvalidOption, match="ALLOWED_HOSTS"):
        doors(allowed_hosts=[entry])


@pytest.mark.parametrize(
    "entry", ["*", "null", "a.example", "https://a.example/page", "https://", "https://u@a.example"]
)
def test_a_setting_that_names_no_origin_is_refused(entry: str) -> None:
    with pytest.raises(InvalidOption, match="CORS_ORIGINS"):
        doors(cors_origins=[entry])


def test_a_host_and_an_origin_are_compared_without_scheme_and_default_ports() -> None:
    assert parse_site("A.example:443") == parse_site("a.example.") == parse_origin("http://a.example:80")
    assert parse_site("[2001:DB8:0::1]:81") == Site("2001:db8::1", 81) == parse_origin("https://[2001:db8::1]:81")
    assert parse_origin("null") is parse_origin("https://a.example/") is parse_origin("//a.example") is None


# Other sites


def origin(value: str) -> tuple[str, str]:
    return ("Origin", value)


def fetch_site(value: str) -> tuple[str, str]:
    return ("Sec-Fetch-Site", value)


OWN_REQUESTS: list[Pairs] = [
    [HOST],
    [HOST, fetch_site("same-origin")],
    [HOST, fetch_site("none")],
    [HOST, origin("http://localhost:7860"), fetch_site("same-origin")],
    [("Host", "video.example.org"), origin("https://video.example.org")],
    [("Host", "video.example.org:80"), origin("https://video.example.org:443")],
    [("Host", "[::1]:7860"), origin("http://[::1]:7860")],
]
FOREIGN_REQUESTS: list[Pairs] = [
    [HOST, origin("https://evil.example"), fetch_site("cross-site")],
    [HOST, origin("http://localhost:3000")],
    [HOST, origin("http://localhost")],
    [HOST, origin("http://127.0.0.1:7860")],
    [HOST, origin("null")],
    [HOST, origin("")],
    [HOST, origin("http://localhost:7860"), origin("http://localhost:7860")],
    [HOST, origin("http://localhost:7860 https://evil.example")],
    [HOST, origin("http://localhost:7860@evil.example")],
    [HOST, origin("localhost:7860")],
    [HOST, fetch_site("cross-site")],
    [HOST, fetch_site("same-site")],
    [HOST, fetch_site("whatever")],
    [HOST, origin(FRIEND + ".evil.example")],
    [HOST, origin("http://friend.example")],
]


@pytest.mark.parametrize("headers", OWN_REQUESTS)
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
def test_this_server_s_own_page_and_programs_come_in(headers: Pairs, method: str) -> None:
    assert ask(doors(), method, headers=headers).status == 200


@pytest.mark.parametrize("headers", FOREIGN_REQUESTS)
@pytest.mark.parametrize("cors_origins", [[], [FRIEND]])
def test_a_page_of_another_site_changes_nothing(headers: Pairs, cors_origins: list[str]) -> None:
    app = doors(cors_origins=cors_origins)

    for method in ("POST", "DELETE", "PUT", "PATCH", "QUERY", "TRACE"):
        answer = ask(app, method, headers=headers)
        assert (answer.status, answer.code) == (403, "cross_site")
        assert "CORS_ORIGINS" in json.loads(answer.body)["detail"]


@pytest.mark.parametrize("headers", [*FOREIGN_REQUESTS, [HOST, origin(FRIEND)]])
def test_without_listed_origins_no_answer_lets_other_sites_read_it(headers: Pairs) -> None:
    """Gradio's own CORS does, with credentials, on every host but localhost."""
    preflight = [*headers, ("Access-Control-Request-Method", "POST")]
    for answer in (ask(doors(), "GET", headers=headers), ask(doors(), "OPTIONS", headers=preflight)):
        assert not any(name.startswith("access-control-") for name in answer.headers)
        assert answer.headers["cross-origin-resource-policy"] == "same-origin"


def test_the_page_of_a_listed_origin_may_use_the_api() -> None:
    app = doors(cors_origins=[FRIEND.title() + "/"])
    headers = [HOST, origin(FRIEND), fetch_site("cross-site")]

    wanted = [("Access-Control-Request-Method", "POST"), ("Access-Control-Request-Headers", "authorization")]
    preflight = ask(app, "OPTIONS", headers=[*headers, *wanted])
    assert preflight.status == 200
    assert preflight.headers["access-control-allow-origin"] == FRIEND
    assert "DELETE" in preflight.headers["access-control-allow-methods"]
    assert "Idempotency-Key" in preflight.headers["access-control-allow-headers"]

    answer = ask(app, "POST", headers=headers)
    assert answer.status == 200
    assert answer.headers["access-control-allow-origin"] == FRIEND
    assert "Retry-After" in answer.headers["access-control-expose-headers"]
    assert answer.headers["cross-origin-resource-policy"] == "cross-origin"
    assert "Origin" in answer.headers["vary"]
    assert "access-control-allow-credentials" not in preflight.headers | answer.headers

    refused = ask(app, "POST", "/json", headers=[*headers, ("Content-Length", "1001")])
    assert (refused.code, refused.headers["access-control-allow-origin"]) == ("too_large", FRIEND)


def test_the_page_of_an_unlisted_origin_may_not_beside_a_listed_one() -> None:
    app = doors(cors_origins=[FRIEND])
    headers = [HOST, origin("https://evil.example")]

    assert ask(app, "OPTIONS", headers=[*headers, ("Access-Control-Request-Method", "POST")]).status == 400
    assert "access-control-allow-origin" not in ask(app, headers=headers).headers


def connect(app: App, headers: Pairs) -> list[Message]:
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "websocket.connect"}

    async def send(message: Message) -> None:
        sent.append(message)

    asyncio.run(app(scope_of("websocket", "GET", "/", headers), receive, send))
    return sent


async def accept(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "websocket.accept"})


def test_web_sockets_are_for_this_server_s_own_page_and_programs() -> None:
    """Any site may open one, and read it: browsers ask no leave."""
    app = doors(accept, cors_origins=[FRIEND])

    for headers in (*OWN_REQUESTS, [HOST, origin(FRIEND)]):
        assert connect(app, headers) == [{"type": "websocket.accept"}]
    for headers in (*FOREIGN_REQUESTS, [("Host", "evil.example")], []):
        assert connect(app, headers) == [{"type": "websocket.close", "code": 1008}]


def test_the_lifespan_passes() -> None:
    async def run() -> list[str]:
        steps = [{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}]
        sent: list[str] = []

        async def receive() -> Message:
            return steps.pop(0)

        async def send(message: Message) -> None:
            sent.append(message["type"])

        await doors()({"type": "lifespan", "asgi": {"version": "3.0"}, "state": {}}, receive, send)
        return sent

    assert asyncio.run(run()) == ["lifespan.startup.complete", "lifespan.shutdown.complete"]


# Bodies

JSON = ("Content-Type", "application/json")
FORM = ("Content-Type", "multipart/form-data; boundary=b")


def form(num_bytes: int) -> list[bytes]:
    head = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.mp4"\r\n\r\n'
    return [head, *[b"x" * 1000] * (num_bytes // 1000), b"x" * (num_bytes % 1000), b"\r\n--b--\r\n"]


@pytest.mark.parametrize("path", ["/json", "/raw", "/careless", "/"])
@pytest.mark.parametrize("length", ["1001", "99999999999999999999"])
def test_a_body_announced_too_large_is_refused_before_it_is_read(path: str, length: str) -> None:
    async def never(scope: Scope, receive: Receive, send: Send) -> None:
        raise AssertionError

    answer = ask(doors(never), "POST", path, [HOST, JSON, ("Content-Length", length)])

    assert (answer.status, answer.code) == (413, "too_large")
    assert "1,000 bytes" in json.loads(answer.body)["detail"]
    assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("length", [None, "1", "-1", "x", "9" * 5000])  # int() reads 4300 digits at most
@pytest.mark.parametrize("path", ["/json", "/raw", "/careless"])
def test_a_body_is_counted_whatever_it_announces_and_whatever_the_app_makes_of_it(
    path: str, length: str | None
) -> None:
    headers = [HOST, JSON, *([("Content-Length", length)] if length else [])]

    answer = ask(doors(), "POST", path, headers, [b'{"a": "', b"x" * 990, b'"}', b" " * 500])

    assert (answer.status, answer.code) == (413, "too_large")


def test_a_body_up_to_the_limit_passes() -> None:
    assert ask(doors(), "POST", "/raw", chunks=[b"x" * 400, b"x" * 600]).body == b"1000"
    assert ask(doors(), "POST", "/raw", [HOST, ("Content-Length", "1000")], [b"x" * 1000]).body == b"1000"


def test_reading_stops_at_the_limit() -> None:
    chunks_read = 0

    async def greedy(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal chunks_read
        while (await receive()).get("more_body"):
            chunks_read += 1

    assert ask(doors(greedy), "POST", chunks=[b"x" * 300] * 100).code == "too_large"
    assert chunks_read == 3


def test_an_upload_may_be_larger_and_its_form_a_little_more() -> None:
    assert ask(doors(), "POST", "/api/upload", [HOST, FORM], form(MAX_UPLOAD_BYTES)).body == b"5000"

    answer = ask(doors(), "POST", "/api/upload", [HOST, FORM], form(MAX_UPLOAD_BYTES + MULTIPART_BYTES))
    assert answer.code == "too_large"
    assert "MAX_VIDEO_BYTES" in json.loads(answer.body)["detail"]


def test_an_upload_path_is_known_under_the_prefix_of_a_proxy() -> None:
    async def run(scope: Scope, receive: Receive, send: Send) -> None:
        await app({**scope, "root_path": "/video", "path": "/video" + scope["path"]}, receive, send)

    app = doors()
    assert ask(run, "POST", "/api/upload", [HOST, FORM], form(MAX_UPLOAD_BYTES)).status == 200


def test_a_body_that_grows_too_large_after_the_answer_began_breaks_it_off() -> None:
    async def hasty(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200})
        while (await receive())["more_body"]:
            await send({"type": "http.response.body", "body": b"more", "more_body": True})

    with pytest.raises(BodyTooLarge):
        ask(doors(hasty), "POST", chunks=[b"x" * 600, b"x" * 600])


def test_an_error_of_the_app_is_not_taken_for_a_large_body() -> None:
    async def broken(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        ask(doors(broken), "POST", chunks=[b"x" * 10])


# Headers


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", "/", 200), ("HEAD", "/", 200), ("GET", "/none", 404), ("POST", "/json", 422)]
)
def test_every_answer_has_the_security_headers(method: str, path: str, status: int) -> None:
    answer = ask(doors(), method, path)

    assert answer.status == status
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "same-origin"
    assert answer.headers["cross-origin-resource-policy"] == "same-origin"
    assert answer.headers["content-security-policy"] == "frame-ancestors 'self'"


def test_headers_of_the_app_stay() -> None:
    answer = ask(doors(), path="/framed")

    assert answer.headers["content-security-policy"] == "sandbox"
    assert answer.headers["x-content-type-options"] == "x"


def test_who_may_embed_the_page_is_the_operator_s_choice() -> None:
    spaces = "'self' https://huggingface.co"

    assert ask(doors(frame_ancestors=spaces)).headers["content-security-policy"] == f"frame-ancestors {spaces}"
    assert "content-security-policy" not in ask(doors(frame_ancestors=None)).headers


def test_a_problem_has_a_title_and_the_given_headers() -> None:
    answer = ask(problem(429, "queue_full", "Wait.", {"Retry-After": "5"}))

    assert answer.code == "queue_full"
    assert json.loads(answer.body)["title"] == "Too Many Requests"
    assert answer.headers["retry-after"] == "5"


# On a real server


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """The port of a server behind doors."""
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(doors(), log_level="critical", lifespan="off"))
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    yield listening.getsockname()[1]
    server.should_exit = True
    thread.join()
    listening.close()


def exchange(port: int, request: Callable[[HTTPConnection], None]) -> tuple[int, bytes]:
    connection = HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        request(connection)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def test_a_server_takes_chunks_up_to_the_limit_and_no_more(port: int) -> None:
    def chunked(num_chunks: int) -> Callable[[HTTPConnection], None]:
        chunks = [b"x" * 100] * num_chunks
        return lambda connection: connection.request(
            "POST", "/raw", iter(chunks), encode_chunked=True, headers={"Transfer-Encoding": "chunked"}
        )

    assert exchange(port, chunked(10)) == (200, b"1000")
    status, body = exchange(port, chunked(11))
    assert (status, json.loads(body)["code"]) == (413, "too_large")


def test_a_server_refuses_foreign_names_and_sites(port: int) -> None:
    def get(host: str, **headers: str) -> Callable[[HTTPConnection], None]:
        return lambda connection: connection.request("POST", "/", headers={"Host": host, **headers})

    assert exchange(port, get("evil.example"))[0] == 400
    assert exchange(port, get(f"127.0.0.1:{port}", Origin="https://evil.example"))[0] == 403
    assert exchange(port, get(f"127.0.0.1:{port}", Origin=f"http://127.0.0.1:{port}")) == (200, b"in")
