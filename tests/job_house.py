"""A job store in a data directory for tests, and what to compare it with."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from jobs.job_files import JobFiles
from jobs.job_index import JobIndex
from jobs.job_store import JobStore
from jobs.record import FINISHED, IdempotencyKey, Record, StoreLimits, Upload
from jobs.schema import JobRequest, JobStatusName
from pipeline.errors import JobFinished, JobNotFound, JobRunning, NotRetryable

LIMITS = StoreLimits(min_free_bytes=0)
STATUSES: tuple[JobStatusName, ...] = ("submitted", "processing", *FINISHED)
HOOK = "https://hooks.example/jobs"


class House:
    """A data directory, and the store that is open on it."""

    def __init__(self, folder: Path, limits: StoreLimits = LIMITS) -> None:
        self.folder, self.limits, self.now_s = folder, limits, 1000.0
        self.store = self._open()

    def _open(self) -> JobStore:
        return JobStore(self.folder, self.limits, lambda: self.now_s)

    def reopen(self, **limits: Any) -> JobStore:
        self.store.close()
        self.limits = replace(self.limits, **limits)
        self.store = self._open()
        return self.store

    def now_and_later(self) -> Iterator[JobStore]:
        """The store, and then what it is after closing and reopening."""
        yield self.store
        yield self.reopen()

    def add(self, owner: str = "ann", *, video: bytes | None = None, key: str | None = None, **asked: Any) -> str:
        """key: an idempotency key. The clock goes on by a second."""
        self.now_s += 1
        request = JobRequest(video_url="https://example.com/film.mp4?token=secret", **asked).model_dump()
        idempotency = IdempotencyKey(key, str(asked)) if key else None
        return self.store.add(request, owner, self.upload(video) if video else None, idempotency)

    def upload(self, video: bytes) -> Upload:
        path = self.store.files.incoming / "upload"
        path.write_bytes(video)
        return Upload(path, "mp4")

    def run(self, status: JobStatusName, *results: dict[str, Any], **fields: Any) -> str:
        """Run the next job to an end."""
        record = self.store.claim(0)
        assert record
        self.now_s += 1
        with self.store.frames(record["job_id"]) as frames:
            frames.append(results)
        self.store.end(record["job_id"], status, **fields)
        return record["job_id"]

    def added(self, status: JobStatusName, **options: Any) -> str:
        """A job in a status, the queue being empty."""
        job_id = self.add(**options)
        if status == "processing":
            assert self.store.claim(0)
        elif status != "submitted":
            self.run(status)
        return job_id


def incoming(files: JobFiles, content: bytes) -> Path:
    """Write what an upload would have left in incoming/, for JobFiles.make to take over."""
    path = files.incoming / "upload"
    path.write_bytes(content)
    return path


def frame(frame_idx: int, status: str = "success") -> dict[str, Any]:
    return {"frame_idx": frame_idx, "status": status}


def records(store: JobStore) -> list[Record]:
    return store.page(None, None, None, 1_000_000).records


def indexes(index: JobIndex) -> dict[str, Any]:
    return {name: value for name, value in vars(index).items() if name != "last_number"}


def assert_consistent(store: JobStore) -> None:
    """What the store knows without looking is what a look at all records tells."""
    recount = JobIndex()
    for record in records(store):
        recount.add(record)
        assert store.files.of(record["job_id"]).is_dir()
        assert (store.live(record["job_id"]) is not None) <= (record["status"] == "processing")
    assert indexes(store.index) == indexes(recount)
    assert store.index.last_number >= recount.last_number
    assert {path.name for path in (store.files.folder / "jobs").iterdir()} == {r["job_id"] for r in records(store)}


def claimed(store: JobStore) -> list[str]:
    """Claim all that wait."""
    return [record["job_id"] for record in iter(lambda: store.claim(0), None)]


# What becomes of a job in each status, by operation: the next status, or the error.
OUTCOMES: dict[str, tuple[Any, ...]] = {
    "cancel": ("canceled", "processing", JobFinished, JobFinished, "canceled", JobNotFound),
    "retry": (JobRunning, JobRunning, NotRetryable, "submitted", "submitted", JobNotFound),
    "delete": ("deleted", JobRunning, "deleted", "deleted", "deleted", JobNotFound),
}
