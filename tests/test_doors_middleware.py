"""What the doors do with a request that is let in: how much it carries, and which headers its answer has.

Who is let in: test_doors_sites.py. Both ask as door_client.py does.
"""

import asyncio
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from http.client import HTTPConnection

import pytest
import uvicorn
from door_client import HOST, MAX_REQUESTS, MAX_UPLOAD_BYTES, ask, doors, scope_of
from serving import wait_until
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from jobs import csp
from jobs.doors import MULTIPART_BYTES, BodyRefused, route_path
from jobs.problems import problem

JSON = ("Content-Type", "application/json")
FORM = ("Content-Type", "multipart/form-data; boundary=b")


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

    with pytest.raises(BodyRefused):
        ask(doors(hasty), "POST", chunks=[b"x" * 600, b"x" * 600])


def test_an_error_of_the_app_is_not_taken_for_a_large_body() -> None:
    async def broken(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        ask(doors(broken), "POST", chunks=[b"x" * 10])


# Requests at a time


def test_requests_beyond_the_limit_are_told_to_come_back(port: int) -> None:
    """Those under way are uploads that do not end; when one goes, the next may come."""

    def get(connection: HTTPConnection) -> None:
        connection.request("GET", "/")

    head = f"POST /raw HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello".encode()
    with ExitStack() as stack:
        under_way = [stack.enter_context(socket.create_connection(("127.0.0.1", port))) for _ in range(MAX_REQUESTS)]
        for upload in under_way:
            upload.sendall(head)
        status, body = wait_until(lambda: (answer := exchange(port, get))[0] != 200 and answer)
        assert (status, json.loads(body)["code"]) == (503, "server_busy")
        under_way[0].close()
        wait_until(lambda: exchange(port, get) == (200, b"in"))
        assert exchange(port, get)[0] == 200


def test_a_request_that_breaks_leaves_room() -> None:
    async def broken(scope: Scope, receive: Receive, send: Send) -> None:
        raise RuntimeError("broken")

    narrow = doors(broken, max_requests=1)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="broken"):
            ask(narrow)


def test_a_busy_server_says_so_in_full_also_to_pages_of_listed_origins() -> None:
    page = "https://video.example"
    answer = ask(doors(cors_origins=[page], max_requests=0), headers=(HOST, ("Origin", page)))

    assert (answer.status, answer.code, answer.headers["retry-after"]) == (503, "server_busy", "5")
    assert answer.headers["access-control-allow-origin"] == page
    assert answer.headers["x-content-type-options"] == "nosniff"


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
    assert answer.headers["content-security-policy"] == f"{csp.ANSWER}; frame-ancestors 'self'"
    assert answer.headers["cross-origin-opener-policy"] == "same-origin"
    assert "microphone=()" in answer.headers["permissions-policy"]
    assert answer.headers["cache-control"] == "no-store"


def test_headers_of_the_app_stay() -> None:
    answer = ask(doors(), path="/framed")

    assert answer.headers["content-security-policy"] == "sandbox; frame-ancestors 'self'"
    assert answer.headers["x-content-type-options"] == "x"


def test_who_may_embed_the_page_is_the_operator_s_choice() -> None:
    answer = ask(doors(embed_origins=["https://b.example/", "https://A.example"]))

    assert answer.headers["content-security-policy"].endswith(
        "; frame-ancestors 'self' https://a.example https://b.example"
    )


@pytest.mark.parametrize("kind", ["video/mp4", "image/jpeg", "text/html"])
def test_what_keeps_itself_or_is_a_file_is_not_told_how_to_be_kept(kind: str) -> None:
    """A 304 that said no-store would throw away what the browser has."""
    for headers in ({"ETag": '"1"'}, {"ETag": '"1"', "Cache-Control": "private"}):
        answer = ask(doors(Response(media_type=kind, headers=headers)))
        assert answer.headers.get("cache-control") == headers.get("Cache-Control")
    assert "cache-control" not in ask(doors(Response(status_code=304, headers={"ETag": '"1"'}))).headers


def test_videos_and_pictures_may_be_opened_by_themselves() -> None:
    policies = [
        ask(doors(Response(media_type=kind))).headers["content-security-policy"] for kind in ("video/mp4", "image/gif")
    ]

    assert policies == [f"{csp.MEDIA}; frame-ancestors 'self'"] * 2


@pytest.mark.parametrize(
    ("path", "root_path", "route"),
    [
        ("/api/upload", "", "/api/upload"),
        ("/api/upload", "/video", "/api/upload"),  # the proxy took it off
        ("/video/api/upload", "/video", "/api/upload"),
        ("/videos/api/upload", "/video", "/videos/api/upload"),
    ],
)
def test_a_route_is_found_with_the_prefix_of_a_proxy_or_without(path: str, root_path: str, route: str) -> None:
    assert route_path({"path": path, "root_path": root_path}) == route


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


@pytest.mark.parametrize(
    ("path", "words"), [("/json", "did not come"), ("/careless", "did not come"), ("/api/upload", "paused")]
)
def test_a_server_does_not_wait_for_a_body_without_end(
    port: int, path: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.doors.BODY_S", 0.2)

    def begin(connection: HTTPConnection) -> None:
        connection.putrequest("POST", path)
        for name, value in [FORM if path == "/api/upload" else JSON, ("Content-Length", "99")]:
            connection.putheader(name, value)
        connection.endheaders(b"--b")

    status, body = exchange(port, begin)
    assert (status, json.loads(body)["code"]) == (400, "invalid_field")
    assert words in json.loads(body)["detail"]


def test_a_body_that_drips_is_refused_unless_it_is_an_upload(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.doors.BODY_S", 0.5)

    async def drip(path: str) -> int:
        read, sent = 0, []

        async def reading(scope: Scope, receive: Receive, send: Send) -> None:
            nonlocal read
            while (await receive())["more_body"]:
                read += 1
            await send({"type": "http.response.start", "status": 200})

        async def receive() -> Message:
            await asyncio.sleep(0.1)
            return {"type": "http.request", "body": b"x", "more_body": read < 8}

        async def send(message: Message) -> None:
            sent.append(message)

        await doors(reading)(scope_of("http", "POST", path, [HOST]), receive, send)
        return sent[0]["status"]

    assert asyncio.run(drip("/raw")) == 400
    assert asyncio.run(drip("/api/upload")) == 200
