"""Send the webhooks of jobs: signed, tried again for a day, and no receiver waits for another.

What is to be sent is in the outbox, which the store keeps: a restart loses nothing. A webhook may arrive twice (a kill
between its arrival and the note of it), then with the same webhook-id. Headers and signatures are those of
https://www.standardwebhooks.com. Knows nothing of jobs and their records. Test: pytest tests/test_webhooks.py
"""

import base64
import hashlib
import hmac
import json
import logging
import random
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

from pipeline.addresses import IPAddress, is_public
from pipeline.atomic import write_private
from pipeline.errors import Canceled, InvalidOption
from pipeline.safe_http import Answer, ExchangeFailed, Network, Watch, retry_after_s, send
from pipeline.urls import UrlRefused, UrlRules, WebUrl, check_url, shown

SECRET_PREFIX = "whsec_"
CONNECT_S, TOTAL_S = 10, 15  # of one try
MAX_ANSWER_BYTES = 65_536  # read of a body, so that receivers can finish; nobody looks at it
MAX_AGE_S = 24 * 3600
BACKOFF_S = (5, 30, 120, 600, 1800, 3600, 7200, 14_400, 28_800)  # after the first failure, the second, ...
JITTER = 0.1
LONGEST_WAIT_S = BACKOFF_S[-1] * (1 + JITTER)  # 8.8 h
NUM_THREADS = 4
POLL_S = 0.5  # how long a webhook that comes due, or a stop, may be overlooked
PAUSE_S = 5  # after an error of the outbox

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outgoing:
    """One webhook that is not delivered yet."""

    job_id: str
    webhook_id: str  # "msg_<random>"; the same for each try
    url: str
    body: bytes  # JSON {"type", "timestamp" (ISO 8601), "data": {...}}; the same for each try
    created_at: float  # Unix seconds
    num_tries: int
    next_try_at: float  # Unix seconds


class Outbox(Protocol):
    """Where webhooks wait, kept by the store. Several threads call it."""

    def outgoing(self) -> list[Outgoing]: ...  # all that are not delivered, in any order; asked twice a second
    def wait_for_webhook(self, timeout_s: float) -> None: ...  # returns early when a new one was put in
    # next_try_at None: done with it, as it is delivered or given up. outcome is for people.
    def webhook_tried(self, item: Outgoing, *, next_try_at: float | None, outcome: str) -> None: ...


def new_event(event_type: str, data: Mapping[str, Any], now: float) -> dict[str, Any]:
    """A new webhook (job.completed, job.failed or job.canceled) for a record: Outgoing's fields, the body as text."""
    timestamp = datetime.fromtimestamp(now, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    body = json.dumps({"type": event_type, "timestamp": timestamp, "data": data})
    webhook_id = f"msg_{secrets.token_hex(16)}"
    return {"webhook_id": webhook_id, "body": body, "created_at": now, "num_tries": 0, "next_try_at": now}


def sign(secret: str, webhook_id: str, timestamp: int, body: bytes) -> str:
    """The value of webhook-signature; timestamp is that of the try, in Unix seconds."""
    signed = f"{webhook_id}.{timestamp}.".encode() + body
    digest = hmac.digest(base64.b64decode(secret.removeprefix(SECRET_PREFIX)), signed, hashlib.sha256)
    return f"v1,{base64.b64encode(digest).decode()}"


def load_secret(text: str | None, folder: Path) -> str:
    """The secret of the setting; without one, that of folder/webhook-secret, which is made at the first start.

    Raises InvalidOption."""
    path = folder / "webhook-secret"
    try:
        if not text and not path.exists():
            write_private(path, SECRET_PREFIX + base64.b64encode(secrets.token_bytes(32)).decode())
        secret = (text or path.read_text(encoding="latin-1")).strip()
    except OSError as error:
        raise InvalidOption(f"{path} cannot be used: {error.strerror}. Mend that, or set webhook_secret.") from error
    try:
        num_bytes = len(base64.b64decode(secret.removeprefix(SECRET_PREFIX), validate=True))
    except ValueError:
        num_bytes = 0
    if not (secret.startswith(SECRET_PREFIX) and 24 <= num_bytes <= 64):
        what, how = "webhook_secret" if text else path, f'echo "{SECRET_PREFIX}$(openssl rand -base64 32)"'
        raise InvalidOption(f"{what} has to be {SECRET_PREFIX} and the base64 of 24 to 64 bytes. Make one with: {how}")
    return secret


def check_webhook_url(text: str, rules: UrlRules, is_public: Callable[[IPAddress], bool] = is_public) -> WebUrl:
    """Check what the text of a URL tells, without asking a name server. Raises InvalidOption."""
    try:
        return check_url(text, rules, is_public=is_public)
    except UrlRefused as error:
        raise InvalidOption(f"webhook_url: {error}") from error


class WebhookSender:
    """Sends what is due in the outbox: with threads between start and stop, or in the caller's by send_due.

    A host has one try in flight at most, and hosts take turns, so a slow one holds up no more than one thread.
    max_age_s after it was created, a webhook has its last try."""

    def __init__(
        self, outbox: Outbox, secret: str, rules: UrlRules, network: Network, *, max_age_s: float = MAX_AGE_S
    ) -> None:
        self._outbox, self._secret, self._network, self._max_age_s = outbox, secret, network, max_age_s
        self._check = partial(check_url, rules=rules, is_public=network.is_public)
        self._send = partial(send, "POST", rules=rules, network=network, connect_s=CONNECT_S, idle_s=TOTAL_S)
        self._looking = threading.Lock()  # held by the one thread that looks for work; the others queue, or send
        self._busy: set[str] = set()  # hosts with a try in flight
        self._turns: dict[str, float] = {}  # hosts in the outbox -> when they last had a try
        # webhook_id -> the outcome and next_try_at that the outbox could not be told yet
        self._untold: dict[str, tuple[str, float | None]] = {}
        self._stopped = threading.Event()
        self._threads = [threading.Thread(target=self._run, name="webhooks", daemon=True) for _ in range(NUM_THREADS)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End within a second. A try in flight is broken off, and does not count."""
        self._stopped.set()
        for thread in self._threads:
            thread.join(1 / NUM_THREADS)  # one that is just connecting takes longer, and touches nothing afterwards

    def send_due(self, now: float) -> int:
        """Try all that is due, one after the other. -> how many. Raises what the outbox raises."""
        due = self._due(now)
        for item in due:
            self._deliver(item, now)
        return len(due)

    def _run(self) -> None:
        while not self._stopped.is_set():
            try:
                self._work()
            except Canceled:
                return
            except Exception:  # a full disk, most likely
                logger.exception("The webhooks cannot be read or noted; going on in %g s", PAUSE_S)
                self._stopped.wait(PAUSE_S)

    def _work(self) -> None:
        """Try one webhook, or wait a little for one."""
        with self._looking:
            if self._stopped.is_set():
                return
            due = self._due(now := time.time())
            if not due:
                return self._outbox.wait_for_webhook(POLL_S)
            host = self._host(due[0])
            self._busy.add(host)
            self._turns[host] = time.monotonic()
        try:
            self._deliver(due[0], now)
        finally:
            self._busy.discard(host)

    def _due(self, now: float) -> list[Outgoing]:
        """What may be tried now, beginning with the hosts whose last turn is longest ago."""
        busy = self._busy.copy()  # before the outbox is read, or a webhook noted in between would be sent again
        items = {item: self._host(item) for item in self._outbox.outgoing()}
        self._turns = {host: self._turns.get(host, 0.0) for host in items.values()}
        # A time further off than any wait was set before the clock jumped back.
        due = [item for item in items if not now < item.next_try_at <= now + LONGEST_WAIT_S]
        free = [item for item in due if items[item] not in busy]
        return sorted(free, key=lambda item: (self._turns[items[item]], item.next_try_at))

    def _host(self, item: Outgoing) -> str:
        try:
            return self._check(item.url).host
        except UrlRefused:
            return ""  # given up without a connection

    def _deliver(self, item: Outgoing, now: float) -> None:
        """Try once and tell the outbox. What could not be told is told again, not tried again: a full disk of ours
        is no reason to ask receivers over and over."""
        if item.webhook_id not in self._untold:
            outcome, next_try_at = self._untold[item.webhook_id] = self._try(item, now)
            logger.info("Webhook of %s to %s, try %d: %s", item.job_id, shown(item.url), item.num_tries + 1, outcome)
        outcome, next_try_at = self._untold[item.webhook_id]
        self._outbox.webhook_tried(item, next_try_at=next_try_at, outcome=outcome)
        del self._untold[item.webhook_id]

    def _try(self, item: Outgoing, now: float) -> tuple[str, float | None]:
        """-> the outcome and next_try_at. Raises Canceled."""
        started_s, wish_s = self._network.clock(), None
        try:
            answer = self._post(item, now)
        except UrlRefused as error:
            return f"given up: {error}", None
        except ExchangeFailed as error:
            reason = str(error)
        else:
            reason, wish_s = f"it answered {answer.status}", retry_after_s(answer.headers)
            if 200 <= answer.status < 300 or answer.status == 410:
                return f"{'given up' if answer.status == 410 else 'delivered'}: {reason}", None
        now += self._network.clock() - started_s
        gives_up_at = item.created_at + self._max_age_s
        if now >= gives_up_at:
            return f"given up: {reason}, and that was the last try", None
        return f"failed: {reason}", min(now + _wait_s(item.num_tries, wish_s or 0), gives_up_at)

    def _post(self, item: Outgoing, now: float) -> Answer:
        """Raises UrlRefused, ExchangeFailed or Canceled. The answer's body cannot be read any more."""
        headers = {
            "Content-Type": "application/json",
            "webhook-id": item.webhook_id,
            "webhook-timestamp": str(int(now)),
            "webhook-signature": sign(self._secret, item.webhook_id, int(now), item.body),
        }
        watch, answer = Watch(self._network, TOTAL_S, self._stopped.is_set), None
        try:
            with self._send(self._check(item.url), watch=watch, headers=headers, content=item.body) as answer:
                for num_bytes in accumulate(map(len, answer.chunks)):
                    if num_bytes >= MAX_ANSWER_BYTES:
                        break
        except (ExchangeFailed, Canceled):
            if not answer:
                raise
        return answer  # its status counts, whatever became of its body


def _wait_s(num_tries: int, wish_s: float) -> float:
    """The pause after a failure. The receiver's wish (Retry-After) may make it as long as the next one, not longer."""
    backoff_s, next_backoff_s = (*BACKOFF_S[num_tries:], BACKOFF_S[-1], BACKOFF_S[-1])[:2]
    return max(backoff_s * random.uniform(1 - JITTER, 1 + JITTER), min(wish_s, next_backoff_s))
