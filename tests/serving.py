"""Real servers for tests: the app in a process of its own, or in a thread of this one; both on loopback."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from app import Server, make_app
from jobs.service import Service
from jobs.settings import Settings
from pipeline.safe_http import Network

ROOT = Path(__file__).parent.parent
SAMPLE = ROOT / "pipeline" / "demo" / "sample.mp4"  # 25 s, described in about a second at 1 fps
START_S, END_S = 60.0, 120.0
PLAIN: dict[str, Any] = {"trust_env": False, "verify": False}  # certificates that nobody needs take long to read
# Without a cache, so that a second job takes as long as the first.
# The same on all machines, whatever a benchmark has found best there.
DEMO: dict[str, Any] = {"model": "demo", "device": "cpu", "answer_cache_bytes": 0, "instances": 1, "slots": 8}


def wait_until(is_so: Callable[[], Any], timeout_s: float = END_S, pause_s: float = 0.02) -> Any:
    """Ask until the answer is true, and return it."""
    ends_at_s = time.monotonic() + timeout_s
    while True:
        if answer := is_so():
            return answer
        assert time.monotonic() < ends_at_s, "it took too long"
        time.sleep(pause_s)


class ServerProcess:
    """`python app.py`, which can be stopped and killed, and started again on the same data directory."""

    program: tuple[str, ...] = ("app.py",)

    def __init__(
        self, data_dir: Path, log: Path | None = None, environment: dict[str, str] | None = None, **settings: Any
    ) -> None:
        """settings: of jobs/settings.py, by their names; the demo model, and no page, unless said otherwise."""
        self.settings = {**DEMO, "page": False, "data_dir": data_dir, **settings}
        self.environment = environment or {}
        self.log = log or data_dir.with_name(data_dir.name + ".log")
        self.process: subprocess.Popen[bytes] | None = None
        self.url = ""

    def start(self, *, is_ready: bool = True) -> "ServerProcess":
        """Start, and wait until it answers: /api/ready with 200, or /api/health."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        names = {f"MOONREEL_{name}".upper(): str(value) for name, value in {**self.settings, "port": port}.items()}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, *self.program],
                cwd=ROOT,
                env={**os.environ, **self.environment, **names},
                stdout=log,
                stderr=log,
            )
        wait_until(lambda: self._answers("ready" if is_ready else "health"), START_S, pause_s=0.1)
        return self

    def kill(self) -> None:
        """As a power failure would end it, but for what the system still writes."""
        self._end(signal.SIGKILL)

    def stop(self) -> int:
        """As a supervisor would end it -> the exit code"""
        return self._end(signal.SIGTERM)

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=30, **PLAIN, **options)

    def _answers(self, path: str) -> bool:
        assert self.process
        assert self.process.poll() is None, self.log.read_text(encoding="utf-8")
        with contextlib.suppress(httpx.HTTPError):
            return httpx.get(f"{self.url}/api/{path}", timeout=5, **PLAIN).status_code == 200
        return False

    def _end(self, number: signal.Signals) -> int:
        assert self.process
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(END_S)

    def __enter__(self) -> "ServerProcess":
        return self

    def __exit__(self, *_: object) -> None:
        if self.process and self.process.poll() is None:
            self.kill()


@dataclass
class RunningApp:
    """The app in a thread of this process, so that a test can reach into it."""

    service: Service
    url: str

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=30, **PLAIN, **options)


@contextmanager
def running_app(data_dir: Path, *, network: Network | None = None, **settings: Any) -> Iterator[RunningApp]:
    """Serve the real app, with the demo model, until the block ends."""
    read = Settings(**{**DEMO, "data_dir": data_dir, "port": 0, **settings})
    service = Service(read, network=network)
    config = uvicorn.Config(make_app(service, read), "127.0.0.1", 0, log_config=None, timeout_graceful_shutdown=2)
    server = Server(config, service)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_until(lambda: server.started or not thread.is_alive(), START_S)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield RunningApp(service, f"http://127.0.0.1:{port}")
    finally:
        server.should_exit = True
        thread.join(END_S)
