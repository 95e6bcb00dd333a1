"""A web server on a loopback address that says exactly the bytes it is told to, and a network of made-up names.

For tests of what connects to strangers: no test sends anything beyond 127.0.0.0/8 and [::1].
"""

import contextlib
import socket
import ssl
import threading
from collections.abc import Callable
from ipaddress import ip_address
from pathlib import Path

import httpcore2

from pipeline import addresses, safe_http
from pipeline.addresses import IPAddress
from pipeline.download import Download, download
from pipeline.errors import DescriberError
from pipeline.safe_http import Network
from pipeline.urls import UrlRules

Reply = bytes | Callable[[socket.socket], None]
MP4 = b"\0\0\0\x18ftypisom\0\0\2\0isomiso2" + bytes(range(256)) * 40  # enough for a sniffer


def http(body: bytes = b"", status: str = "200 OK", headers: tuple[str, ...] = (), length: int | None = None) -> bytes:
    """An answer with a Content-Length, which is the body's if not given."""
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body) if length is None else length}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


def redirect(location: str, status: str = "302 Found") -> bytes:
    return http(status=status, headers=(f"Location: {location}",))


NOT_FOUND = http(status="404 Not Found")


class LocalServer:
    """Answers a request for a path, with its query or without, with the next reply of that path. The last one is
    repeated; without any, it is a 404."""

    def __init__(self, host: str = "127.0.0.1", port: int = 0, tls: ssl.SSLContext | None = None) -> None:
        self.replies: dict[str, list[Reply]] = {}
        self.requests: list[str] = []  # heads
        self.num_connections = 0
        self.is_stopped = threading.Event()
        self._tls = tls
        self._listener = socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=64
        )
        self.port: int = self._listener.getsockname()[1]
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def stop(self) -> None:
        self.is_stopped.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._threads[0].join()
        for thread in self._threads[1:]:
            thread.join()
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.num_connections += 1
            self._threads.append(threading.Thread(target=self._serve, args=(connection,)))
            self._threads[-1].start()

    def _serve(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            stack.callback(connection.close)
            connection.settimeout(20)
            if self._tls:
                connection = self._tls.wrap_socket(connection, server_side=True)
                stack.callback(connection.close)
            head = b""
            while b"\r\n\r\n" not in head:
                received = connection.recv(65536)
                if not received:
                    return
                head += received
            self.requests.append(head.decode("latin-1"))
            target = head.split()[1].decode("latin-1")
            replies = self.replies.get(target) or self.replies.get(target.partition("?")[0]) or [NOT_FOUND]
            reply = replies.pop(0) if len(replies) > 1 else replies[0]
            if isinstance(reply, bytes):
                connection.sendall(reply)
            else:
                reply(connection)


class Lab:
    """The surroundings of a client under test: names, addresses, a clock, and what the client did with them."""

    def __init__(self) -> None:
        self.names: dict[str, list[str] | Exception] = {}
        self.public: set[str] = set()  # loopback addresses to take for public ones
        self.reroutes: dict[str, str] = {}  # where a connection goes instead, for addresses this host may lack
        self.ssl_context: ssl.SSLContext | None = None
        self.asked: list[str] = []
        self.connected: list[str] = []
        self.timeouts_s: list[float] = []  # given to these connections
        self.slept_s = 0.0
        self.skipped_s = 0.0  # how far the clock was put on
        self._clock = Network().clock

    def network(self) -> Network:
        return Network(
            resolve=self._resolve,
            connect=self._connect,
            is_public=lambda address: str(address) in self.public or addresses.is_public(address),
            clock=lambda: self._clock() + self.skipped_s,
            sleep=self._sleep,
            ssl_context=self.ssl_context,
        )

    def rules(self, *ports: int) -> UrlRules:
        return UrlRules(ports=UrlRules().ports | set(ports))

    def _resolve(self, host: str, port: int) -> list[IPAddress]:
        self.asked.append(host)
        answer = self.names.get(host, OSError("no such name"))
        if isinstance(answer, Exception):
            raise answer
        return [ip_address(address) for address in answer]

    def _connect(self, address: IPAddress, port: int, timeout_s: float) -> httpcore2.NetworkStream:
        self.connected.append(str(address))
        self.timeouts_s.append(timeout_s)
        if not address.is_loopback:
            raise httpcore2.ConnectError("tests stay on this host")
        return safe_http.connect(ip_address(self.reroutes.get(str(address), str(address))), port, timeout_s)

    def _sleep(self, seconds: float) -> None:
        self.slept_s += seconds
        self.skipped_s += seconds


def fetch(lab: Lab, url: str, folder: Path, *servers: LocalServer, **options: object) -> Download:
    """Download into folder, which has to stay empty if that fails."""
    options = {"rules": lab.rules(*(server.port for server in servers)), "network": lab.network(), **options}
    try:
        return download(url, folder / "video", **options)  # type: ignore[arg-type]
    except DescriberError:
        assert list(folder.iterdir()) == []
        raise
