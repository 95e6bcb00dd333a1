"""Send one HTTP request to a stranger's URL: the connection goes to an address that was checked, and it ends in time.

httpcore2 speaks HTTP and TLS; the guard is its network backend. That one asks the name server once, checks every answer
and connects to a checked address itself, so a name cannot change its mind in between; TLS still checks the certificate
against the name. Each read runs under a Watch, as timeouts per read are no limit to a peer that drips bytes.
Redirects, retries and what the body is about are the caller's (download.py). The environment's proxies are not used.
httpcore2's own DEBUG log tells all headers, and so the queries of redirects: keep it off.
"""

import logging
import math
import queue
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

import httpcore2

from pipeline.addresses import IPAddress, is_public, parse_address
from pipeline.errors import Canceled
from pipeline.urls import UrlRefused, UrlRules, WebUrl

MAX_ADDRESSES = 4  # tried of a name
SLICE_S = 0.2  # how long a wait may overlook a cancellation
WRITE_BYTES = 16_384
FAILURES = (httpcore2.NetworkError, httpcore2.ProtocolError, httpcore2.ProxyError, httpcore2.TimeoutException)

logger = logging.getLogger(__name__)


class ExchangeFailed(Exception):
    """No complete answer came. The message is a clause about the server, for people."""

    def __init__(self, reason: str, *, is_transient: bool, retry_after_s: float | None = None) -> None:
        super().__init__(reason)
        self.is_transient = is_transient  # another try may go better
        self.retry_after_s = retry_after_s  # when the server wants it


def resolve(host: str, port: int) -> list[IPAddress]:
    """Ask the system's resolver. Raises OSError."""
    answers = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = [parse_address(str(sockaddr[0])) for *_, sockaddr in answers]
    return [address for address in dict.fromkeys(addresses) if address]


def connect(address: IPAddress, port: int, timeout_s: float) -> httpcore2.NetworkStream:
    """Open a TCP connection. Raises httpcore2's ConnectError or ConnectTimeout."""
    return httpcore2.SyncBackend().connect_tcp(str(address), port, timeout_s)


@dataclass(frozen=True)
class Network:
    """What the client needs of its surroundings. Tests put their own in."""

    resolve: Callable[[str, int], Sequence[IPAddress]] = resolve
    connect: Callable[[IPAddress, int, float], httpcore2.NetworkStream] = connect
    is_public: Callable[[IPAddress], bool] = is_public
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    ssl_context: ssl.SSLContext | None = None  # None: the certificate authorities of this host
    # An http:// proxy to connect by, never taken from the environment. It resolves the names: keeping away from private
    # addresses is then the proxy's duty, except for addresses that stand in a URL.
    proxy_url: str | None = None


class Watch:
    """Ends an exchange when a stage of it, or the whole, takes too long, or when somebody asks."""

    def __init__(self, network: Network, total_s: float, is_cancelled: Callable[[], bool] | None = None) -> None:
        self._network = network
        self._is_cancelled = is_cancelled or (lambda: False)
        self._total_s = total_s
        self._total_ends_s = network.clock() + total_s
        self.begin("", total_s)

    def begin(self, stage: str, stage_s: float) -> None:
        """Begin a stage: a clause that says what was missed if stage_s do not suffice."""
        self._stage, self._stage_ends_s = stage, self._network.clock() + stage_s

    def left_s(self) -> float:
        """The time left, above 0. Raises ExchangeFailed or Canceled."""
        if self._is_cancelled():
            raise Canceled("Canceled before it was complete.")
        now_s = self._network.clock()
        if now_s >= self._total_ends_s:
            raise ExchangeFailed(f"it took longer than {self._total_s:g} s in all", is_transient=False)
        if now_s >= self._stage_ends_s:
            raise ExchangeFailed(self._stage, is_transient=True)
        return min(self._total_ends_s, self._stage_ends_s) - now_s

    def sleep(self, seconds: float) -> None:
        """Pause. Raises as left_s does, at once if the pause would outlast the time left."""
        self.begin("", math.inf)
        if self.left_s() < seconds:
            raise ExchangeFailed(f"it took longer than {self._total_s:g} s in all", is_transient=False)
        while seconds > 0:
            self.left_s()
            self._network.sleep(min(SLICE_S, seconds))
            seconds -= SLICE_S


class _WatchedStream(httpcore2.NetworkStream):
    """A connection whose every wait is under the watch. It does not use the timeouts that httpcore2 passes."""

    def __init__(self, stream: httpcore2.NetworkStream, watch: Watch, idle_s: float) -> None:
        self._stream, self._watch, self._idle_s = stream, watch, idle_s
        self.is_body = False  # each byte of the body restarts the wait; the head has one wait for all of it

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        if self.is_body:
            self._watch.begin(f"it sent nothing for {self._idle_s:g} s", self._idle_s)
        while True:
            try:
                return self._stream.read(max_bytes, min(SLICE_S, self._watch.left_s()))
            except httpcore2.ReadTimeout:
                continue

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        for start in range(0, len(buffer), WRITE_BYTES):  # a timeout holds for one piece
            self._watch.begin(f"it did not take the request within {self._idle_s:g} s", self._idle_s)
            try:
                self._stream.write(buffer[start : start + WRITE_BYTES], self._watch.left_s())
            except httpcore2.WriteTimeout:
                self._watch.left_s()  # says which time is up
                raise
        self._watch.begin(f"it did not answer within {self._idle_s:g} s", self._idle_s)

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore2.NetworkStream:
        try:
            self._stream = self._stream.start_tls(ssl_context, server_hostname, self._watch.left_s())
        except BaseException:
            self._stream.close()
            raise
        return self

    def close(self) -> None:
        self._stream.close()

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


class _GuardedBackend(httpcore2.NetworkBackend):
    """Connects to public addresses only, or to what the rules allow."""

    def __init__(self, rules: UrlRules, network: Network, watch: Watch, idle_s: float) -> None:
        self._rules, self._network, self._watch, self._idle_s = rules, network, watch, idle_s
        self.stream: _WatchedStream | None = None

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None,
    ) -> httpcore2.NetworkStream:
        # httpcore2 asks for the proxy where there is one, and then for nothing else.
        addresses = self._resolve(host, port) if self._network.proxy_url else self._checked_addresses(host, port)
        failure: Exception | None = None
        for num_left, address in zip(range(len(addresses), 0, -1), addresses, strict=True):
            try:
                # Shared out, so that a dead address (IPv6 that leads nowhere) leaves time for the others.
                stream = self._network.connect(address, port, self._watch.left_s() / num_left)
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout) as error:
                failure = error
            else:
                self.stream = _WatchedStream(stream, self._watch, self._idle_s)
                return self.stream
        raise failure or httpcore2.ConnectError("no address")

    def _checked_addresses(self, host: str, port: int) -> Sequence[IPAddress]:
        addresses = self._resolve(host, port)
        for address in addresses:
            try:
                self._rules.check_address(host, address, self._network.is_public)
            except UrlRefused:
                logger.info("Refused %s: it resolves to %s", host, address)
                raise
        return addresses[:MAX_ADDRESSES]

    def _resolve(self, host: str, port: int) -> Sequence[IPAddress]:
        """Resolve in a thread of its own: getaddrinfo knows no timeout, and a pool would wait for it at exit."""
        if literal := parse_address(host):
            return [literal]
        answers: queue.SimpleQueue[Sequence[IPAddress] | Exception] = queue.SimpleQueue()

        def ask() -> None:
            try:
                answers.put(self._network.resolve(host, port))
            except Exception as error:
                answers.put(error)

        threading.Thread(target=ask, name="resolve", daemon=True).start()
        while True:
            try:
                answer = answers.get(timeout=min(SLICE_S, self._watch.left_s()))
            except queue.Empty:
                continue
            if not isinstance(answer, Exception):
                if not answer:
                    raise ExchangeFailed("its name leads nowhere", is_transient=False)
                return answer
            if not isinstance(answer, OSError):
                raise answer
            # EAI_AGAIN: the name server did not answer. Anything else says that there is no such name.
            is_transient = isinstance(answer, socket.gaierror) and answer.errno == socket.EAI_AGAIN
            reason = "its name could not be resolved" if is_transient else "there is no host of that name"
            raise ExchangeFailed(reason, is_transient=is_transient) from answer


@dataclass(frozen=True)
class Answer:
    """The head of an answer, and its body as it comes."""

    status: int
    headers: dict[str, str]  # names in lower case; of repeated ones, the last
    chunks: Iterator[bytes]


@contextmanager
def send(
    method: str,
    url: WebUrl,
    *,
    rules: UrlRules,
    network: Network,
    watch: Watch,
    connect_s: float,
    idle_s: float,
    headers: dict[str, str] | None = None,
    content: bytes | None = None,
) -> Iterator[Answer]:
    """Send one request on a connection of its own and give its answer, whatever the status.

    connect_s is for name, connection and TLS; idle_s for the head of the answer, and for each pause in its body.
    Raises UrlRefused, ExchangeFailed or Canceled, also while the chunks are read."""
    backend = _GuardedBackend(rules, network, watch, idle_s)
    watch.begin(f"it could not be reached within {connect_s:g} s", connect_s)
    sent = {"Host": url.host_header, "User-Agent": "Moonreel", "Connection": "close", **(headers or {})}
    target = httpcore2.URL(scheme=url.scheme, host=url.host, port=url.port, target=url.target)
    proxy = httpcore2.Proxy(network.proxy_url) if network.proxy_url else None
    try:
        with (
            httpcore2.ConnectionPool(network.ssl_context, proxy, network_backend=backend) as pool,
            pool.stream(method, target, headers=list(sent.items()), content=content) as response,
        ):
            assert backend.stream
            backend.stream.is_body = True
            received = {name.decode("ascii").lower(): _text(value) for name, value in response.headers}
            yield Answer(response.status, received, response.iter_stream())
    except FAILURES as error:
        raise _failure(error) from error


def retry_after_s(headers: dict[str, str]) -> float | None:
    """Read when a server asks to come back, in seconds from now; None if it does not say."""
    text = headers.get("retry-after", "").strip()
    if re.fullmatch("[0-9]{1,9}", text):
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None


def _text(value: bytes) -> str:
    try:
        return value.decode()  # some servers write UTF-8 into Location
    except UnicodeDecodeError:
        return value.decode("latin-1")


def _failure(error: Exception) -> ExchangeFailed:
    cause = error.__context__  # the pool takes __cause__ away
    if isinstance(cause, ssl.SSLCertVerificationError):
        return ExchangeFailed(f"its certificate is not valid: {cause.verify_message}", is_transient=False)
    if isinstance(error, httpcore2.ConnectTimeout):
        return ExchangeFailed("it could not be reached in time", is_transient=True)
    if isinstance(cause, ssl.SSLError):
        return ExchangeFailed("no encrypted connection could be made", is_transient=True)
    if isinstance(error, httpcore2.ConnectError):
        return ExchangeFailed("it could not be reached", is_transient=True)
    if isinstance(error, httpcore2.ProxyError):
        return ExchangeFailed("the proxy refused to connect to it", is_transient=False)
    if isinstance(error, httpcore2.ProtocolError) and not re.search("peer closed|disconnected", str(error)):
        return ExchangeFailed("its answer is not proper HTTP", is_transient=True)
    return ExchangeFailed("the connection broke off before the answer was complete", is_transient=True)
