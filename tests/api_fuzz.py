"""Random requests to every route of a running server: `python -m tests.api_fuzz --minutes 5 [--seed N]`.

schemathesis makes them from the server's own /openapi.json: examples, boundary values, random valid and invalid data,
and sequences in which the job of one answer is what the next request is about. Each answer is held against the
document: status, content type, headers, body. Three servers get a share of the time each: an open one, one that soon
is full, and one that asks for keys. All of them have a proxy of ours, and one that connects elsewhere is told on.

Prints the requests by route and status, and what is wrong; the last line is JSON. Exit 0 only if nothing is wrong: no
answer, no line of a server's log, no record of its store. Knows schemathesis 4.32, whose engine it drives.
"""

import argparse
import contextlib
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any
from unittest.mock import patch

import httpx
import schemathesis
from hypothesis import strategies as st
from schemathesis.core.failures import AcceptedNegativeData, Failure, ServerError
from schemathesis.core.mutations import OperatorKind
from schemathesis.engine import events, from_schema
from schemathesis.hooks import unregister
from schemathesis.openapi.checks import AllowHeaderMismatch, UndefinedStatusCode

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # as pytest does

from local_server import MP4, LocalServer, http  # noqa: E402
from serving import ServerProcess, wait_until  # noqa: E402
from video_files import write_video  # noqa: E402

KEYS = {"ann": "ann-" + 16 * "a", "root": "root-" + 16 * "r"}
REQUEST_S = 20.0  # no answer takes longer
EVENTS_S = 0.5  # of an event stream to read: that of a waiting job does not end
# What may be answered to a valid request: a schema cannot say which URLs may be followed, what is a video, and which
# fields fit together; 413 because a server may take less than others, in bytes as they are escaped.
REFUSED = ("401", "403", "404", "409", "413", "429", "507")
MORE_REFUSED = (*REFUSED, "400", "415", "422")  # of the routes that submit
STATES = ("completed", "failed", "canceled", "unknown")
NUM_IN_STOCK = 3  # jobs of each
NO_JOB = "job_00000000-0000-4000-8000-000000000000"
VIDEO_URLS = (
    "http://video.example/video.mp4",  # the only one behind which the proxy has something
    "https://video.example/video.mp4?token=secret#part",
    "http://video.example:8080/none.mp4",
    "http://127.0.0.1/video.mp4",
    "http://[::1]:8080/",
    "https://ann:secret@video.example/",
    "ftp://video.example/video.mp4",
    "http://bücher.example/ü?ü",
)
# Runs in the server first of all, and sees what Python asks the system for: https://peps.python.org/pep-0578/
GUARD = """
import sys
ASKED = ("socket.connect", "socket.sendto", "socket.sendmsg", "socket.getaddrinfo", "socket.gethostbyname")
def watch(event, args):
    if event in ASKED:
        asked = args[0 if "get" in event else 1]
        host = asked[0] if isinstance(asked, tuple) else asked
        if host is not None and str(host) not in ("127.0.0.1", "::1", "localhost"):
            with open({told!r}, "a") as file:
                file.write(f"{{event}} {{asked}}\\n")
sys.addaudithook(watch)
"""


@dataclass(frozen=True)
class Plan:
    """One of the servers."""

    name: str
    share: float  # of the time
    settings: dict[str, Any]
    key: str | None = None


OPEN = Plan("open", 0.7, {})
FULL = Plan(
    "full",
    0.15,
    {
        "rate_limit_per_minute": 300,
        "max_queued_jobs": 1,
        "max_queued_jobs_per_caller": 1,
        "max_running_jobs": 1,
        "max_video_bytes": 20_000,
        "retention_bytes": 100_000,
        "max_tokens": 20,
    },
)
KEYED = Plan("keyed", 0.15, {"api_keys": f"ann:{KEYS['ann']}", "admin_keys": f"root:{KEYS['root']}"}, KEYS["root"])
GENEROUS = {
    "rate_limit_per_minute": 1_000_000,
    "max_queued_jobs": 100_000,
    "max_queued_jobs_per_caller": 100_000,
    "max_video_bytes": 2_000_000,
    "log_format": "json",
}


@dataclass
class Findings:
    """What was seen of all servers."""

    counts: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))  # by route, by status
    num_failures: Counter[str] = field(default_factory=Counter)
    shown: set[tuple[str, str]] = field(default_factory=set)

    def add(self, kind: str, title: str, text: str) -> None:
        """kind: undocumented, server_errors or schema_failures. The same thing is printed once."""
        self.num_failures[kind] += 1
        if (kind, title) not in self.shown and len(self.shown) < 50:
            self.shown.add((kind, title))
            print(f"WRONG ({kind}): {title}\n{text}\n", flush=True)

    def report(self, seconds: float) -> int:
        for route, statuses in sorted(self.counts.items()):
            listed = ", ".join(f"{count} x {status}" for status, count in sorted(statuses.items()))
            print(f"{route:45} {sum(statuses.values()):6}: {listed}")
        kinds = ("undocumented", "server_errors", "schema_failures")
        failures = {kind: self.num_failures[kind] for kind in kinds}
        num_requests = sum(sum(statuses.values()) for statuses in self.counts.values())
        total = {"requests": num_requests, "routes": len(self.counts), **failures, "seconds": round(seconds, 1)}
        print(json.dumps(total))
        return 1 if any(failures.values()) else 0


class Stock:
    """Real jobs for the fuzzer, which knows their states and not their ids: "failed" stands for a job that failed.

    So a job that was deleted or retried is replaced, and a request that is sent again still finds one."""

    def __init__(self, client: httpx.Client, video: bytes, rng: random.Random) -> None:
        self._client, self._rng = client, rng
        self._uploads = {"completed": video, "failed": MP4, "canceled": video}
        self._job_ids: dict[str, list[str]] = {state: [] for state in self._uploads}

    def fill(self) -> None:
        for state, job_ids in self._job_ids.items():
            made = [self._make(state) for _ in range(NUM_IN_STOCK)]
            job_ids += filter(None, made)
        for job_id in chain.from_iterable(self._job_ids.values()):
            wait_until(lambda job_id=job_id: self._is_over(job_id))

    def take(self, state: str, *, is_used_up: bool) -> str:
        """-> the id of a job that is, will be or was in this state; of none if the server takes no more jobs"""
        if is_used_up and state == "completed":  # a fresh one: those in stock took a while
            return self._make(state) or NO_JOB
        job_ids = self._job_ids.get(state, [])
        if state in self._uploads and len(job_ids) < NUM_IN_STOCK and (job_id := self._make(state)):
            job_ids.append(job_id)
        if not job_ids:
            return NO_JOB
        return job_ids.pop(0) if is_used_up else self._rng.choice(job_ids)

    def _make(self, state: str) -> str:
        """-> a job's id, or "" if it is refused"""
        files = {"file": ("ü.mp4", self._uploads[state])}
        job_id = self._client.post("/api/upload", files=files, data={"target_fps": "25"}).json().get("job_id", "")
        if job_id and state == "canceled":
            self._client.post(f"/api/jobs/{job_id}/cancel")
        return job_id

    def _is_over(self, job_id: str) -> bool:
        answer = self._client.get(f"/api/status/{job_id}", params={"include_results": False})
        return answer.json().get("status") not in ("submitted", "processing")  # None: purged


def fuzz(minutes: float, seed: int, plans: tuple[Plan, ...] = (OPEN, FULL, KEYED)) -> int:
    started_s, findings = time.monotonic(), Findings()
    total = sum(plan.share for plan in plans)
    with tempfile.TemporaryDirectory(prefix="moonreel-") as temporary:
        folder = Path(temporary)
        videos = [
            write_video(folder / "a.avi", num_frames=3).read_bytes(),
            write_video(folder / "b.mp4", codec="libx264", pix_fmt="yuv420p", num_frames=8).read_bytes(),
        ]
        schemathesis.openapi.format("binary", st.one_of(st.sampled_from([*videos, MP4]), st.binary()))
        for plan in plans:
            fuzz_server(plan, 60 * minutes * plan.share / total, seed, folder / plan.name, videos, findings)
    return findings.report(time.monotonic() - started_s)


def fuzz_server(plan: Plan, seconds: float, seed: int, folder: Path, videos: list[bytes], findings: Findings) -> None:
    """Start a server, send it requests for so many seconds, and look at what it leaves."""
    folder.mkdir()
    with contextlib.ExitStack() as stack:
        proxy = LocalServer()
        stack.callback(proxy.stop)
        proxy.replies[VIDEO_URLS[0]] = [http(videos[1])]
        settings = {**GENEROUS, **plan.settings, "proxy_url": f"http://127.0.0.1:{proxy.port}"}
        told = write_guard(folder)
        with guarded(folder):
            server = stack.enter_context(ServerProcess(folder / "data", **settings)).start()
        headers = {"Authorization": f"Bearer {plan.key}"} if plan.key else {}
        client = stack.enter_context(server.client(headers=headers))
        stock = Stock(client, videos[0], random.Random(seed))
        stock.fill()
        run_engine(plan, server.url, headers, max(1, round(seconds)), seed, stock, findings)
        if client.get("/api/ready").status_code != 200:
            findings.add("server_errors", f"{plan.name}: not ready any more", server.log.read_text(encoding="utf-8"))
        if code := server.stop():
            findings.add("server_errors", f"{plan.name}: exit code {code}", "")
        look_at_log(plan, server.log, findings)
        if told.exists():
            findings.add("server_errors", f"{plan.name}: went beyond this host", told.read_text(encoding="utf-8"))
    command = [sys.executable, "-m", "jobs.store", "check", str(folder / "data")]
    check = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if check.returncode:
        findings.add("server_errors", f"{plan.name}: the store is damaged", check.stdout + check.stderr)


def write_guard(folder: Path) -> Path:
    """-> the file that is there once a server started in guarded() asked for anything but 127.0.0.1"""
    told = folder / "told"
    (folder / "sitecustomize.py").write_text(GUARD.format(told=str(told)), encoding="utf-8")
    return told


def guarded(folder: Path) -> AbstractContextManager[Any]:
    return patch.dict("os.environ", PYTHONPATH=str(folder))


def look_at_log(plan: Plan, log: Path, findings: Findings) -> None:
    """Each line is JSON; anything else was written by a dying interpreter."""
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
        level = json.loads(line)["levelname"] if line.startswith("{") else "no line of a log"
        if level not in ("INFO", "WARNING"):
            findings.add("server_errors", f"{plan.name}: log: {line[:120]}", line[:4000])


def run_engine(
    plan: Plan, url: str, headers: dict[str, str], seconds: int, seed: int, stock: Stock, findings: Findings
) -> None:
    config = schemathesis.Config.from_dict(engine_config(plan, headers, seconds, seed))
    with hooks(stock, findings):
        schema = schemathesis.openapi.from_url(f"{url}/openapi.json", config=config)
        for event in from_schema(schema).execute():
            if isinstance(event, events.ScenarioFinished):
                for nodes in event.recorder.checks.values():
                    for info in filter(None, (node.failure_info for node in nodes)):
                        add_failure(plan, info.failure, info.code_sample, findings)
            elif isinstance(event, events.NonFatalError):
                text = event.info.format()
                findings.add("server_errors", f"{plan.name}: {event.label}: {event.info.title}", text)
            elif isinstance(event, events.FatalError):
                raise event.exception


def add_failure(plan: Plan, failure: Failure, sample: str, findings: Findings) -> None:
    kind = "schema_failures"
    if isinstance(failure, UndefinedStatusCode):
        kind = "undocumented"
    elif isinstance(failure, ServerError):
        kind = "server_errors"
    title = f"{plan.name}: {failure.operation}: {failure.title}"
    findings.add(kind, f"{title}: {failure.message.splitlines()[0][:80]}", f"{failure.message}\n{sample[:2000]}")


def engine_config(plan: Plan, headers: dict[str, str], seconds: int, seed: int) -> dict[str, Any]:
    """As in a schemathesis.toml."""
    return {
        "seed": seed,
        "max-time": seconds,
        "continue-on-failure": True,
        "request-timeout": REQUEST_S,
        "headers": headers,
        "cache": {"enabled": False},
        "generation": {"database": "none", "no-shrink": True},
        "checks": {
            "not_a_server_error": {"expected-statuses": ["2xx", "3xx", "4xx", "507"]},
            "positive_data_acceptance": {"expected-statuses": ["2xx", "304", "416", *REFUSED]},
            "negative_data_rejection": {"expected-statuses": ["405", *MORE_REFUSED]},
        },
        "dictionaries": {
            "states": {"values": ["completed", "completed", *STATES]},
            "frames": {"values": [0, 1, 2, 7, 1 << 64]},
            "urls": {"values": list(VIDEO_URLS)},
            "ranges": {
                "values": ["bytes=0-99", "bytes=100-", "bytes=-7", "bytes=9-5", "bytes=9999999-", "bytes=0-1,3-4"]
            },
        },
        "parameters": {
            "path.job_id": {"dictionary": "states", "probability": 0.9},
            "path.frame_idx": {"dictionary": "frames", "probability": 0.9},
            "header.Range": {"dictionary": "ranges", "probability": 0.5},
            "query.video_url": {"dictionary": "urls", "probability": 0.3},
            "body.video_url": {"dictionary": "urls", "probability": 0.6},
        },
        "operations": [
            {"include-path": "/api/jobs/{job_id}/events", "request-timeout": EVENTS_S},
            {
                "include-path": ["/api/submit", "/api/upload", "/api/jobs/{job_id}/ask"],
                "checks": {"positive_data_acceptance": {"expected-statuses": ["200", "202", *MORE_REFUSED]}},
            },
        ],
    }


@contextlib.contextmanager
def hooks(stock: Stock, findings: Findings) -> Iterator[None]:
    """Put real jobs and videos into requests, and count these."""

    def before_call(context: schemathesis.HookContext, case: schemathesis.Case, kwargs: dict[str, Any]) -> None:
        if (state := case.path_parameters.get("job_id")) in STATES:
            is_used_up = case.method == "DELETE" or case.path.endswith("/retry")
            case.path_parameters["job_id"] = stock.take(state, is_used_up=is_used_up)

    def after_call(context: schemathesis.HookContext, case: schemathesis.Case, response: schemathesis.Response) -> None:
        is_route = case.method == case.operation.method.upper()
        findings.counts[case.operation.label if is_route else "other methods"][str(response.status_code)] += 1

    def filter_failure(
        context: schemathesis.HookContext, failure: Failure, case: schemathesis.Case, response: schemathesis.Response
    ) -> bool:
        return not is_meant(failure, case)

    for hook in (before_call, after_call, filter_failure):
        schemathesis.hook(hook)
    try:
        yield
    finally:
        for hook in (before_call, after_call, filter_failure):
            unregister(hook)


def is_meant(failure: Failure, case: schemathesis.Case) -> bool:
    """Say whether the document could not be told better."""
    if isinstance(failure, AllowHeaderMismatch):  # DELETE works there, on a job of the name "list"
        return case.path == "/api/jobs/list" and failure.undocumented_methods == ["DELETE"]
    if isinstance(failure, AcceptedNegativeData) and case.meta:  # "1" and true count as 1, which forms and queries need
        data = case.meta.phase.data
        is_type = all(mutation.operator is OperatorKind.CHANGE_TYPE for mutation in data.mutations)
        return case.path == "/api/submit" and (is_type or "Incorrect type" in (data.description or ""))
    return False


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.api_fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=5, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="(default: %(default)s)")
    args = parser.parse_args()
    return fuzz(args.minutes, args.seed)


if __name__ == "__main__":
    sys.exit(main())
