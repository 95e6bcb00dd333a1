"""One request to a stranger. What keeps it off private addresses is tested where it matters, in test_download.py."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager

import pytest
from local_server import Lab, LocalServer, http

from pipeline.errors import Canceled
from pipeline.safe_http import Answer, ExchangeFailed, Network, Watch, resolve, retry_after_s, send
from pipeline.urls import UrlRefused, UrlRules, check_url


@pytest.fixture
def server() -> Iterator[LocalServer]:
    server = LocalServer()
    yield server
    server.stop()


@pytest.fixture
def lab() -> Lab:
    lab = Lab()
    lab.public, lab.names = {"127.0.0.1"}, {"hook.example": ["127.0.0.1"], "inside.example": ["10.0.0.1"]}
    return lab


def post(
    lab: Lab, url: str, server: LocalServer, content: bytes, idle_s: float = 30, watch: Watch | None = None
) -> AbstractContextManager[Answer]:
    rules, network = lab.rules(server.port), lab.network()
    return send(
        "POST",
        check_url(url.replace("PORT", str(server.port)), rules),
        rules=rules,
        network=network,
        watch=watch or Watch(network, 60),
        connect_s=10,
        idle_s=idle_s,
        headers={"Content-Type": "application/json"},
        content=content,
    )


def test_a_body_is_posted_and_any_answer_given(lab: Lab, server: LocalServer) -> None:
    server.replies["/hook"] = [http(b"no thanks", "410 Gone", ("X-Reason: käse",))]

    with post(lab, "http://hook.example:PORT/hook", server, json.dumps({"a": 1}).encode()) as answer:
        assert (answer.status, b"".join(answer.chunks)) == (410, b"no thanks")
        assert answer.headers["x-reason"] == "käse"

    (head,) = server.requests
    assert head.startswith("POST /hook HTTP/1.1\r\n")
    assert "\r\nContent-Length: 8\r\n" in head and "\r\nContent-Type: application/json\r\n" in head


def test_a_hook_inside_is_refused(lab: Lab, server: LocalServer) -> None:
    with pytest.raises(UrlRefused), post(lab, "http://inside.example:PORT/", server, b""):
        pass
    assert lab.connected == []


def test_the_real_resolver_and_its_answer_for_this_host(server: LocalServer) -> None:
    network, rules = Network(), UrlRules(ports=frozenset({server.port}))
    url = check_url(f"http://localhost:{server.port}/", rules)
    told = {"rules": rules, "network": network, "watch": Watch(network, 60), "connect_s": 10, "idle_s": 10}

    with pytest.raises(UrlRefused, match="not public"), send("GET", url, **told):
        pass
    assert all(address.is_loopback for address in resolve("localhost", 80))
    assert server.num_connections == 0


def test_a_server_that_does_not_take_the_body_is_left(lab: Lab, server: LocalServer) -> None:
    def reply(connection: socket.socket) -> None:
        server.is_stopped.wait(20)

    server.replies["/hook"] = [reply]

    with (
        pytest.raises(ExchangeFailed, match=r"did not take the request within 0\.2 s"),
        post(lab, "http://hook.example:PORT/hook", server, bytes(50_000_000), idle_s=0.2),
    ):
        pass
    server.is_stopped.set()


def test_a_cancellation_ends_the_wait_for_an_answer(lab: Lab, server: LocalServer) -> None:
    cancelled = threading.Event()

    def reply(connection: socket.socket) -> None:
        cancelled.set()
        connection.recv(1)  # until the client has gone

    server.replies["/hook"] = [reply]
    started_s = time.monotonic()

    with (
        pytest.raises(Canceled),
        post(lab, "http://hook.example:PORT/hook", server, b"", watch=Watch(lab.network(), 60, cancelled.is_set)),
    ):
        pass
    assert time.monotonic() - started_s < 20


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("0", 0), ("120", 120), ("Wed, 21 Oct 2015 07:28:00 GMT", 0), ("", None), ("soon", None), ("9" * 5000, None)],
)
def test_retry_after_is_read(text: str, seconds: float | None) -> None:
    assert retry_after_s({"retry-after": text}) == seconds
