"""Visitors of a public server, for the load and soak programs: each with an address of its own, as a proxy tells it.

They use http.client in a thread each, which costs the machine they share with the server a third of what httpx does.
Every answer is checked; what should not be is counted, and the first ones are kept in words.
Test: pytest tests/test_load.py
"""

import http.client
import json
import random
import threading
import time
from collections import Counter
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

REFUSED = (429, 507)  # "not now": allowed under load, if the answer says when to come back
NO_VIDEO = 415
MAX_WRONG = 20  # kept in words
FORMATS = ("json", "jsonl", "csv", "srt", "vtt")
BOUNDARY = "moonreel-visitor"


@dataclass
class Tally:
    """What all visitors saw together. Safe with threads."""

    statuses: Counter[int] = field(default_factory=Counter)
    refusals: Counter[str] = field(default_factory=Counter)  # by code
    poll_s: list[float] = field(default_factory=list)  # of GET /api/status
    num_events: int = 0
    num_downloaded_bytes: int = 0
    wrong: list[str] = field(default_factory=list)
    num_wrong: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def answered(self, status: int, code: str = "") -> None:
        with self._lock:
            self.statuses[status] += 1
            if code:
                self.refusals[code] += 1

    def polled(self, seconds: float) -> None:
        with self._lock:
            self.poll_s.append(seconds)

    def received(self, num_bytes: int = 0, num_events: int = 0) -> None:
        with self._lock:
            self.num_downloaded_bytes += num_bytes
            self.num_events += num_events

    def complain(self, text: str) -> None:
        with self._lock:
            self.num_wrong += 1
            if len(self.wrong) < MAX_WRONG:
                self.wrong.append(text)


@dataclass(frozen=True)
class Answer:
    status: int
    headers: http.client.HTTPMessage
    content: bytes

    def json(self) -> Any:
        return json.loads(self.content)


@dataclass(frozen=True)
class Wish:
    """A kind of job."""

    clip: bytes | str  # of an upload, or the URL
    options: dict[str, Any]


class Visitor:
    """One visitor, for one thread."""

    def __init__(self, url: str, number: int, tally: Tally) -> None:
        self._netloc, self._tally = urlsplit(url).netloc, tally
        self.address = f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}"
        self._headers = {"X-Forwarded-For": self.address}
        self._connection = self._connect()

    def close(self) -> None:
        self._connection.close()

    def submit(self, wish: Wish) -> str | None:
        """-> the job's id; None for what is no video, and where the server asks to come back later, after a wait of as
        long as it said, 10 s at most."""
        if isinstance(wish.clip, bytes):
            body = _form(wish.clip, wish.options)
            answer = self.ask(
                "POST", "/api/upload", body, {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
            )
        else:
            body = json.dumps({"video_url": wish.clip, **wish.options}).encode()
            answer = self.ask("POST", "/api/submit", body, {"Content-Type": "application/json"})
        if answer.status == 202:
            cookie = answer.headers.get("Set-Cookie", "").partition(";")[0]
            if cookie:
                self._headers["Cookie"] = cookie
            return answer.json()["job_id"]
        if answer.status not in (*REFUSED, NO_VIDEO):
            self._tally.complain(f"a submit was answered {answer.status}: {answer.content[:200]!r}")
        elif answer.status in REFUSED:
            time.sleep(min(10.0, float(answer.headers.get("Retry-After", "1"))))
        return None

    def poll(self, job_id: str) -> dict[str, Any]:
        """The job's status without results, and how long that took."""
        started_s = time.perf_counter()
        answer = self.ask("GET", f"/api/status/{job_id}?include_results=false")
        self._tally.polled(time.perf_counter() - started_s)
        if answer.status != 200:
            self._tally.complain(f"the status of {job_id} was answered {answer.status}: {answer.content[:200]!r}")
            return {"status": "unknown"}
        return answer.json()

    def follow(self, job_id: str) -> None:
        """Read the events of a job from its first to `done`: each frame once, in order."""
        seqs: list[int] = []
        last_event = ""
        with closing(self._connect()) as connection:
            connection.request("GET", f"/api/jobs/{job_id}/events", headers=self._headers)
            response = connection.getresponse()
            self._tally.answered(response.status)
            for line in response:
                name, _, value = line.decode().rstrip("\r\n").partition(": ")
                if name == "event":
                    last_event = value
                    self._tally.received(num_events=1)
                elif name == "id" and last_event == "frame":
                    seqs.append(int(value))
        if last_event != "done" or seqs != list(range(1, len(seqs) + 1)):
            self._tally.complain(
                f"the events of {job_id} ended with {last_event!r} after {len(seqs)} frames: {seqs[-5:]}"
            )

    def drop(self, job_id: str) -> None:
        """Begin to read the events of a job, and go away."""
        with closing(self._connect()) as connection:
            connection.request("GET", f"/api/jobs/{job_id}/events", headers=self._headers)
            response = connection.getresponse()
            self._tally.answered(response.status)
            response.readline()

    def download(self, job_id: str, rng: random.Random) -> None:
        """What a page and its reader take of a finished job: results, an export, pictures, a part of the video."""
        whole = self._get(f"/api/status/{job_id}")
        results = whole.json()["results_payload"] if whole.status == 200 else None
        if not results:
            self._tally.complain(f"{job_id} is completed without results: {whole.content[:200]!r}")
            return
        frames = results["frame_results"]
        if len(frames) != results["total_frames_submitted_to_workers"] or not all(f["description"] for f in frames):
            self._tally.complain(f"{job_id} has {len(frames)} results, not all of what was asked")
        paths = [f"export?format={rng.choice(FORMATS)}", *(f"frames/{f['frame_idx']}.jpg" for f in frames[:3])]
        for path in paths:
            if (answer := self._get(f"/api/jobs/{job_id}/{path}")).status != 200 or not answer.content:
                self._tally.complain(f"{path} of {job_id} was answered {answer.status}")
        part = self._get(f"/api/jobs/{job_id}/video", {"Range": "bytes=0-9999"})
        if part.status != 206 or len(part.content) != 10_000:
            self._tally.complain(
                f"a part of the video of {job_id} was answered {part.status}, {len(part.content)} bytes"
            )
        if (listed := self._get("/api/jobs/list?limit=5")).status != 200 or not listed.json()["jobs"]:
            self._tally.complain(f"the list of the owner of {job_id} was answered {listed.status}, or is empty")

    def ask(self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None) -> Answer:
        """One request; on a connection that the server has closed meanwhile, it is sent again on a new one."""
        for is_last in (False, True):
            try:
                self._connection.request(method, path, body, {**self._headers, **(headers or {})})
                response = self._connection.getresponse()
                answer = Answer(response.status, response.headers, response.read())
                break
            except (http.client.RemoteDisconnected, ConnectionResetError, BrokenPipeError):
                self._connection.close()
                if is_last:
                    raise
        code = answer.json().get("code", "") if answer.status >= 400 else ""
        self._tally.answered(answer.status, code)
        if answer.status >= 500 and answer.status not in REFUSED:
            self._tally.complain(f"{method} {path} was answered {answer.status}: {answer.content[:200]!r}")
        if answer.status == 429 and not answer.headers.get("Retry-After", "").isdecimal():
            self._tally.complain(f"{method} {path} was answered 429 without Retry-After")
        return answer

    def _get(self, path: str, headers: dict[str, str] | None = None) -> Answer:
        answer = self.ask("GET", path, headers=headers)
        self._tally.received(len(answer.content))
        return answer

    def _connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(self._netloc, timeout=60)


def _form(clip: bytes, fields: dict[str, Any]) -> bytes:
    parts = [f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{n}"\r\n\r\n{v}\r\n' for n, v in fields.items()]
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="file"; filename="clip.mp4"\r\n\r\n'
    return b"".join([*(part.encode() for part in parts), head.encode(), clip, f"\r\n--{BOUNDARY}--\r\n".encode()])
