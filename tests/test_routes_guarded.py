"""Every route of a running server with page and keys, Gradio's included, is asked without a key: each has to ask for
one, unless it stands in the one list of public routes (jobs/guard.py) or is closed for all. A new route that forgets to
ask fails here, by its name. And Gradio's endpoints fetch nothing and open no file that a caller names.

Test: pytest tests/test_routes_guarded.py
"""

import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from api_client import ELSEWHERE, called, submit
from gradio_client import Client, handle_file
from local_server import LocalServer, http
from serving import SAMPLE, ServerProcess

from jobs.guard import GRADIO, NOT_HERE, PUBLIC
from jobs.problems import problem

KEY = "alice-key-0123456789"
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
CLOSED = problem(404, "not_found", NOT_HERE)
NO_TOKEN: Any = False  # Gradio's type says str | None


class LeakyServer(ServerProcess):
    program = ("tests/leaky_server.py",)

    def asked(self, *, has_key: bool) -> httpx.Client:
        return self.client(headers={"Authorization": f"Bearer {KEY}"} if has_key else {})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("guarded")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[LeakyServer]:
    keys = {"api_keys": f"alice:{KEY}", "rate_limit_per_minute": 100_000}
    uploads = {"GRADIO_TEMP_DIR": str(folder / "uploads")}
    server = LeakyServer(folder / "data", environment=uploads, page=True, model="/nowhere", **keys)
    with server:
        server.start(is_ready=False)
        yield server
        assert server.stop() == 0


@pytest.fixture(scope="module")
def job_id(server: LeakyServer) -> str:
    """A job of Alice's. It waits for a model that never comes."""
    with server.asked(has_key=True) as alice:
        return submit(alice)


@pytest.fixture(scope="module")
def routes(server: LeakyServer) -> list[dict[str, Any]]:
    with server.asked(has_key=False) as nobody:
        return nobody.get("/api/leaks/routes").raise_for_status().json()


def unguarded(nobody: httpx.Client, route: dict[str, Any], job_id: str) -> Iterator[str]:
    """Ask for a route by every method -> those that do not refuse"""
    path, values = route["path"], {"job_id": job_id, "frame_idx": "0"}
    address = re.sub(r"\{(\w+)(:\w+)?\}", lambda name: values.get(name[1], "x"), path)
    if route["connects"]:
        yield f"WEBSOCKET {path}"
    for method in METHODS if route["methods"] and path not in PUBLIC else ():
        with nobody.stream(method, address) as answer:  # one that should not be there may never end
            if not is_refusal(answer, has_method=method in route["methods"]):
                yield f"{method} {path}"


def is_refusal(answer: httpx.Response, *, has_method: bool) -> bool:
    """Whether no key came, the path is closed, or the method is not there. That a job is not found is no refusal."""
    if answer.status_code == 404:  # a HEAD's says nothing but its length
        return NOT_HERE in answer.read().decode() or answer.headers["content-length"] == str(len(CLOSED.body))
    return answer.status_code == 401 or (answer.status_code == 405 and not has_method)


def test_every_route_asks_for_a_key_but_the_public_and_the_leaks(
    server: LeakyServer, routes: list[dict[str, Any]], job_id: str
) -> None:
    """The leaks are what leaky_server.py has added: each is found. What it added to Gradio's routes is closed."""
    with server.asked(has_key=False) as nobody:
        found = [name for route in routes for name in unguarded(nobody, route, job_id)]

    assert len(routes) > 100
    assert found == [
        "GET /api/leaks/routes",
        "POST /api/leaks/of/{job_id}",
        "WEBSOCKET /api/leaks/socket",
        "GET /api/leaks/mounted/inside",
        "HEAD /api/leaks/mounted/inside",
    ]


def test_the_lists_of_routes_name_none_that_is_not_there(routes: list[dict[str, Any]]) -> None:
    paths = {route["path"] for route in routes}

    assert set(PUBLIC) <= paths and set(GRADIO) <= paths
    assert all(PUBLIC.values()), "each has a reason"


def test_a_public_route_does_without_a_key_and_tells_no_secret(server: LeakyServer, folder: Path, job_id: str) -> None:
    with server.asked(has_key=False) as nobody:
        for path in PUBLIC:
            answer = nobody.get(re.sub(r"\{.*\}", "x", path))
            assert answer.status_code != 401, path
            assert not any(secret in answer.text for secret in (KEY, "alice", str(folder), job_id))


def test_a_request_line_with_another_address_gets_in_nowhere(server: LeakyServer) -> None:
    """Proxies are asked by whole addresses: http://evil.example/config. What counts is the Host all the same."""
    port = httpx.URL(server.url).port
    asked = (("http://evil.example/config", f"127.0.0.1:{port}"), (f"http://127.0.0.1:{port}/config", "evil.example"))
    for target, host in asked:
        with socket.create_connection(("127.0.0.1", port or 0)) as connection, connection.makefile("rb") as answer:
            connection.sendall(f"GET {target} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
            assert int(answer.readline().split()[1]) in (400, 401, 404)


def test_the_document_of_the_api_tells_of_our_routes_only(server: LeakyServer) -> None:
    """It told of eighty of Gradio's, which are closed."""
    with server.asked(has_key=False) as nobody:
        document = nobody.get("/openapi.json").json()

    assert all(path.startswith(("/api/", "/metrics")) for path in document["paths"])
    assert not [name for name in document["components"]["schemas"] if "Predict" in name]


def test_gradio_client_works_with_a_key_in_its_headers(server: LeakyServer) -> None:
    headers = {"Authorization": f"Bearer {KEY}"}
    client = Client(server.url, verbose=False, token=NO_TOKEN, headers=headers, analytics_enabled=False)
    job_id = client.predict(handle_file(SAMPLE), api_name="/submit_file")["job_id"]
    waiting = client.submit(job_id, api_name="/wait")
    assert client.predict(job_id, api_name="/cancel")["status"] == "canceled"
    assert waiting.result()["status"] == "canceled"  # type: ignore[call-overload, index]
    client.close()


# What Gradio would fetch or open


@pytest.fixture
def neighbour() -> Iterator[LocalServer]:
    """A server that nobody has asked when the test ends."""
    neighbour = LocalServer()
    neighbour.replies["/video.mp4"] = [http(SAMPLE.read_bytes())]
    yield neighbour
    neighbour.stop()
    assert neighbour.num_connections == 0


def file_data(path: str, **more: Any) -> dict[str, Any]:
    return {"path": path, "orig_name": "video.mp4", "meta": {"_type": "gradio.FileData"}, **more}


def test_a_url_in_place_of_a_file_is_not_fetched(server: LeakyServer, neighbour: LocalServer) -> None:
    """Gradio fetched it, whole into memory, whatever our rules for URLs and sizes said."""
    url = f"http://127.0.0.1:{neighbour.port}/video.mp4"
    files = [file_data(url), file_data("x", url=url), url]
    with server.asked(has_key=True) as alice:
        answers = [called(alice, "submit_file", [sent, 1, "What?"]) for sent in files]
        others = [
            called(alice, "submit", [file_data(url), 1, "What?"]),
            called(alice, "submit", [ELSEWHERE, 1, file_data(url)]),
            called(alice, "status", [file_data(url), False]),
        ]

    assert all(event == "error" and "handle_file" in told["error"] for event, told in answers)
    assert {event for event, _ in others} == {"error"}


def test_what_looks_like_a_file_in_metadata_comes_back_as_it_was(server: LeakyServer, neighbour: LocalServer) -> None:
    """Gradio took it for one of its files: it fetched the URL, and copied what the path names into its cache."""
    url = f"http://127.0.0.1:{neighbour.port}/video.mp4"
    metadata = {"a": file_data("README.md"), "b": [file_data(url, url=url)]}
    with server.asked(has_key=True) as alice:
        job_id = submit(alice, metadata=metadata)
        event, (status,) = called(alice, "status", [job_id, False])

    assert (event, status["metadata"]) == ("complete", metadata)


@pytest.mark.parametrize("name", ["/etc/passwd", "{data}/session-secret", "{data}", "..", "", "README.md"])
def test_no_path_but_that_of_an_upload_is_taken_for_a_file(server: LeakyServer, folder: Path, name: str) -> None:
    with server.asked(has_key=True) as alice:
        event, told = called(alice, "submit_file", [file_data(name.format(data=folder / "data")), 1, "What?"])

    assert event == "error" and "handle_file" in told["error"]
    assert (folder / "data" / "session-secret").exists()


@pytest.mark.parametrize("sent", [None, 7, [], {}, {"path": None}, {"path": ["/etc/passwd"]}])
def test_what_is_no_file_at_all_is_told_so(server: LeakyServer, sent: Any) -> None:
    with server.asked(has_key=True) as alice:
        event, told = called(alice, "submit_file", [sent, 1, "What?"])

    assert event == "error" and "handle_file" in told["error"]
