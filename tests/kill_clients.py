"""The clients of the kill loop: the videos they send, what they ask for, and what they were promised.

Test: pytest tests/test_kill_loop.py
"""

import json
import random
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import httpx
import numpy as np
from av.video.stream import VideoStream
from local_server import LocalServer
from serving import ServerProcess

from pipeline.demo.scenes import draw_scene, random_scene

KEY = "kill-loop-0123456789"
MAX_UNFINISHED = 4  # jobs of a client
DRIP_S = 1.2  # of a download
NOT_SENT = (httpx.ConnectError, httpx.UnsupportedProtocol)  # the second: no server was started yet
FINISHED = ("completed", "failed", "canceled")
# What a client does with a job after the submit, each at some moment.
PLANS = [*[""] * 6, "cancel", *["cancel retry"] * 2, "cancel delete", "delete"]


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
        self._http = httpx.Client(timeout=30, verify=False, trust_env=False, headers={"Authorization": f"Bearer {KEY}"})

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
            unfinished = [Job(number, name, key, self._rng.choice(PLANS).split())]
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


# The videos


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
