"""The app in a process of its own, for the benchmarks; and what it takes of this machine. Linux only."""

import http.client
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
TIMEOUT_S = 120.0  # of a start
PAUSE_S = 0.005  # between two questions whether it answers


@dataclass(frozen=True)
class Server:
    pid: int
    port: int
    begun_s: float  # when its process was started, of time.perf_counter()
    start_s: float  # until it answered

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@contextmanager
def serving(
    data_dir: Path, answers: str = "/api/health", num_threads: int | None = None, **settings: Any
) -> Iterator[Server]:
    """A fresh server, once it answers this path with 200; it is killed afterwards. num_threads: of the model."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    settings = {**settings, "data_dir": data_dir, "port": port}
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("MOONREEL_")}
    environment = inherited | {f"MOONREEL_{name}".upper(): str(value) for name, value in settings.items()}
    if num_threads:
        environment["OMP_NUM_THREADS"] = str(num_threads)
    log, begun_s = data_dir.with_name(data_dir.name + ".log"), time.perf_counter()
    with log.open("ab") as out:
        process = subprocess.Popen([sys.executable, "app.py"], cwd=ROOT, env=environment, stdout=out, stderr=out)
    try:
        while ask_once(port, answers)[0] != 200:
            assert process.poll() is None and time.perf_counter() < begun_s + TIMEOUT_S, log.read_text()[-2000:]
            time.sleep(PAUSE_S)
        yield Server(process.pid, port, begun_s, time.perf_counter() - begun_s)
    finally:
        process.kill()
        process.wait()


def ask_once(port: int, path: str) -> tuple[int, bytes]:
    """-> the status, 0 if nobody listens, and the body"""
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=10)) as connection:
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read()
        except OSError:
            return 0, b""


def cpu_time_s(pid: int) -> float:
    """Of a process and of those that it has started: the ones that run, and the ones that it has waited for."""
    process = Path(f"/proc/{pid}")
    ticks = (process / "stat").read_text().rpartition(")")[2].split()[11:15]  # utime, stime, and those waited for
    total_s = sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")
    for child in [child for listed in process.glob("task/*/children") for child in listed.read_text().split()]:
        with suppress(FileNotFoundError):  # it has ended just now
            total_s += cpu_time_s(int(child))
    return total_s


def rss_bytes(pid: int) -> int:
    sizes_kib = re.findall(r"^VmRSS:\s*(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return int(sizes_kib[0]) * 1024
