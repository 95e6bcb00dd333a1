"""The record of a job, as it is stored: one document in jobs.jsonl, without the frame results. And what the job store
is given, and gives, beside records.

Test: pytest tests/test_job_store.py
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from jobs.schema import JobStatusName
from pipeline.errors import QueueFull, StorageFull

logger = logging.getLogger(__name__)

FINISHED: tuple[JobStatusName, ...] = ("completed", "failed", "canceled")
CROWDED_SHARE = 0.95  # of retention_bytes: from there on, finished jobs go


class Attempt(TypedDict):
    """What a start leaves behind if the server dies over it. Cleared where a start ends in any other way."""

    is_open: bool  # a start was past its download
    num_starts: int  # of those, since a frame was stored
    frame_idx: int | None  # that was in the model alone
    timestamp_ms: int  # of that frame
    num_deaths: int  # starts that handed it to the model alone; if it has no result, each of them died


class Webhook(TypedDict):
    webhook_id: str
    url: str
    body: str
    created_at: float
    num_tries: int
    next_try_at: float


class Record(TypedDict):
    """Times are Unix seconds; None: not yet."""

    job_id: str
    number: int  # in the order of submission: what list cursors count
    queue_number: int  # in the order of waiting: a retried job waits behind the others
    owner: str
    status: JobStatusName
    stage: str | None  # while processing: downloading, describing
    is_cancel_requested: bool  # while processing, until the worker has seen it
    request: dict[str, Any]  # a JobRequest
    submitted_at: float
    processing_started_at: float | None
    completed_at: float | None
    failed_at: float | None
    canceled_at: float | None
    error_code: str | None
    error_message: str | None
    model: dict[str, Any] | None  # pinned by the first start: id, revision, device, dtype
    container: str | None  # of the video, once it is here: a key of sniff.CONTAINERS
    duration_s: float | None
    average_fps: float | None
    num_frames_expected: int | None
    is_truncated: bool
    warnings: list[str]
    num_frames: int  # these four as of the last change of the status; a running job's are counted
    num_frames_failed: int
    num_frames_reused: int
    last_seq: int
    timings: dict[str, float]  # seconds by stage, of all starts together
    attempt: Attempt
    starts_over: bool  # its results are another model's: the next start clears them
    redo_errors_to_seq: int  # a retry does frames with an error again: those stored up to this seq
    stored_bytes: int  # of the job's folder, as of the last change of the status
    idempotency_key: str | None  # a hash, like the next
    idempotency_body: str | None
    webhooks: list[Webhook]  # that are not delivered yet


NO_ATTEMPT: Attempt = {"is_open": False, "num_starts": 0, "frame_idx": None, "timestamp_ms": 0, "num_deaths": 0}
# Of a job that starts over.
FRESH = {"model": None, "num_frames": 0, "num_frames_failed": 0, "num_frames_reused": 0, "timings": {}}


def new_record(job_id: str, number: int, owner: str, request: dict[str, Any], now: float) -> Record:
    return {
        "job_id": job_id,
        "number": number,
        "queue_number": number,
        "owner": owner,
        "status": "submitted",
        "stage": None,
        "is_cancel_requested": False,
        "request": request,
        "submitted_at": now,
        "processing_started_at": None,
        "completed_at": None,
        "failed_at": None,
        "canceled_at": None,
        "error_code": None,
        "error_message": None,
        "model": None,
        "container": None,
        "duration_s": None,
        "average_fps": None,
        "num_frames_expected": None,
        "is_truncated": False,
        "warnings": [],
        "num_frames": 0,
        "num_frames_failed": 0,
        "num_frames_reused": 0,
        "last_seq": 0,
        "timings": {},
        "attempt": NO_ATTEMPT,
        "starts_over": False,
        "redo_errors_to_seq": 0,
        "stored_bytes": 0,
        "idempotency_key": None,
        "idempotency_body": None,
        "webhooks": [],
    }


def is_ended(record: Record) -> bool:
    return record["status"] in FINISHED


def ended_at(record: Record) -> float:
    """The last end; 0 of a job that has not ended yet."""
    return max(record["completed_at"] or 0.0, record["failed_at"] or 0.0, record["canceled_at"] or 0.0)


@dataclass(frozen=True)
class StoreLimits:
    """How much is accepted, and how long it is kept."""

    max_queued_jobs: int = 100
    max_queued_jobs_per_owner: int = 100
    retention_s: float = 30 * 86400
    retention_bytes: int = 20_000_000_000
    min_free_bytes: int = 500_000_000

    def is_crowded(self, kept_bytes: int) -> bool:
        """Say whether finished jobs have to go. That is before nothing is accepted any more, so that callers who come
        at the same time all find room."""
        return kept_bytes >= CROWDED_SHARE * self.retention_bytes

    def check_queue(self, num_own: int, num_all: int) -> None:
        """Raises QueueFull if no more of an owner's jobs may wait."""
        if num_all >= self.max_queued_jobs or num_own >= self.max_queued_jobs_per_owner:
            whose = f"{num_own} of them yours" if num_own else "none of them yours"
            raise QueueFull(f"{num_all} jobs are waiting, {whose}: no more are accepted now. Try again later.")

    def check_space(self, free_bytes: int, kept_bytes: int) -> None:
        """Raises StorageFull if nothing more may be kept."""
        if free_bytes < self.min_free_bytes:
            raise StorageFull("The disk of this host is full: nothing more is accepted. Delete old jobs, or make room.")
        if kept_bytes >= self.retention_bytes:
            raise StorageFull(
                f"This server keeps {self.retention_bytes:,} bytes at most (setting retention_bytes), and unfinished "
                "jobs fill them. Wait until some are finished."
            )


@dataclass(frozen=True)
class Upload:
    """An uploaded video that has arrived whole."""

    path: Path
    container: str


@dataclass(frozen=True)
class IdempotencyKey:
    """Hashes of a caller's key, and of what was asked with it."""

    key: str
    body: str


@dataclass(frozen=True)
class Page:
    records: list[Record]  # for reading only
    total_count: int  # matches in all
    next_cursor: int | None


def log_change(record: Record, status: str, seconds: float) -> None:
    """The one INFO line of a change: the seconds are those since the job was submitted or, once it runs, begun."""
    cause = f": {record['error_message']}" if status == "failed" else ""
    fields = {"job_id": record["job_id"], "status": status, "seconds": round(seconds, 3)}
    logger.info("%s %s after %.3f s%s", record["job_id"], status, seconds, cause, extra=fields)
