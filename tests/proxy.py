"""A reverse proxy on loopback, which serves another server under a prefix that it takes off, and streams both ways.

It does what nginx does with `location /video/ { proxy_pass http://app/; proxy_buffering off; }`, and tells what was
asked outside the prefix.
"""

import contextlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

BLOCK_BYTES = 65_536
OF_THE_CONNECTION = {"connection", "keep-alive", "transfer-encoding"}  # of each one alone


@dataclass
class Proxy:
    url: str  # with the prefix
    strays: list[str] = field(default_factory=list)  # paths outside the prefix that were asked for


@contextmanager
def proxied(server_url: str, prefix: str) -> Iterator[Proxy]:
    """Serve server_url under prefix, as in "/video", until the block ends."""
    front = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    proxy = Proxy(f"http://127.0.0.1:{front.server_port}{prefix}")
    address = urlsplit(server_url).netloc

    class Handler(BaseHTTPRequestHandler):
        def pass_on(self) -> None:
            if not self.path.startswith(f"{prefix}/"):
                if self.path == "/favicon.ico":  # the site's, for which browsers ask by themselves
                    return self.send_error(204)
                proxy.strays.append(self.path)
                return self.send_error(404)
            with contextlib.closing(HTTPConnection(address)) as back, contextlib.suppress(ConnectionError):
                back.putrequest(self.command, self.path.removeprefix(prefix), skip_host=True, skip_accept_encoding=True)
                for name, value in self.headers.items():
                    if name.lower() not in OF_THE_CONNECTION:
                        back.putheader(name, value)
                back.putheader("X-Forwarded-Proto", "http")
                back.endheaders()
                left = int(self.headers.get("Content-Length", 0))
                while left and (block := self.rfile.read1(min(left, BLOCK_BYTES))):  # type: ignore[attr-defined]
                    back.send(block)
                    left -= len(block)
                self.answer(back)

        def answer(self, back: HTTPConnection) -> None:
            """HTTP/1.0: the end of the connection is that of the answer."""
            answer = back.getresponse()
            self.send_response_only(answer.status, answer.reason)
            for name, value in answer.getheaders():
                if name.lower() not in OF_THE_CONNECTION:
                    self.send_header(name, value)
            self.end_headers()
            while block := answer.read1(BLOCK_BYTES):
                self.wfile.write(block)

        def log_message(self, format: str, *args: object) -> None:
            pass

        do_GET = do_HEAD = do_POST = do_DELETE = pass_on

    front.RequestHandlerClass = Handler
    thread = threading.Thread(target=front.serve_forever)
    thread.start()
    try:
        yield proxy
    finally:
        front.shutdown()
        thread.join()
        front.server_close()
