"""The fuzzing program, for a while; the long run is python -m tests.api_fuzz --minutes 5."""

import asyncio
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import api_fuzz
import pytest
from serving import RunningApp, ServerProcess, running_app, wait_until
from starlette.types import Message
from video_files import write_video

from jobs.api_results import StoredFile
from pipeline.errors import JobNotFound


@pytest.mark.filterwarnings("default")  # of schemathesis and its libraries
def test_no_answer_leaves_the_document_and_nothing_fails(capsys: pytest.CaptureFixture[str]) -> None:
    found: dict[str, int] = {"requests": 0}
    for minutes in (0.25, 1.0):
        if found["requests"] < 100:  # each route has its share of the time, in which a busy machine may send nothing
            is_wrong = api_fuzz.fuzz(minutes, seed=4, plans=(api_fuzz.OPEN,))
            printed = capsys.readouterr().out
            found = json.loads(printed.splitlines()[-1])
            assert not is_wrong, printed

    # 20 where there is time for all: 19 of the document, and the methods that it lacks.
    assert found["requests"] > 100 and found["routes"] >= 17


def test_what_goes_wrong_is_counted_by_kind_and_shown_once(capsys: pytest.CaptureFixture[str]) -> None:
    findings = api_fuzz.Findings()
    findings.counts["GET /api/health"]["200"] += 3
    for kind in ("undocumented", "schema_failures", "schema_failures"):
        findings.add(kind, "GET /api/health: odd", "how to send it")

    assert findings.report(1.25) == 1

    printed = capsys.readouterr().out
    total = {"undocumented": 1, "server_errors": 0, "schema_failures": 2, "seconds": 1.2}
    assert json.loads(printed.splitlines()[-1]) == {"requests": 3, "routes": 1, **total}
    assert printed.count("how to send it") == 2


def test_a_server_that_asks_for_another_host_is_told_on(tmp_path: Path) -> None:
    """The guard has to see it: here, because the server's proxy is on another address of loopback."""
    told = api_fuzz.write_guard(tmp_path)
    with api_fuzz.guarded(tmp_path):
        server = ServerProcess(tmp_path / "data", proxy_url="http://127.0.0.2:9")
        with server.start(), server.client() as client:
            client.post("/api/submit", json={"video_url": api_fuzz.VIDEO_URLS[0]}).raise_for_status()
            wait_until(told.exists)

    assert told.read_text(encoding="utf-8").splitlines()[0] == "socket.getaddrinfo 127.0.0.2"


def test_the_log_is_searched_for_errors_and_for_last_words(tmp_path: Path) -> None:
    log, findings = tmp_path / "log", api_fuzz.Findings()
    lines = ['{"levelname": "INFO", "message": "ERROR"}', '{"levelname": "ERROR", "message": "x"}', "Aborted"]
    log.write_text("\n".join(lines), encoding="utf-8")

    api_fuzz.look_at_log(api_fuzz.OPEN, log, findings)

    assert findings.num_failures == {"server_errors": 2}


def test_the_stock_has_jobs_of_each_state(tmp_path: Path) -> None:
    video = write_video(tmp_path / "a.avi").read_bytes()
    with ServerProcess(tmp_path / "data").start() as server, server.client() as client:
        stock = api_fuzz.Stock(client, video, random.Random(1))
        stock.fill()
        for state in ("completed", "failed", "canceled"):
            job_id = stock.take(state, is_used_up=False)
            assert client.get(f"/api/status/{job_id}").json()["status"] == state
        assert client.get(f"/api/status/{stock.take('unknown', is_used_up=True)}").status_code == 404


# What the fuzzing found


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningApp]:
    with running_app(tmp_path_factory.mktemp("app") / "data", api_keys="ann:ann-aaaaaaaaaaaaaaaa") as app:
        yield app


def document(app: RunningApp) -> dict[str, Any]:
    with app.client() as client:
        return client.get("/openapi.json").json()


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("PUT", "/api/session", "DELETE, POST"),
        ("POST", "/api/jobs/x/frames/1.jpg", "GET"),
        ("PUT", "/docs", "GET, HEAD"),
    ],
)
def test_a_405_names_every_method_of_the_address(app: RunningApp, method: str, path: str, allowed: str) -> None:
    """Allow named the methods of the first route only: POST for /api/session, which takes DELETE, too."""
    with app.client() as client:
        answer = client.request(method, path)

    assert (answer.status_code, answer.headers["Allow"]) == (405, allowed)


def test_the_form_of_uploads_has_no_null(app: RunningApp) -> None:
    """The document let fields be null, which a form can say only as the text "null": that was refused."""
    form = document(app)["paths"]["/api/upload"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]

    assert "null" not in json.dumps(form)
    assert form["properties"]["end_s"]["type"] == "number" and form["required"] == ["file"]


def test_every_route_documents_that_its_body_may_be_too_large(app: RunningApp) -> None:
    """The doors answer 413 on any route; only uploads said so."""
    routes = [route for path in document(app)["paths"].values() for route in path.values()]

    assert all("413" in route["responses"] for route in routes)


def test_the_document_tells_which_routes_ask_for_a_key(app: RunningApp) -> None:
    """It told of no keys at all, so that /docs could send none."""
    found = document(app)

    assert set(found["components"]["securitySchemes"]) == {"key", "session"}
    open_routes = {path for path, routes in found["paths"].items() for route in routes.values() if "security" in route}
    assert open_routes == {"/api/health", "/api/ready", "/api/session"}


@pytest.mark.parametrize("asked", ["bytes=5-2", "bytes=-", "bytes=a-b", "frames=0-1", "bytes=0-1,4-5", "", "bytes=²-3"])
def test_an_odd_range_gets_the_whole_file(tmp_path: Path, asked: str) -> None:
    """It got 400 as plain text, or parts in a multipart form that the document did not tell of."""
    path = tmp_path / "video"
    path.write_bytes(b"0123456789")

    assert ask(path, asked) == (200, b"0123456789")


def test_a_range_gets_its_part(tmp_path: Path) -> None:
    path = tmp_path / "video"
    path.write_bytes(b"0123456789")

    assert [ask(path, f"bytes={part}") for part in ("2-3", "8-", "-1")] == [(206, b"23"), (206, b"89"), (206, b"9")]
    assert ask(path, "bytes=10-")[0] == 416


def test_a_file_that_was_deleted_just_now_is_not_found(tmp_path: Path) -> None:
    """A job deleted between the look at its file and the answer was a 500."""
    with pytest.raises(JobNotFound):
        ask(tmp_path / "gone", "bytes=0-1")


def ask(path: Path, byte_range: str) -> tuple[int, bytes]:
    """-> status, body of a StoredFile's answer"""
    sent: list[Message] = []

    async def receive() -> Message:
        return await asyncio.Future()

    async def send(message: Message) -> None:
        sent.append(message)

    headers = [(b"range", byte_range.encode("latin-1"))]
    scope = {"type": "http", "method": "GET", "headers": headers, "asgi": {"spec_version": "2.4"}}
    asyncio.run(StoredFile(path, media_type="video/mp4")(scope, receive, send))
    return sent[0]["status"], b"".join(message["body"] for message in sent[1:])
