"""Sending webhooks. The store's part, the outbox, is kept in memory here; that it lasts is tested with the store.

What they say, their signature and the secret: test_webhook_signing.py
"""

import base64
import dataclasses
import json
import logging
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial

import pytest
from local_server import Lab, LocalServer, http, redirect
from standardwebhooks import Webhook

from jobs import webhooks
from jobs.webhooks import BACKOFF_S, LONGEST_WAIT_S, Outgoing, WebhookSender, new_event

SECRET = "whsec_" + base64.b64encode(bytes(range(32))).decode()
DAY_S = 24 * 3600


class MemoryOutbox:
    """Keeps webhooks as the store does, and what was noted of them."""

    def __init__(self) -> None:
        self.items: dict[str, Outgoing] = {}
        self.outcomes: list[str] = []
        self.errors: list[Exception] = []  # raised by the next calls of webhook_tried
        self._changed = threading.Condition()

    def put(self, url: str, now: float | None = None) -> Outgoing:
        now = time.time() if now is None else now
        event = new_event("job.completed", {"job_id": "job_1"}, now)
        item = Outgoing(job_id="job_1", url=url, **{**event, "body": event["body"].encode()})
        with self._changed:
            self.items[item.webhook_id] = item
            self._changed.notify_all()
        return item

    def outgoing(self) -> list[Outgoing]:
        return list(self.items.values())

    def wait_for_webhook(self, timeout_s: float) -> None:
        with self._changed:
            self._changed.wait(timeout_s)

    def webhook_tried(self, item: Outgoing, *, next_try_at: float | None, outcome: str) -> None:
        if self.errors:
            raise self.errors.pop(0)
        with self._changed:
            self.outcomes.append(outcome)
            if next_try_at is None:
                del self.items[item.webhook_id]
            else:
                tried = dataclasses.replace(item, num_tries=item.num_tries + 1, next_try_at=next_try_at)
                self.items[item.webhook_id] = tried
            self._changed.notify_all()

    def wait_until(self, condition: Callable[[], bool]) -> None:
        with self._changed:
            assert self._changed.wait_for(condition, timeout=10)


class Receiver:
    """Takes webhooks in at http://<any name>:<port>/hook, and answers in turn; the last answer is repeated."""

    def __init__(self, server: LocalServer) -> None:
        self.server = server
        self.received: list[tuple[dict[str, str], bytes]] = []  # headers and bodies
        self.answers(http())

    def answers(self, *answers: bytes, path: str = "/hook") -> None:
        self.server.replies[path] = [partial(self._take, path, answer) for answer in answers]

    def hangs(self, path: str = "/hook") -> threading.Event:
        """Never answers. The event says that a request is there."""
        is_there = threading.Event()

        def reply(connection: socket.socket) -> None:
            is_there.set()
            self.server.is_stopped.wait(20)

        self.server.replies[path] = [reply]
        return is_there

    def url(self, host: str = "hook.example", path: str = "/hook") -> str:
        return f"http://{host}:{self.server.port}{path}"

    def _take(self, path: str, answer: bytes, connection: socket.socket) -> None:
        head, _, body = next(r for r in reversed(self.server.requests) if f" {path} " in r).partition("\r\n\r\n")
        headers = {name.lower(): value for name, value in re.findall(r"\r\n([^:]+): ([^\r]*)", head)}
        content = body.encode("latin-1")
        while len(content) < int(headers["content-length"]):
            content += connection.recv(65536)
        self.received.append((headers, content))
        connection.sendall(answer)


@pytest.fixture
def receiver(server: LocalServer) -> Iterator[Receiver]:
    yield Receiver(server)
    server.is_stopped.set()  # lets hanging replies go


@pytest.fixture
def outbox() -> MemoryOutbox:
    return MemoryOutbox()


@pytest.fixture
def sender(lab: Lab, receiver: Receiver, outbox: MemoryOutbox) -> Iterator[WebhookSender]:
    lab.names = {f"{name}.example": ["127.0.0.1"] for name in ("hook", "slow", "slower")}
    lab.names["inside.example"] = ["127.0.0.2"]
    sender = new_sender(lab, receiver, outbox)
    yield sender
    sender._stopped.set()


def new_sender(lab: Lab, receiver: Receiver, outbox: MemoryOutbox) -> WebhookSender:
    return WebhookSender(outbox, SECRET, lab.rules(receiver.server.port), lab.network())


def test_a_webhook_is_delivered_and_its_signature_verifies(
    sender: WebhookSender, outbox: MemoryOutbox, receiver: Receiver
) -> None:
    item = outbox.put(receiver.url())

    assert sender.send_due(time.time()) == 1

    ((headers, body),) = receiver.received
    assert Webhook(SECRET).verify(body, headers) == json.loads(item.body)
    assert (headers["webhook-id"], body) == (item.webhook_id, item.body)
    assert (headers["content-type"], headers["user-agent"]) == ("application/json", "Moonreel")
    assert receiver.server.requests[0].startswith("POST /hook HTTP/1.1\r\n")
    assert (outbox.outcomes, outbox.items) == (["delivered: it answered 200"], {})
    assert sender.send_due(time.time()) == 0


@pytest.mark.parametrize("answer", ["500 No", "302 Found", "404 Not Found", "429 Slowly", "nonsense"])
def test_a_failure_is_tried_again_with_the_same_id_and_body(
    sender: WebhookSender, outbox: MemoryOutbox, receiver: Receiver, answer: str
) -> None:
    receiver.answers(b"nonsense\r\n\r\n" if answer == "nonsense" else http(status=answer), http(status="204 Fine"))
    item, now = outbox.put(receiver.url()), time.time()

    assert [sender.send_due(now), sender.send_due(now + 1), sender.send_due(now + 8)] == [1, 0, 1]

    assert [(headers["webhook-id"], body) for headers, body in receiver.received] == [(item.webhook_id, item.body)] * 2
    first, second = (headers["webhook-timestamp"] for headers, _ in receiver.received)
    assert int(second) == int(first) + 8
    assert outbox.outcomes[0].startswith("failed: it") and outbox.outcomes[1] == "delivered: it answered 204"


def test_a_redirect_is_not_followed(
    sender: WebhookSender, outbox: MemoryOutbox, receiver: Receiver, canary: LocalServer
) -> None:
    receiver.answers(redirect(receiver.url("127.0.0.2")))
    outbox.put(receiver.url())

    sender.send_due(time.time())

    assert receiver.server.num_connections == 1
    assert outbox.outcomes == ["failed: it answered 302"]


@pytest.mark.parametrize("host", ["127.0.0.2", "inside.example"])
def test_a_private_address_is_refused_for_good(
    sender: WebhookSender, outbox: MemoryOutbox, receiver: Receiver, canary: LocalServer, host: str, lab: Lab
) -> None:
    outbox.put(receiver.url(host))

    sender.send_due(time.time())

    assert lab.connected == []  # and the canary saw nobody
    assert outbox.outcomes[0].startswith("given up: it leads to an address that is not public")
    assert outbox.items == {}


def test_a_receiver_that_is_gone_is_given_up_at_once(
    sender: WebhookSender, outbox: MemoryOutbox, receiver: Receiver
) -> None:
    receiver.answers(http(status="410 Gone"))
    outbox.put(receiver.url())

    sender.send_due(time.time())

    assert (outbox.outcomes, outbox.items) == (["given up: it answered 410"], {})


def test_tries_become_rarer_and_end_after_a_day(
    sender: WebhookSender, outbox: MemoryOutbox, receiver: Receiver
) -> None:
    receiver.answers(http(status="503 Later"))
    created_at = now = outbox.put(receiver.url()).created_at
    waits_s = []

    while outbox.items:
        assert sender.send_due(now) == 1
        for item in outbox.outgoing():
            waits_s.append(item.next_try_at - now)
            now = item.next_try_at

    *waits_s, _ = waits_s  # the last one ends with the day
    assert len(waits_s) >= 8
    assert all(
        0.9 * backoff_s <= wait_s < 1.1 * backoff_s + 1 for wait_s, backoff_s in zip(waits_s, BACKOFF_S, strict=False)
    )
    assert now == created_at + DAY_S
    assert outbox.outcomes[-1] == "given up: it answered 503, and that was the last try"


@pytest.mark.parametrize(("wish_s", "at_least_s", "at_most_s"), [(2, 4.5, 6.5), (20, 20, 21), (99_999, 30, 31)])
def test_retry_after_is_honoured_within_limits(
    sender: WebhookSender, outbox: MemoryOutbox, receiver: Receiver, wish_s: int, at_least_s: float, at_most_s: float
) -> None:
    receiver.answers(http(status="503 Later", headers=(f"Retry-After: {wish_s}",)))
    now = outbox.put(receiver.url()).created_at

    sender.send_due(now)

    (item,) = outbox.outgoing()
    assert at_least_s <= item.next_try_at - now < at_most_s


def test_a_clock_that_jumps_back_delays_no_webhook(
    sender: WebhookSender, outbox: MemoryOutbox, receiver: Receiver
) -> None:
    outbox.put(receiver.url(), now=time.time() + LONGEST_WAIT_S - 60)
    assert sender.send_due(time.time()) == 0

    outbox.put(receiver.url(), now=time.time() + LONGEST_WAIT_S + 60)
    assert sender.send_due(time.time()) == 1


def test_a_receiver_that_does_not_answer_is_left_after_15_seconds(
    sender: WebhookSender, outbox: MemoryOutbox, receiver: Receiver, lab: Lab
) -> None:
    def reply(connection: socket.socket) -> None:
        lab.skipped_s += 16
        receiver.server.is_stopped.wait(20)

    receiver.server.replies["/hook"] = [reply]
    now = outbox.put(receiver.url()).created_at

    sender.send_due(now)

    assert outbox.outcomes == ["failed: it took longer than 15 s in all"]
    (item,) = outbox.outgoing()
    assert 20 < item.next_try_at - now < 25  # the pause begins after the try


def test_the_status_counts_whatever_becomes_of_the_body(
    sender: WebhookSender, outbox: MemoryOutbox, receiver: Receiver
) -> None:
    receiver.answers(http(b"short", length=1000))
    outbox.put(receiver.url())

    sender.send_due(time.time())

    assert outbox.outcomes == ["delivered: it answered 200"]


def test_an_endless_answer_is_not_read_to_its_end(
    sender: WebhookSender, outbox: MemoryOutbox, receiver: Receiver, lab: Lab
) -> None:
    num_bytes = 0

    def reply(connection: socket.socket) -> None:
        nonlocal num_bytes
        connection.sendall(http(length=10**12))
        while num_bytes < 100_000_000:  # until the client has gone
            num_bytes += connection.send(bytes(65536))

    receiver.server.replies["/hook"] = [reply]
    outbox.put(receiver.url())

    sender.send_due(time.time())

    receiver.server.stop()
    assert outbox.outcomes == ["delivered: it answered 200"]
    assert num_bytes < 50_000_000  # what fits the sockets' buffers


def test_a_hanging_receiver_holds_up_no_other(
    sender: WebhookSender, outbox: MemoryOutbox, receiver: Receiver, lab: Lab
) -> None:
    """Ten webhooks to each of two hosts that hang, and there are four threads."""
    is_there = [receiver.hangs("/slow"), receiver.hangs("/slower")]
    for _ in range(10):
        outbox.put(receiver.url("slow.example", "/slow"))
        outbox.put(receiver.url("slower.example", "/slower"))
    sender.start()
    assert all(event.wait(10) for event in is_there)

    for _ in range(3):
        outbox.put(receiver.url())

    outbox.wait_until(lambda: len(outbox.outcomes) == 3)
    sender.stop()
    assert outbox.outcomes == ["delivered: it answered 200"] * 3
    assert receiver.server.num_connections == 2 + 3  # one try in flight for a host


def test_hosts_take_turns(sender: WebhookSender, outbox: MemoryOutbox, receiver: Receiver) -> None:
    """With more slow hosts than threads, a new host does not queue behind all webhooks of theirs."""
    now = time.time()
    outbox.put(receiver.url("slow.example", "/1"), now - 3)
    outbox.put(receiver.url("slow.example", "/2"), now - 2)
    outbox.put(receiver.url(path="/3"), now - 1)
    receiver.answers(http(status="500 No"), path="/1")

    sender._work()  # takes the oldest
    sender._work()

    assert [request.split()[1] for request in receiver.server.requests] == ["/1", "/3"]


def test_a_stop_breaks_off_a_try_and_the_next_start_sends_it(
    sender: WebhookSender, outbox: MemoryOutbox, receiver: Receiver, lab: Lab
) -> None:
    is_there = receiver.hangs()
    item = outbox.put(receiver.url())
    sender.start()
    assert is_there.wait(10)
    started_s = time.monotonic()

    sender.stop()

    assert time.monotonic() - started_s < 2
    assert not any(thread.is_alive() for thread in sender._threads)
    assert outbox.outgoing() == [item]

    receiver.answers(http())
    restarted = new_sender(lab, receiver, outbox)
    restarted.start()
    outbox.wait_until(lambda: not outbox.items)
    restarted.stop()
    ((headers, body),) = receiver.received
    assert (headers["webhook-id"], body) == (item.webhook_id, item.body)


def test_a_full_disk_ends_no_thread_and_repeats_no_delivery(
    sender: WebhookSender,
    outbox: MemoryOutbox,
    receiver: Receiver,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(webhooks, "PAUSE_S", 0.01)
    outbox.errors = [OSError(28, "No space left on device")] * 10
    outbox.put(receiver.url())

    sender.start()
    outbox.wait_until(lambda: not outbox.items)
    sender.stop()

    assert (outbox.outcomes, len(receiver.received)) == (["delivered: it answered 200"], 1)
    assert "No space left on device" in caplog.text


def test_the_log_has_a_line_for_each_outcome_and_no_query(
    sender: WebhookSender, outbox: MemoryOutbox, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="jobs.webhooks")
    outbox.put(receiver.url(path="/hook?token=1234"))
    receiver.answers(http(), path="/hook?token=1234")

    sender.send_due(time.time())

    (line,) = caplog.messages
    assert line == f"Webhook of job_1 to {receiver.url()}?…, try 1: delivered: it answered 200"
