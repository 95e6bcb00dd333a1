"""Jobs of all kinds without pause, for a long time: `python -m tests.soak --minutes 30`.

A real server (python app.py, with its page, the demo model) is used by a few visitors at once, each doing one thing
after another, in an order that --seed draws: videos uploaded, by URL, by gradio_client; captions, questions, other
questions about one frame and about all; jobs canceled, tried again and deleted; files that are no video, damaged or
not there; webhooks, event streams that are dropped in the middle, exports, the page. The server keeps few bytes
(RETENTION_BYTES), so that it deletes old jobs by itself all the time.

Each 10 s, what it holds of the machine is written to --samples, one JSON line each, so that an interrupted run keeps
what it has: resident memory, open files, threads, bytes and entries in its data directory and temporary folders. What
comes after the first fifth is judged: the slope of a straight line through it (least squares). Prints a line a minute,
and JSON as its last. Exit 0 only if nothing was answered 5xx but 507, everything ended as it should, no ERROR stands in
the log, memory and disk grow by less than the bounds below in an hour, and open files and threads are at the end,
after a rest, what they were at rest before. In pytest: tests/test_soak.py
"""

import argparse
import json
import random
import sys
import tempfile
import threading
import time
from collections import Counter
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
from process_watch import Held, held, more_at_rest, slope_per_hour  # noqa: E402
from serving import ServerProcess  # noqa: E402
from visitors import FORMATS, Tally, Visitor, Wish  # noqa: E402

SAMPLE_S, REST_S = 10.0, 8.0
POLL_S = 0.2
WARM_UP_SHARE = 0.2  # of the run, not judged
MAX_RSS_GROWTH, MAX_DISK_GROWTH = 0.03, 0.05  # of the mean, in an hour
NUM_ACTORS = 3
KEPT_BYTES = 30_000_000
JOB_S = 300.0
FINISHED = ("completed", "failed", "canceled")


@dataclass
class Actor:
    """Does one thing after another. Its methods named do_* are what can be done."""

    number: int
    server: ServerProcess
    web: LocalServer
    clips: dict[str, bytes]
    tally: Tally
    done: Counter[str]
    ends_s: float
    rng: random.Random = field(init=False)

    def run(self) -> None:
        self.rng = random.Random(self.number)
        deeds: dict[str, Callable[[], None]] = {
            name.removeprefix("do_"): getattr(self, name) for name in dir(self) if name.startswith("do_")
        }
        with closing(Visitor(self.server.url, self.number, self.tally)) as self.visitor:
            while time.monotonic() < self.ends_s:
                for name in self.rng.sample(sorted(deeds), len(deeds)):
                    if time.monotonic() > self.ends_s:
                        return
                    try:
                        deeds[name]()
                        self.done[name] += 1
                    except Exception as error:
                        self.tally.complain(f"{name}: {type(error).__name__}: {error}")

    # What can be done

    def do_upload(self) -> None:
        self._download(self._job(Wish(self.clips["long.mp4"], {"target_fps": 2})))

    def do_url(self) -> None:
        self._download(self._job(Wish(self._url("long.webm"), {"target_fps": 1, "reuse_similar": 0})))

    def do_caption(self) -> None:
        self._job(Wish(self.clips["short.mp4"], {"caption_length": self.rng.choice(("short", "normal", "long"))}))

    def do_window(self) -> None:
        options = {"question": "How many objects are there?", "start_s": 3, "end_s": 9, "temperature": 0.5}
        self._job(Wish(self.clips["long.mp4"], options))

    def do_gradio_client(self) -> None:
        from gradio_client import Client, handle_file

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "clip.mp4"
            path.write_bytes(self.clips["short.mp4"])
            token: Any = False  # Gradio's type says str | None
            client = Client(self.server.url, verbose=False, token=token, analytics_enabled=False, download_files=False)
            job_id = client.predict(handle_file(path), api_name="/submit_file")["job_id"]
            last = list(client.submit(job_id, api_name="/wait"))[-1]
            assert last["status"] == "completed", last  # type: ignore[index, call-overload]
            client.close()

    def do_ask_about_a_frame(self) -> None:
        job_id = self._job(Wish(self.clips["short.mp4"], {"max_frames": 2}))
        body = json.dumps({"question": "Is there a circle?", "frame_idx": 0}).encode()
        answer = self.visitor.ask("POST", f"/api/jobs/{job_id}/ask", body, {"Content-Type": "application/json"})
        assert answer.status == 200, answer.content

    def do_ask_about_all(self) -> None:
        job_id = self._job(Wish(self.clips["short.mp4"], {"max_frames": 4}))
        body = json.dumps({"question": "How many objects are there?"}).encode()
        answer = self.visitor.ask("POST", f"/api/jobs/{job_id}/ask", body, {"Content-Type": "application/json"})
        assert answer.status == 202, answer.content
        self._end(answer.json()["job_id"], "completed")

    def do_cancel_retry_delete(self) -> None:
        job_id = self._submit(Wish(self.clips["long.mp4"], {"target_fps": 2, "reuse_similar": 0}))
        canceled = self.visitor.ask("POST", f"/api/jobs/{job_id}/cancel")
        if canceled.status == 200:  # else it was done before
            self._end(job_id, "canceled")
            assert self.visitor.ask("POST", f"/api/jobs/{job_id}/retry").status == 200
        self._end(job_id, "completed")
        assert self.visitor.ask("DELETE", f"/api/jobs/{job_id}").status == 204
        assert self.visitor.ask("GET", f"/api/status/{job_id}").status == 404

    def do_no_video(self) -> None:
        body = Wish(b"This is no video at all.", {})
        assert self.visitor.submit(body) is None  # 415, counted below
        self._job(Wish(self._url("missing.mp4"), {}), "failed")

    def do_damaged(self) -> None:
        self._job(Wish(self.clips["damaged.mp4"], {}))

    def do_webhook(self) -> None:
        before = self._num_webhooks()
        self._job(Wish(self.clips["short.mp4"], {"max_frames": 1, "webhook_url": self._url("hook")}))
        deadline_s = time.monotonic() + 30
        while self._num_webhooks() == before:
            assert time.monotonic() < deadline_s, "no webhook came"
            time.sleep(POLL_S)

    def do_follow(self) -> None:
        self.visitor.follow(self._submit(Wish(self.clips["short.mp4"], {})))

    def do_drop_a_stream(self) -> None:
        job_id = self._submit(Wish(self.clips["long.mp4"], {"target_fps": 2}))
        self.visitor.drop(job_id)
        self._end(job_id, "completed")

    def do_page(self) -> None:
        for path in ("/", "/config", "/theme.css", "/api/sample.mp4", "/api/jobs/list", "/openapi.json", "/metrics"):
            assert self.visitor.ask("GET", path).status == 200, path

    # How

    def _url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.web.port}/{name}"

    def _num_webhooks(self) -> int:
        return sum(request.startswith("POST /hook") for request in self.web.requests)

    def _submit(self, wish: Wish) -> str:
        while not (job_id := self.visitor.submit(wish)):
            assert time.monotonic() < self.ends_s + JOB_S
        return job_id

    def _job(self, wish: Wish, expected: str = "completed") -> str:
        return self._end(self._submit(wish), expected)

    def _end(self, job_id: str, expected: str) -> str:
        deadline_s = time.monotonic() + JOB_S
        while (status := self.visitor.poll(job_id)["status"]) not in FINISHED:
            assert time.monotonic() < deadline_s, f"{job_id} is {status}"
            time.sleep(POLL_S)
        assert status == expected, f"{job_id} is {status}, not {expected}"
        return job_id

    def _download(self, job_id: str) -> None:
        self.visitor.download(job_id, self.rng)
        for name in FORMATS:
            assert self.visitor.ask("GET", f"/api/jobs/{job_id}/export?format={name}").status == 200


def soak(
    minutes: float,
    seed: int,
    folder: Path,
    samples: Path,
    *,
    sample_s: float = SAMPLE_S,
    rest_s: float = REST_S,
) -> int:
    """-> exit code"""
    make_clips(folder)
    clips = {name: (folder / name).read_bytes() for name in ("long.mp4", "long.webm", "short.mp4")}
    clips["damaged.mp4"] = (ROOT / "tests" / "data" / "odd" / "corrupt_mid.mp4").read_bytes()
    temporary = folder / "tmp"
    temporary.mkdir()
    settings: dict[str, Any] = {
        "page": True,
        "allow_private_urls": "127.0.0.1",
        "allow_anonymous": True,
        "retention_bytes": KEPT_BYTES,
        "answer_cache_bytes": KEPT_BYTES // 6,
        "rate_limit_per_minute": 100_000,
    }
    environment = {"OMP_NUM_THREADS": "1", "TMPDIR": str(temporary)}
    tally, done = Tally(), Counter[str]()
    with ExitStack() as stack:
        web = LocalServer()
        stack.callback(web.stop)
        web.replies |= {"/long.webm": [reply(clips["long.webm"])], "/hook": [reply()]}
        server = stack.enter_context(ServerProcess(folder / "data", environment=environment, **settings).start())
        assert server.process
        pid, folders = server.process.pid, (folder / "data", temporary)

        def act(seconds: float) -> list[threading.Thread]:
            ends_s = time.monotonic() + seconds
            actors = [Actor(seed + i, server, web, clips, tally, done, ends_s) for i in range(NUM_ACTORS)]
            threads = [threading.Thread(target=actor.run, daemon=True) for actor in actors]
            for thread in threads:
                thread.start()
            return threads

        for thread in act(min(20.0, minutes * 10)):
            thread.join()
        time.sleep(rest_s)
        before = held(pid, *folders)
        threads = act(60 * minutes)
        taken: list[tuple[float, Held]] = []
        started_s = time.monotonic()
        with samples.open("w", encoding="utf-8") as file:
            while any(thread.is_alive() for thread in threads):
                taken.append((time.monotonic() - started_s, held(pid, *folders)))
                file.write(json.dumps({"s": round(taken[-1][0], 1), **asdict(taken[-1][1])}) + "\n")
                file.flush()
                if len(taken) % 6 == 0:
                    tell(*taken[-1], sum(done.values()))
                threads[0].join(sample_s)
        time.sleep(rest_s)
        after = held(pid, *folders)
        if (code := server.stop()) != 0:
            tally.complain(f"the server ended with {code}")
        log = server.log.read_text(encoding="utf-8").splitlines()
    for line in log:
        if " ERROR " in line or " CRITICAL " in line or "Traceback" in line:
            tally.complain(line)
    return judge(taken, before, after, tally, done)


def tell(seconds: float, now: Held, num_done: int) -> None:
    figures = f"{now.rss_bytes / 1e6:.1f} MB, {now.num_files} files, {now.num_threads} threads"
    disk = f"{now.disk_bytes / 1e6:.1f} MB in {now.num_disk_entries} entries on the disk"
    print(f"{seconds / 60:.1f} min, {num_done} things done: {figures}, {disk}", flush=True)


def judge(taken: list[tuple[float, Held]], before: Held, after: Held, tally: Tally, done: Counter[str]) -> int:
    """Print what was found as JSON. -> exit code"""
    judged = taken[int(len(taken) * WARM_UP_SHARE) :]
    times_s = [seconds for seconds, _ in judged]
    slopes: dict[str, float] = {}
    for name in ("rss_bytes", "num_files", "num_threads", "disk_bytes", "num_disk_entries"):
        values = [getattr(each, name) for _, each in judged]
        slopes[name] = slope_per_hour(times_s, values)
        bound = {"rss_bytes": MAX_RSS_GROWTH, "disk_bytes": MAX_DISK_GROWTH, "num_disk_entries": MAX_DISK_GROWTH}.get(
            name
        )
        mean = sum(values) / len(values)
        if bound is not None and slopes[name] > bound * mean:
            tally.complain(f"{name} grows by {slopes[name]:,.0f} an hour, from {values[0]:,} to {values[-1]:,}")
    for text in more_at_rest(before, after):
        tally.complain(text)
    for text in tally.wrong:
        print(text, file=sys.stderr)
    found = {
        "minutes": round(taken[-1][0] / 60, 1),
        "done": dict(done),
        "requests": sum(tally.statuses.values()),
        "statuses": {str(status): count for status, count in sorted(tally.statuses.items())},
        "slopes_per_hour": {name: round(slope, 1) for name, slope in slopes.items()},
        "before": asdict(before),
        "after": asdict(after),
        "wrong": tally.num_wrong,
    }
    print(json.dumps(found), flush=True)
    return 1 if tally.num_wrong else 0


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=30, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="(default: %(default)s)")
    parser.add_argument("--samples", type=Path, default=Path("soak-samples.jsonl"), help="(default: %(default)s)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="moonreel-soak-") as folder:
        return soak(args.minutes, args.seed, Path(folder), args.samples)


if __name__ == "__main__":
    sys.exit(main())
