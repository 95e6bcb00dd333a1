"""Faults, injected one at a time into a running server: `python -m tests.faults` takes about 6 minutes.

Each fault has a real server (python app.py, the demo model) of its own, with a finished job and a running one, is put
in, watched from outside, and taken away. Then the server has to come back, all acknowledged jobs have to end as they
may, and what was read of results before has to be there unchanged. Prints a row of a table for each: the fault, what
the user sees, how to get out of it; and JSON as its last line. Exit 0 only if all held.

    python -m tests.faults                  all
    python -m tests.faults dns_fails ...    some; --list names them

Needs Linux. disk_full, deleting_on_a_full_disk and read_only mount a small disk: that needs root, and exits with 2 for
others. In pytest: tests/test_faults.py
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # as pytest does

import httpx  # noqa: E402
from serving import SAMPLE, ServerProcess, wait_until  # noqa: E402

FINISHED = ("completed", "failed", "canceled")
EXIT_NEEDS_ROOT = 2
LONG: dict[str, Any] = {"target_fps": "12", "reuse_similar": "0"}  # 300 frames of the sample: some seconds


class NeedsRoot(Exception):
    """The fault cannot be put in by this user."""


@dataclass(frozen=True)
class Outcome:
    """seen: what the user sees, as observed. way_out: how to get out of it."""

    seen: str
    way_out: str


@dataclass
class Scene:
    """A server, and what it has acknowledged."""

    folder: Path
    settings: dict[str, Any] = field(default_factory=dict)
    data_dir: Path | None = None
    server: "Faulty" = field(init=False)
    may_end: dict[str, set[str]] = field(default_factory=dict)  # by job
    frames: dict[str, dict[int, dict[str, Any]]] = field(default_factory=dict)  # that were read, by job

    def __post_init__(self) -> None:
        (self.folder / "faults").mkdir(parents=True, exist_ok=True)
        environment = {"FAULTS": str(self.folder / "faults"), "OMP_NUM_THREADS": "1"}
        self.server = Faulty(self.data_dir or self.folder / "data", self.folder / "log", environment, **self.settings)

    @contextmanager
    def going(self) -> Iterator[httpx.Client]:
        """The server, ready, with a finished job whose results were read."""
        with self.server.start(), self.client() as http:
            done = self.submit(http)
            self.ended(http, done)
            yield http

    def client(self) -> httpx.Client:
        return self.server.client()

    def submit(
        self, http: httpx.Client, *, more: bytes = b"", may_end: tuple[str, ...] = ("completed",), **fields: Any
    ) -> str:
        """Upload the sample, with more bytes behind it, and remember the promise."""
        answer = http.post("/api/upload", files={"file": ("sample.mp4", SAMPLE.read_bytes() + more)}, data=fields)
        assert answer.status_code == 202, answer.text
        job_id = answer.json()["job_id"]
        self.may_end[job_id] = set(may_end)
        return job_id

    def submit_url(self, http: httpx.Client, url: str, may_end: tuple[str, ...] = ("completed",), **fields: Any) -> str:
        answer = http.post("/api/submit", json={"video_url": url, **fields})
        assert answer.status_code == 202, answer.text
        job_id = answer.json()["job_id"]
        self.may_end[job_id] = set(may_end)
        return job_id

    def running(self, http: httpx.Client) -> str:
        """A long job that has some results, which were read."""
        job_id = self.submit(http, **LONG)
        wait_until(lambda: self.read(http, job_id) > 3)
        return job_id

    def read(self, http: httpx.Client, job_id: str) -> int:
        """Read results, and hold them against those read before. -> how many there are"""
        known = self.frames.setdefault(job_id, {})
        found = http.get(f"/api/jobs/{job_id}/frames?limit=1000").raise_for_status().json()["frames"]
        for frame in found:
            before = known.get(frame["frame_idx"]) or frame
            assert before == frame or before["status"] == "error", f"{job_id}: a result has changed: {frame}"
            known[frame["frame_idx"]] = frame
        assert len(known) == len(found), f"{job_id}: {len(known)} results were there, {len(found)} are"
        return len(found)

    def ended(self, http: httpx.Client, job_id: str, timeout_s: float = 120) -> dict[str, Any]:
        def status() -> dict[str, Any] | None:
            shown = http.get(f"/api/status/{job_id}?include_results=false").raise_for_status().json()
            return shown if shown["status"] in FINISHED else None

        shown = wait_until(status, timeout_s, 0.05)
        self.read(http, job_id)
        return shown

    def audit(self, http: httpx.Client) -> None:
        """All that was acknowledged is there, and ended as it may; completed jobs are whole."""
        for job_id, may_end in self.may_end.items():
            shown = self.ended(http, job_id)
            assert shown["status"] in may_end, f"{job_id} is {shown['status']}: {shown['error_message']}"
            if shown["status"] == "completed":
                assert shown["frames_processed"] == shown["total_frames_expected"] and not shown["frames_failed"], shown
        listed = http.get("/api/jobs/list?limit=100").json()
        missing = set(self.may_end) - {job["job_id"] for job in listed["jobs"]}
        assert not missing, f"lost: {missing}"

    def switch(self, fault: str, text: str | None = "") -> None:
        """Put a fault of faulty_server.py in, or with None take it away."""
        path = self.folder / "faults" / fault
        if text is None:
            path.unlink()
        else:
            path.write_text(text)

    def log(self) -> str:
        return self.server.log.read_text(encoding="utf-8")


class Faulty(ServerProcess):
    program = ("tests/faulty_server.py",)

    def wait_for_log(self, words: str, timeout_s: float = 30) -> None:
        wait_until(lambda: words in self.log.read_text(encoding="utf-8"), timeout_s, 0.1)


def answered(answer: httpx.Response) -> str:
    """An answer in a few words."""
    body = answer.json() if answer.content else {}
    return f"{answer.status_code} {body.get('code', '')}: {body.get('detail', '')}" if answer.is_error else "200"


FAULTS: dict[str, Callable[[Path], Outcome]] = {}


def fault(run: Callable[[Path], Outcome]) -> Callable[[Path], Outcome]:
    """Put a fault on the list, by its function's name. It raises AssertionError naming what does not hold."""
    FAULTS[run.__name__] = run
    return run


def main() -> int:
    import faults_disk
    import faults_net

    assert faults_disk.FAULTS is faults_net.FAULTS
    known = faults_disk.FAULTS
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="which faults (default: all)")
    parser.add_argument("--list", action="store_true", help="name them, and end")
    args = parser.parse_args()
    if args.list:
        print("\n".join(known))
        return 0
    found: dict[str, str] = {}
    for name in args.names or known:
        started_s = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="moonreel-fault-") as folder:
            try:
                outcome = known[name](Path(folder))
                found[name] = "held"
                print(f"| {name.replace('_', ' ')} | {outcome.seen} | {outcome.way_out} |", flush=True)
            except NeedsRoot as error:
                found[name] = "needs root"
                print(f"{name}: needs root: {error}", file=sys.stderr, flush=True)
            except Exception as error:
                found[name] = f"{type(error).__name__}: {error}"
                print(f"{name}: {found[name]}", file=sys.stderr, flush=True)
        print(f"{name}: {time.monotonic() - started_s:.0f} s", file=sys.stderr, flush=True)
    num_held, others = sum(text == "held" for text in found.values()), set(found.values()) - {"held"}
    print(json.dumps({"faults": len(found), "held": num_held, **({} if num_held == len(found) else found)}))
    return 0 if not others else EXIT_NEEDS_ROOT if others == {"needs root"} else 1


if __name__ == "__main__":
    sys.exit(main())
