"""Many visitors at once: `python -m tests.load` takes about 4 minutes.

200 visitors use a real server (python app.py, with its page, the demo model) as on a public address, without keys and
each from an address of its own: every one submits a job, asks for its status each 2 s, downloads what came out, and
begins anew; 50 of them follow their jobs by an event stream besides. One more submits as fast as it can, and has to be
told to wait. When time is up, all accepted jobs are waited for. The visitors share the machine with the server, so they
also measure how late a thread of theirs wakes up: that is part of every latency they see.

Prints a line now and then, and JSON as its last. Exit 0 only if nothing was answered 5xx but 507, every 429 said when
to come back and some came, the 99th percentile of status is below 250 ms, every accepted job was completed, every
stream and download was whole, and memory, open files, threads and children are back to what they were after the
warm-up. In pytest: tests/test_load.py
"""

import argparse
import json
import math
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # as pytest does

from kill_clients import make_clips  # noqa: E402
from local_server import LocalServer  # noqa: E402
from local_server import http as reply  # noqa: E402
from process_watch import Held, held, more_at_rest, percentile  # noqa: E402
from serving import ServerProcess  # noqa: E402
from visitors import Tally, Visitor, Wish  # noqa: E402

POLL_S = 2.0
MAX_P99_S = 0.25
MAX_GROWTH, MIN_GROWTH_BYTES = 0.10, 50_000_000  # of memory after the load, against that after the warm-up
REST_S = 5.0  # after the last job, before memory is looked at
DRAIN_S = 600.0
HURRY_S = 60.0  # who submits without pause may need them, on a busy machine, to be refused
FINISHED = ("completed", "failed", "canceled")
WARM_UP = 20


@dataclass
class Crowd:
    """Visitors at work, and what they were promised."""

    url: str
    wishes: list[Wish]
    tally: Tally = field(default_factory=Tally)
    job_ids: list[str] = field(default_factory=list)  # accepted
    completed: set[str] = field(default_factory=set)
    lags_s: list[float] = field(default_factory=list)
    ends_s: float = 0.0

    def run(self, num_visitors: int, num_followers: int, seconds: float, first: int = 0) -> None:
        """Let them in, over the first two seconds; they begin no job after `seconds`, and see to the end of theirs."""
        self.ends_s = time.monotonic() + seconds
        works: list[tuple[Callable[..., None], tuple[Any, ...]]] = [
            (self._visit, (first + number, number < num_followers, POLL_S * number / num_visitors))
            for number in range(num_visitors)
        ]
        works += [(self._hurry, (first + num_visitors,)), (self._measure_lag, ())]
        threads = [threading.Thread(target=self._guarded, args=(work, *args), daemon=True) for work, args in works]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _guarded(self, work: Callable[..., None], *args: Any) -> None:
        try:
            work(*args)
        except Exception as error:
            self.tally.complain(f"{work.__name__.strip('_')}{args}: {type(error).__name__}: {error}")

    def _visit(self, number: int, is_follower: bool, wait_s: float) -> None:
        rng = random.Random(number)
        time.sleep(wait_s)
        with closing(Visitor(self.url, number, self.tally)) as visitor:
            while True:
                if job_id := visitor.submit(rng.choice(self.wishes)):
                    self.job_ids.append(job_id)
                    self._see_to(job_id, visitor, number if is_follower else None, rng)
                if time.monotonic() > self.ends_s:
                    return

    def _see_to(self, job_id: str, visitor: Visitor, follower: int | None, rng: random.Random) -> None:
        stream: threading.Thread | None = None
        if follower is not None:
            reader = Visitor(self.url, follower, self.tally)
            stream = threading.Thread(target=self._guarded, args=(reader.follow, job_id), daemon=True)
            stream.start()
        deadline_s = self.ends_s + DRAIN_S
        while (status := visitor.poll(job_id)["status"]) not in FINISHED and time.monotonic() < deadline_s:
            time.sleep(POLL_S)
        if status == "completed":
            self.completed.add(job_id)
            visitor.download(job_id, rng)
        else:
            self.tally.complain(f"{job_id} was accepted and is {status}")
        if stream:
            stream.join(POLL_S + 30)
            if stream.is_alive():
                self.tally.complain(f"the events of {job_id} go on after its end")

    def _hurry(self, number: int) -> None:
        """Submit what is refused without a look at the disk, until the server asks to come back later."""
        with closing(Visitor(self.url, number, self.tally)) as visitor:
            body, headers = b'{"video_url": "ftp://x"}', {"Content-Type": "application/json"}
            while time.monotonic() < self.ends_s + HURRY_S:
                if visitor.ask("POST", "/api/submit", body, headers).status == 429:
                    return
        self.tally.complain("who submits without pause is not asked to come back later")

    def _measure_lag(self) -> None:
        while time.monotonic() < self.ends_s:
            started_s = time.perf_counter()
            time.sleep(0.05)
            self.lags_s.append(time.perf_counter() - started_s - 0.05)


def load(
    num_visitors: int,
    num_followers: int,
    seconds: float,
    folder: Path,
    *,
    warm_up: int = WARM_UP,
    rest_s: float = REST_S,
) -> int:
    """warm_up: visitors before, with one job each. -> exit code"""
    make_clips(folder)
    short = (folder / "short.mp4").read_bytes()
    with ExitStack() as stack:
        web = LocalServer()
        stack.callback(web.stop)
        web.replies["/short.mp4"] = [reply(short)]
        url = f"http://127.0.0.1:{web.port}/short.mp4"
        wishes = [
            Wish(short, {"target_fps": 1}),
            Wish(url, {"target_fps": 1}),
            Wish(url, {"caption_length": "short", "max_frames": 6}),
            Wish(short, {"question": "How many objects are there?", "start_s": 2, "end_s": 9}),
        ]
        # The demo model takes both cores else, and would not be what a GPU leaves of a machine.
        settings: dict[str, Any] = {"page": True, "allow_anonymous": True, "allow_private_urls": "127.0.0.1"}
        server = stack.enter_context(
            ServerProcess(folder / "data", environment={"OMP_NUM_THREADS": "1"}, **settings).start()
        )
        assert server.process
        pid = server.process.pid
        early = Crowd(server.url, wishes)
        early.run(warm_up, warm_up // 4, 1.0, first=60_000)
        time.sleep(rest_s)
        before = held(pid)
        tell("after the warm-up", before)
        crowd = Crowd(server.url, wishes)
        peak, is_over = [before], threading.Event()
        watcher = threading.Thread(target=watch, args=(pid, peak, crowd, is_over), daemon=True)
        watcher.start()
        crowd.run(num_visitors, num_followers, seconds)
        is_over.set()
        watcher.join()
        time.sleep(rest_s)
        after = held(pid)
        tell("at the end", after)
        if (code := server.stop()) != 0:
            crowd.tally.complain(f"the server ended with {code}")
        log = server.log.read_text(encoding="utf-8").splitlines()
    for line in log:
        if " ERROR " in line or " CRITICAL " in line or "Traceback" in line:
            crowd.tally.complain(line)
    for text in early.tally.wrong:
        crowd.tally.complain(f"in the warm-up: {text}")
    return judge(crowd, before, max(peak, key=lambda each: each.rss_bytes), after, num_visitors)


def watch(pid: int, peak: list[Held], crowd: Crowd, is_over: threading.Event) -> None:
    while not is_over.wait(1.0):
        peak.append(held(pid))
        if len(peak) % 20 == 0:
            accepted, completed = len(crowd.job_ids), len(crowd.completed)
            tell(f"{len(crowd.tally.poll_s)} polls, {completed} of {accepted} jobs completed", peak[-1])


def tell(what: str, now: Held) -> None:
    figures = f"{now.rss_bytes / 1e6:.0f} MB, {now.num_files} files, {now.num_threads} threads"
    print(f"{what}: {figures}, {now.num_children} children", flush=True)


def judge(crowd: Crowd, before: Held, peak: Held, after: Held, num_visitors: int) -> int:
    """Print what was found as JSON. -> exit code"""
    tally = crowd.tally
    poll_s = tally.poll_s or [math.inf]  # of nobody, if the server could not be reached
    p50_s, p95_s, p99_s = (percentile(poll_s, percent) for percent in (50, 95, 99))
    most_bytes = before.rss_bytes + max(MIN_GROWTH_BYTES, MAX_GROWTH * before.rss_bytes)
    if p99_s > MAX_P99_S:
        tally.complain(f"the 99th percentile of status is {1000 * p99_s:.0f} ms")
    if after.rss_bytes > most_bytes:
        tally.complain(f"memory went from {before.rss_bytes:,} to {after.rss_bytes:,} bytes")
    for text in more_at_rest(before, after):
        tally.complain(text)
    if not tally.statuses[429]:
        tally.complain("nobody was asked to come back later")
    for text in tally.wrong:
        print(text, file=sys.stderr)
    found = {
        "visitors": num_visitors,
        "requests": sum(tally.statuses.values()),
        "statuses": {str(status): count for status, count in sorted(tally.statuses.items())},
        "refusals": dict(tally.refusals),
        "events": tally.num_events,
        "downloaded_bytes": tally.num_downloaded_bytes,
        "jobs_accepted": len(crowd.job_ids),
        "jobs_completed": len(crowd.completed),
        "status_ms": {"p50": _ms(p50_s), "p95": _ms(p95_s), "p99": _ms(p99_s), "most": _ms(max(poll_s))},
        "wake_up_late_ms": {"p50": _ms(percentile(crowd.lags_s, 50)), "p99": _ms(percentile(crowd.lags_s, 99))},
        "before": asdict(before),
        "peak": asdict(peak),
        "after": asdict(after),
        "wrong": tally.num_wrong,
    }
    print(json.dumps(found), flush=True)
    return 1 if tally.num_wrong else 0


def _ms(seconds: float) -> float:
    return round(1000 * seconds, 1)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.load", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--visitors", type=int, default=200, help="(default: %(default)s)")
    parser.add_argument("--followers", type=int, default=50, help="of them (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=180, help="(default: %(default)s)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="moonreel-load-") as folder:
        return load(args.visitors, args.followers, args.seconds, Path(folder))


if __name__ == "__main__":
    sys.exit(main())
