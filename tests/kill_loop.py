"""A server that is killed again and again: `python -m tests.kill_loop --runs 200` takes about 15 minutes.

`kill -9` hits a real server (python app.py, the demo model) at random moments: while it starts, loads the model,
downloads, describes, stores, compacts its journal. Each time it is started on the same data. All along, clients upload,
submit URLs, read, cancel, retry and delete; half of their submits have an Idempotency-Key, with which they go on after
a broken connection. Then the server is left alone until all is done, and Audit holds what it has against what it
acknowledged, against what clients have read, and against the results of a server that nobody disturbed.

Two deaths over the same frame, alone in the model, or three starts that stored no frame: then the server blames the
video (jobs/job_run.py), and rightly. Random kills would bring that about 0 to 4 times in 60 runs. So a kill that could
looks first: it stops the process, reads what is on the disk, and if the next start would blame the video, lets it go on
for a moment, and looks again. That makes the chance 0, and spares no other moment. "spared" counts these kills.

Prints a line now and then, and JSON as its last. Exit 0 only if all from "lost" to "wrong" are 0; else the data
directory is kept and named. The same --seed draws the same moments and requests, but threads take their own time.
In pytest: tests/test_kill_loop.py
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import httpx
import numpy as np
from av.video.stream import VideoStream

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # as pytest does

from local_server import LocalServer  # noqa: E402
from serving import ServerProcess, wait_until  # noqa: E402

from jobs.job_run import MAX_DEATHS_OVER_FRAME, MAX_STARTS_WITHOUT_FRAME  # noqa: E402
from jobs.journal import Change, decode, encode, lines  # noqa: E402
from jobs.store import COMPACT_EXTRA_LINES  # noqa: E402
from pipeline.demo.scenes import draw_scene, random_scene  # noqa: E402

NUM_CLIENTS, MAX_UNFINISHED = 2, 4  # the second: of a client
KEY = "kill-loop-0123456789"
EARLY_SHARE, EARLY_S = 0.25, (0.1, 3.0)  # of the kills: those counted from the start of the process
# The others come after the model is loaded, which takes a quiet machine 2.4 s; at most so many times later.
MAX_LATE, MAX_READY_S = 1.7, 12.0
FILL_EVERY = 6  # runs: then the journal is due for a compaction
DRIP_S = 1.2  # of a download
COMPARED = ("frame_idx", "timestamp_ms", "description", "status", "reused_from_frame_idx")
NOT_SENT = (httpx.ConnectError, httpx.UnsupportedProtocol)  # the second: no server was started yet
FINISHED = ("completed", "failed", "canceled")
# What a client does with a job after the submit, each at some moment.
PLANS = (
    (),
    (),
    (),
    (),
    (),
    (),
    ("cancel",),
    ("cancel", "retry"),
    ("cancel", "retry"),
    ("cancel", "delete"),
    ("delete",),
)


@dataclass(frozen=True)
class Kind:
    """A kind of request."""

    clip: str
    is_upload: bool
    options: dict[str, Any] = field(default_factory=dict)


KINDS = {
    "upload": Kind("long.mp4", True, {"target_fps": 2}),
    "download": Kind("long.webm", False, {"target_fps": 2}),
    "caption": Kind("short.mp4", True, {"caption_length": "short"}),
    "window": Kind("long.mp4", False, {"start_s": 4, "end_s": 18, "question": "How many objects are there?"}),
    "first frames": Kind("long.webm", True, {"target_fps": 2, "max_frames": 15}),
}
CLIPS = {"long.mp4": 44, "long.webm": 44, "short.mp4": 24}  # frames, each of another scene; 2 are shown in a second


@dataclass
class Job:
    """What a client has been told of a job."""

    number: int  # in its metadata
    kind: str
    key: str | None
    plan: list[str]
    job_id: str | None = None  # once acknowledged
    may_end: set[str] = field(default_factory=lambda: {"completed"})  # "deleted" among them
    last_seq_at_cancel: int | None = None
    seen: list[dict[str, Any]] = field(default_factory=list)  # frame results
    is_finished: bool = False


class Victim(ServerProcess):
    """start() does not wait for an answer: clients, and the kill, come at any time."""

    def start(self, *, is_ready: bool = True) -> ServerProcess:
        self._num_log_bytes = self.log.stat().st_size if self.log.exists() else 0  # of the starts before
        return super().start(is_ready=is_ready)

    def is_ready(self) -> bool:
        return super()._answers("ready")

    def is_working(self) -> bool:
        """Whether the model is loaded, as the log tells: asking costs more."""
        with self.log.open("rb") as log:
            log.seek(self._num_log_bytes)
            return b" Ready: " in log.read()

    def _answers(self, path: str) -> bool:
        return True


class Client(threading.Thread):
    """Submits jobs, reads, cancels, retries and deletes them, and keeps account of what was acknowledged."""

    def __init__(self, number: int, server: ServerProcess, clips: Path, web_port: int, seed: int) -> None:
        super().__init__(daemon=True)
        self.jobs: list[Job] = []
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.is_to_end = threading.Event()
        self._number, self._server, self._clips = number, server, clips
        self._web_url = f"http://127.0.0.1:{web_port}"
        self._rng = random.Random(f"{seed} {number}")
        self._http = httpx.Client(timeout=30, trust_env=False, headers={"Authorization": f"Bearer {KEY}"})

    def run(self) -> None:
        while not self.is_to_end.is_set():
            try:
                self._act()
            except NOT_SENT:
                time.sleep(0.1)
            except httpx.TransportError:
                self.counts["broken"] += 1
            except Exception as error:
                self.wrong.append(f"client {self._number}: {type(error).__name__}: {error}")
            time.sleep(self._rng.uniform(0.02, 0.2))

    def close(self) -> None:
        self.is_to_end.set()
        if self.ident is not None:
            self.join()
        self._http.close()

    def settle(self) -> None:
        """Submit again what has a key and was not acknowledged, and look at everything for the last time."""
        for job in self.jobs:
            if job.job_id is None and job.key:
                self.submit(job)
        for job in self.jobs:
            if job.job_id:
                self.look(job)

    def _act(self) -> None:
        unfinished = [job for job in self.jobs if not job.is_finished]
        if len(unfinished) < MAX_UNFINISHED:
            number, name = 100_000 * self._number + len(self.jobs), self._rng.choice(list(KINDS))
            key = f"key {number}" if self._rng.random() < 0.5 else None
            unfinished = [Job(number, name, key, list(self._rng.choice(PLANS)))]
            self.jobs += unfinished
        job = self._rng.choice(unfinished)
        if job.job_id is None or (job.key and "deleted" not in job.may_end and self._rng.random() < 0.05):
            self.submit(job)
        elif job.plan and self._rng.random() < 0.2:
            self._do(job, job.plan[0])
        else:
            self.look(job)

    def submit(self, job: Job) -> None:
        kind, known = KINDS[job.kind], job.job_id
        asked = {**kind.options, "metadata": {"number": job.number}}
        headers = {"Idempotency-Key": job.key} if job.key else {}
        try:
            if kind.is_upload:
                form = {**asked, "metadata": json.dumps(asked["metadata"])}
                files = {"file": (self._clips / kind.clip).read_bytes()}
                answer = self._ask("POST", "upload", files=files, data=form, headers=headers)
            else:
                asked["video_url"] = f"{self._web_url}/{kind.clip}"
                answer = self._ask("POST", "submit", json=asked, headers=headers)
        except httpx.TransportError as error:
            # Where nobody knows whether it arrived, it takes a key to try again.
            job.is_finished = not job.key and not isinstance(error, NOT_SENT)
            raise
        if answer.status_code != 202:
            self._wonder(job, "submit", answer)
            return
        job.job_id, job.is_finished = answer.json()["job_id"], False
        if known not in (None, job.job_id):
            self.wrong.append(f"{known}: its key was given to {job.job_id}, too")

    def look(self, job: Job) -> None:
        """Read a job's status, and the frame results that are new."""
        answer = self._ask("GET", f"status/{job.job_id}?include_results=false")
        if answer.status_code == 404 and "deleted" in job.may_end:
            job.may_end, job.is_finished = {"deleted"}, True
        elif answer.status_code != 200:
            self._wonder(job, "status", answer)
        else:
            status = answer.json()["status"]
            if status in job.may_end:
                job.may_end = {status}  # from now on, but for what is yet asked of it
            job.is_finished = status in FINISHED and not job.plan
            frames = self._ask("GET", f"jobs/{job.job_id}/frames?limit=1000&after={len(job.seen)}").json()["frames"]
            if [frame["seq"] for frame in frames] != list(range(len(job.seen) + 1, len(job.seen) + len(frames) + 1)):
                self.wrong.append(f"{job.job_id}: after seq {len(job.seen)} came {[f['seq'] for f in frames]}")
            job.seen += frames

    def _do(self, job: Job, action: str) -> None:
        method, path = ("DELETE", "") if action == "delete" else ("POST", f"/{action}")
        effect = {"cancel": "canceled", "retry": "completed", "delete": "deleted"}[action]
        before, job.may_end = job.may_end, job.may_end | {effect}  # until the answer is here
        answer = self._ask(method, f"jobs/{job.job_id}{path}")
        status, code = answer.status_code, answer.json()["code"] if answer.status_code >= 400 else ""
        if status in (200, 204):
            job.may_end, job.last_seq_at_cancel = {effect}, answer.json()["last_seq"] if action == "cancel" else None
            self.counts[f"{action} acknowledged"] += 1
        elif status == 404 and "deleted" in before:  # by the request before, whose answer never came
            job.may_end = {"deleted"}
        elif status == 409:
            job.may_end = before
        else:
            self._wonder(job, action, answer)
        if status != 409 or code in ("job_finished", "not_retryable"):
            job.plan = job.plan[1:]
        job.is_finished = "deleted" in job.may_end and len(job.may_end) == 1

    def _ask(self, method: str, path: str, **options: Any) -> httpx.Response:
        return self._http.request(method, f"{self._server.url}/api/{path}", **options)

    def _wonder(self, job: Job, what: str, answer: httpx.Response) -> None:
        self.wrong.append(f"{job.job_id or job.number}: {what} was answered {answer.status_code}: {answer.text[:200]}")


# What is on the disk


def stored(path: Path) -> Iterator[dict[str, Any]]:
    """The documents of each change of a journal that nobody writes; a torn last line is left out."""
    for change in map(decode, lines(path) if path.exists() else ()):
        if change is None:
            return
        yield dict(change.documents)


def records(folder: Path) -> dict[str, dict[str, Any]]:
    found: dict[str, Any] = {}
    for documents in stored(folder / "jobs.jsonl"):
        found.update(documents)
    return {job_id: record for job_id, record in found.items() if record}


def attempts(folder: Path) -> Iterator[dict[str, Any]]:
    """What starts have left behind that nobody has ended, canceled ones among them: a retry goes on with it."""
    for job_id, record in records(folder).items():
        attempt = record["attempt"]
        if attempt["is_open"]:
            frames = folder / "jobs" / job_id / "frames.jsonl"
            is_described = any(str(attempt["frame_idx"]) in documents for documents in stored(frames))
            yield {**attempt, "is_pinned": attempt["frame_idx"] is not None and not is_described}


def condemns(attempt: dict[str, Any], num_more: int) -> bool:
    """Whether the next start would find the video guilty, if so many more are noted before. See jobs/job_run.py"""
    is_poison = attempt["is_pinned"] and attempt["num_deaths"] + num_more >= MAX_DEATHS_OVER_FRAME
    return is_poison or attempt["num_starts"] + num_more >= MAX_STARTS_WITHOUT_FRAME


def fill(folder: Path, rng: random.Random) -> bool:
    """Repeat a line of the journal until it is due for a compaction within a few more. -> whether it was possible"""
    path, known = folder / "jobs.jsonl", records(folder)
    written = list(lines(path)) if path.exists() else []
    if not known or decode(written[-1]) is None:
        return False
    job_id, record = next(iter(known.items()))
    num_lines = 2 * len(known) + COMPACT_EXTRA_LINES - len(written) - rng.randrange(20)
    with path.open("ab") as file:
        file.write(encode(Change("jobs", {job_id: record})) * num_lines)
    return True


def changed_at_ns(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def situation(folder: Path) -> str:
    """What the killed server was at."""
    stages = {record["stage"] or "claiming" for record in records(folder).values() if record["status"] == "processing"}
    return " and ".join(sorted(stages)) or "nothing"


# Killing


@dataclass
class Loop:
    """Kills, and what is known of them."""

    server: Victim
    folder: Path
    rng: random.Random
    num_spared: int = 0
    situations: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def run(self, number: int) -> None:
        """Start the server, and kill it at some moment."""
        is_filled = number % FILL_EVERY == 0 and fill(self.folder, self.rng)
        is_risky = any(condemns(attempt, 1) for attempt in attempts(self.folder))
        part = self.folder / "jobs.jsonl.part"
        before = changed_at_ns(part)  # one may be left over from an earlier kill
        self.server.start()
        if is_filled:
            self._wait(lambda: changed_at_ns(part) not in (None, before), 0.0001)  # it takes about a millisecond
            time.sleep(self.rng.uniform(0, 0.001))
        elif self.rng.random() < EARLY_SHARE:
            time.sleep(self.rng.uniform(*EARLY_S))
        else:
            ready_s = self._wait(self.server.is_working, 0.02)
            time.sleep(self.rng.uniform(0, MAX_LATE * ready_s))
        if is_risky:
            self._wait_for_a_fair_moment()
        process = self.server.process
        assert process
        if process.poll() is not None:
            self.wrong.append(f"run {number}: the server ended by itself, with {process.returncode}")
        self.server.kill()
        is_compacting = changed_at_ns(part) not in (None, before)
        self.situations["compacting" if is_compacting else situation(self.folder)] += 1

    def _wait(self, has_come: Callable[[], bool], pause_s: float) -> float:
        """Wait, but not longer than MAX_READY_S. -> seconds"""
        started_s = time.monotonic()
        while (waited_s := time.monotonic() - started_s) < MAX_READY_S and not has_come():
            time.sleep(pause_s)
        return waited_s

    def _wait_for_a_fair_moment(self) -> None:
        """Stop the process where a kill cannot be mistaken for the video's fault."""
        process, was_spared = self.server.process, False
        assert process
        while process.poll() is None:
            process.send_signal(signal.SIGSTOP)
            os.waitpid(process.pid, os.WUNTRACED)
            if not any(condemns(attempt, 0) for attempt in attempts(self.folder)):
                break
            was_spared = True
            process.send_signal(signal.SIGCONT)
            time.sleep(self.rng.uniform(0.005, 0.05))
        self.num_spared += was_spared


# The audit


@dataclass
class Audit:
    """Holds what a server has against what was acknowledged."""

    http: httpx.Client
    expected: dict[str, list[dict[str, Any]]]  # kind: frame results
    counts: Counter[str] = field(default_factory=Counter)

    def complain(self, what: str, about: str) -> None:
        self.counts[what] += 1
        print(f"{what.upper()}: {about}", flush=True)

    def check_jobs(self, jobs: list[Job]) -> None:
        listed = all_jobs(self.http)
        by_number: dict[int, list[str]] = {}
        for summary in listed:
            by_number.setdefault(summary["metadata"]["number"], []).append(summary["job_id"])
        for job in jobs:
            job_ids = by_number.get(job.number, [])
            if len(job_ids) > 1:
                self.complain("duplicated", f"submit {job.number} made {job_ids}")
            if job.job_id and job.job_id not in job_ids and "deleted" not in job.may_end:
                self.complain("lost", f"{job.job_id} was acknowledged and is gone")
            if job.job_id and job_ids and job.may_end == {"deleted"}:
                self.complain("lost", f"the acknowledged delete of {job.job_id}")
            for job_id in job_ids:
                self.check_job(job, job_id)

    def check_job(self, job: Job, job_id: str) -> None:
        status = self.http.get(f"/api/status/{job_id}").json()
        frames = self.http.get(f"/api/jobs/{job_id}/frames?limit=1000").json()["frames"]
        self.counts["frames"] += len(frames)
        where, ended = f"{job_id} ({job.kind})", status["status"]
        has_just_finished = ended == "completed" and job.last_seq_at_cancel == len(frames)
        if ended not in job.may_end and not has_just_finished:
            why = f", {status['error_message']}; canceled at seq {job.last_seq_at_cancel}"
            what = "failed" if ended == "failed" else "lost"
            self.complain(what, f"{where} ended as {ended}, not {sorted(job.may_end)}{why}")
        if frames[: len(job.seen)] != job.seen:
            self.complain("lost", f"{where}: frame results that had been read before are others now")
        if [frame["seq"] for frame in frames] != list(range(1, len(frames) + 1)):
            self.complain("duplicated", f"{where}: seq is {[frame['seq'] for frame in frames]}")
        if status["frames_processed"] != len(frames) or status["last_seq"] != len(frames):
            self.complain("differing", f"{where}: its record tells other counts than its frames")
        if ended == "completed" and status["results_payload"]["frame_results"] != by_frame(frames):
            self.complain("differing", f"{where}: its results are not its frames")
        self.check_frames(where, by_frame(frames), self.expected[job.kind], is_whole=ended == "completed")

    def check_frames(self, where: str, frames: list[Any], expected: list[Any], *, is_whole: bool) -> None:
        known = {frame["frame_idx"]: frame for frame in expected}
        indexes = Counter(frame["frame_idx"] for frame in frames)
        if repeated := [index for index, number in indexes.items() if number > 1 or index not in known]:
            self.complain("duplicated", f"{where}: frames {repeated}")
        if is_whole and (missing := sorted(known.keys() - indexes.keys())):
            self.complain("lost", f"{where}: frames {missing}")
        for frame in frames:
            for name in COMPARED:
                if frame.get(name) != known.get(frame["frame_idx"], frame).get(name):
                    was = known[frame["frame_idx"]].get(name)
                    self.complain(
                        "differing", f"{where}: frame {frame['frame_idx']} has {name} {frame.get(name)}: {was}"
                    )

    def check_disk(self, folder: Path, job_ids: set[str]) -> None:
        """After the server has ended."""
        strangers = {path.name for path in (folder / "jobs").iterdir()} ^ job_ids
        left_over = [*folder.rglob("*.part"), *folder.glob("incoming/*"), *folder.glob("orphans/*"), *sorted(strangers)]
        for path in left_over:
            self.complain("left_over", str(path))
        for job_id in job_ids:
            stored_at = Counter(
                doc_id for change in stored(folder / "jobs" / job_id / "frames.jsonl") for doc_id in change
            )
            if again := [index for index, number in stored_at.items() if number > 1]:
                self.complain("duplicated", f"{job_id}: frames {again} were stored more than once")
        check = subprocess.run(
            [sys.executable, "-m", "jobs.store", "check", str(folder)], cwd=ROOT, capture_output=True, text=True
        )
        if check.returncode:
            self.complain("damaged", check.stdout + check.stderr)


def by_frame(frames: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(frames, key=lambda frame: frame["frame_idx"])


def all_jobs(http: httpx.Client, status: str = "") -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    cursor: str | None = ""
    while cursor is not None:
        page = http.get(f"/api/jobs/list?limit=100&status_filter={status}&cursor={cursor}").json()
        found, cursor = found + page["jobs"], page["next_cursor"]
    return found


# Preparing


def make_clips(folder: Path) -> None:
    for name, num_frames in CLIPS.items():
        rng = np.random.default_rng(num_frames)
        with av.open(str(folder / name), "w") as container:
            stream = container.add_stream("libvpx" if name.endswith("webm") else "libx264", rate=2)
            assert isinstance(stream, VideoStream)
            stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 320, 240, "yuv420p", 1_000_000
            for index in range(num_frames):
                image = draw_scene(random_scene(rng, (240, 240)), rng, size_px=(320, 240))
                picture = av.VideoFrame.from_ndarray(image, format="rgb24")
                picture.pts, picture.time_base = index, Fraction(1, 2)
                container.mux(stream.encode(picture))
            container.mux(stream.encode(None))


def serve_slowly(web: LocalServer, path: Path) -> None:
    """So slowly that a kill finds some downloads under way."""
    content = path.read_bytes()

    def drip(connection: Any) -> None:
        connection.sendall(f"HTTP/1.1 200 OK\r\nContent-Length: {len(content)}\r\n\r\n".encode())
        for start in range(0, len(content), len(content) // 10 + 1):
            connection.sendall(content[start : start + len(content) // 10 + 1])
            time.sleep(DRIP_S / 10)

    web.replies[f"/{path.name}"] = [drip]


def undisturbed(server: Victim, client: Client) -> dict[str, list[dict[str, Any]]]:
    """Describe a video for each kind of request. -> the frame results"""
    server.start()
    wait_until(server.is_ready)
    jobs = [Job(number, name, None, []) for number, name in enumerate(KINDS)]
    for job in jobs:
        client.submit(job)

    def are_finished() -> bool:
        for job in jobs:
            client.look(job)
        return all(job.is_finished for job in jobs)

    wait_until(are_finished, 300, 0.1)
    server.stop()
    assert all(job.may_end == {"completed"} and job.seen for job in jobs) and not client.wrong, client.wrong
    return {job.kind: by_frame(job.seen) for job in jobs}


def kill_loop(num_runs: int, seed: int, folder: Path) -> int:
    """-> exit code"""
    started_s = time.monotonic()
    make_clips(folder)
    settings = {"allow_private_urls": "127.0.0.1", "api_keys": KEY, "rate_limit_per_minute": 100_000, "slots": 4}
    with ExitStack() as stack:
        web = LocalServer()
        stack.callback(web.stop)
        for name in CLIPS:
            serve_slowly(web, folder / name)
        quiet, victim = (Victim(folder / name, **settings) for name in ("undisturbed", "data"))
        for server in (quiet, victim):
            stack.enter_context(server)
        clients = [Client(i, victim if i else quiet, folder, web.port, seed) for i in range(1 + NUM_CLIENTS)]
        for client in clients:
            stack.callback(client.close)
        expected = undisturbed(quiet, clients[0])
        loop = Loop(victim, folder / "data", random.Random(seed))
        run_all(loop, clients[1:], num_runs)
        found = finish(loop, clients[1:], expected)
    print(json.dumps({"runs": num_runs, **found, "seconds": round(time.monotonic() - started_s)}), flush=True)
    return 1 if any(found[name] for name in BAD) else 0


def run_all(loop: Loop, clients: list[Client], num_runs: int) -> None:
    for client in clients:
        client.start()
    for number in range(1, num_runs + 1):
        loop.run(number)
        if number % 10 == 0:
            num_jobs = sum(job.job_id is not None for client in clients for job in client.jobs)
            kills = ", ".join(f"{number} {what}" for what, number in loop.situations.most_common())
            print(f"{number} runs, {num_jobs} jobs acknowledged; killed at: {kills}", flush=True)
    for client in clients:
        client.is_to_end.set()
        client.join()


BAD = ("lost", "duplicated", "differing", "failed", "left_over", "damaged", "wrong")


def finish(loop: Loop, clients: list[Client], expected: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Let the server work until all is done, and look. -> the figures"""
    server = loop.server
    server.start()
    wait_until(server.is_ready)
    jobs = [job for client in clients for job in client.jobs]
    with server.client(headers={"Authorization": f"Bearer {KEY}"}) as http:
        for client in clients:
            client.settle()
        wait_until(lambda: not (all_jobs(http, "submitted") or all_jobs(http, "processing")), 600, 0.2)
        audit = Audit(http, expected)
        audit.check_jobs(jobs)
        job_ids = {summary["job_id"] for summary in all_jobs(http)}
    if (code := server.stop()) != 0:
        loop.wrong.append(f"the server ended with {code} when it was asked to stop")
    audit.check_disk(loop.folder, job_ids)
    log = server.log.read_text(encoding="utf-8").splitlines()
    wrong = [*loop.wrong, *(text for client in clients for text in client.wrong)]
    for text in [*wrong, *(line for line in log if " ERROR " in line or " CRITICAL " in line or "Traceback" in line)]:
        audit.complain("wrong", text)
    counts = sum((client.counts for client in clients), Counter[str]())
    return {
        "acknowledged": sum(job.job_id is not None for job in jobs),
        "frames": audit.counts["frames"],
        **{name: audit.counts[name] for name in BAD},
        **counts,
        "spared": loop.num_spared,
        "killed_at": dict(loop.situations),
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.kill_loop", description=__doc__)
    parser.add_argument("--runs", type=int, default=200, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="(default: %(default)s)")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the server: torch's threads would wait for each other's core
    folder = Path(tempfile.mkdtemp(prefix="moonreel-kill-"))
    code = kill_loop(args.runs, args.seed, folder)
    if code:
        print(f"Kept: {folder}", file=sys.stderr)
    else:
        shutil.rmtree(folder)
    return code


if __name__ == "__main__":
    sys.exit(main())
