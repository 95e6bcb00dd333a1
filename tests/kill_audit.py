"""The audit of the kill loop: what has to hold at the end. And what is on the disk of a server that was stopped, which
tells whether its next start would blame the video.

Test: pytest tests/test_kill_loop.py
"""

import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from kill_clients import Job
from serving import ROOT

from jobs.job_run import MAX_DEATHS_OVER_FRAME, MAX_STARTS_WITHOUT_FRAME
from jobs.journal import decode, lines

BAD = ("lost", "duplicated", "differing", "failed", "left_over", "damaged", "wrong")
COMPARED = ("frame_idx", "timestamp_ms", "description", "status", "reused_from_frame_idx")


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
