"""The jobs: their records, their states, and who comes next. Everything that changes a job's status is here.

    submitted -> processing -> completed | failed | canceled      restart: processing -> submitted
    failed | canceled -> submitted (retry)                        deleted: from any but processing

A change is on the disk before it is acknowledged, and is told to `changes`. Reads take no lock and return copies.
The API submits by one write here; the worker waits for it in `claim`. Test: pytest tests/test_job_store.py
"""

import logging
import math
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, cast

from jobs.changes import Changes
from jobs.data_version import upgrade
from jobs.frame_store import FILES_MISSING, RESULTS_DAMAGED, FrameStore, FrameStores
from jobs.job_files import JobFiles, storing
from jobs.job_index import JobIndex
from jobs.journal import JournalDamaged
from jobs.live import Live
from jobs.mend import check_records, opening
from jobs.record import (
    FINISHED,
    FRESH,
    NO_ATTEMPT,
    IdempotencyKey,
    Page,
    Record,
    StoreLimits,
    Upload,
    ended_at,
    is_ended,
    log_change,
    new_record,
)
from jobs.schema import JobStatusName
from jobs.store import Document, JournalDB, owning
from jobs.views import summary
from jobs.webhooks import Outgoing, new_event
from pipeline.errors import (
    IdempotencyMismatch,
    JobFinished,
    JobNotFound,
    JobRunning,
    NotRetryable,
    ResultsDamaged,
)

DEFAULT_LIMITS = StoreLimits()
NOT_FOUND = "Job ID not found in store. It may have been deleted, or belong to another key."

logger = logging.getLogger(__name__)


class JobStore:
    """The jobs of a data directory, which this process owns while the store is open."""

    def __init__(
        self, folder: Path, limits: StoreLimits = DEFAULT_LIMITS, clock: Callable[[], float] = time.time
    ) -> None:
        """Raises DataUnusable, StorageFull."""
        self._limits, self._clock = limits, clock
        with opening(folder), ExitStack() as exits:
            exits.enter_context(owning(folder))
            check_records(folder)
            self.files = JobFiles(folder)
            upgrade(folder)
            self._db = JournalDB(folder / "jobs.jsonl")
            self._exits = exits.pop_all()
        self._table = self._db.named("jobs")
        self._frames = FrameStores()
        self.changes = Changes()
        self.on_removed: Callable[[str], None] = lambda job_id: None
        self.is_clock_steady: Callable[[], bool] = lambda: True  # else nothing is deleted by age
        self._lock = threading.RLock()
        self._woken = threading.Condition(self._lock)  # a job was queued
        self._hooked = threading.Condition(self._lock)  # a webhook was put in
        self._live: dict[str, Live] = {}
        self.index = JobIndex()
        for record in self._stored().values():
            self.index.add(record)

    def close(self) -> None:
        self._frames.close()
        self._db.close()
        self._exits.close()

    # Reading

    def get(self, job_id: str) -> Record:
        """Raises JobNotFound."""
        record = self._table.fetch(job_id)
        if record is None:
            raise JobNotFound(NOT_FOUND)
        return cast(Record, record)

    def page(self, owner: str | None, status: JobStatusName | None, cursor: int | None, limit: int) -> Page:
        """The newest jobs of an owner (None: of all) in a status (None: any), older than the cursor."""
        ids = self.index.newest(owner, status, cursor, limit + 1)
        found = [cast(Record, record) for job_id in ids if (record := self._table.peek(job_id))]
        next_cursor = found[limit - 1]["number"] if len(found) > limit else None
        return Page(found[:limit], self.index.count(owner, status), next_cursor)

    def live(self, job_id: str) -> Live | None:
        """What is known of a running job beyond its record."""
        return self._live.get(job_id)

    @contextmanager
    def frames(self, job_id: str) -> Iterator[FrameStore]:
        """Open a job's frame results. Raises JobNotFound, ResultsDamaged."""
        self.get(job_id)
        with ExitStack() as exits:
            try:
                opened = exits.enter_context(self._frames.opened(self.files.frames(job_id)))
            except FileNotFoundError as error:
                with self._lock:  # until a deletion that is going on is over
                    self.get(job_id)
                raise ResultsDamaged(FILES_MISSING) from error
            except OSError:
                with storing():
                    raise
            except JournalDamaged as error:
                logger.error("%s", error)
                raise ResultsDamaged(RESULTS_DAMAGED) from error
            yield opened

    # Changing, on behalf of callers

    def add(
        self,
        request: dict[str, Any],
        owner: str,
        upload: Upload | None = None,
        idempotency: IdempotencyKey | None = None,
    ) -> str:
        """Queue a job, and return its id once it is on the disk; of a repeated request, the id it got before.

        Raises QueueFull, StorageFull, IdempotencyMismatch."""
        self._make_room()
        with self._lock, storing():
            if idempotency and (known := self.index.by_idempotency_key.get(idempotency.key)):
                if self.get(known)["idempotency_body"] != idempotency.body:
                    raise IdempotencyMismatch(
                        "This Idempotency-Key came before, with another request. Use a new key for a new request."
                    )
                return known
            self._check_room(owner)
            record = new_record(f"job_{uuid.uuid4()}", self.index.last_number + 1, owner, request, self._clock())
            if upload:
                record["container"] = upload.container
            if idempotency:
                record["idempotency_key"], record["idempotency_body"] = idempotency.key, idempotency.body
            try:
                document = Document(record, record["job_id"])
                self.files.make(record["job_id"], upload.path if upload else None, lambda: self._table.insert(document))
            except BaseException:
                self.files.remove(record["job_id"])
                with suppress(OSError):  # only if the folder could not get its name
                    self.files.make_room(lambda: self._table.discard(record["job_id"]))
                raise
            self.index.add(record)
            log_change(record, "submitted", 0)
            self._woken.notify_all()
            return record["job_id"]

    def cancel(self, job_id: str) -> Record:
        """Cancel a job that waits, or ask for it if it runs; again is harmless. Raises JobNotFound, JobFinished."""
        stored_bytes = self.files.count_again(job_id) if self.get(job_id)["status"] == "submitted" else 0
        with self._lock, storing():
            record = self.get(job_id)
            if record["status"] == "submitted":
                self._set(record, status="canceled", stored_bytes=stored_bytes)
            elif record["status"] == "processing":
                self._set(record, is_cancel_requested=True)
            elif record["status"] != "canceled":
                raise JobFinished(f"The job is {record['status']} already: there is nothing to cancel.")
            return record

    def retry(self, job_id: str) -> Record:
        """Queue a failed or canceled job again; it goes on after what is stored.

        Raises JobNotFound, NotRetryable, JobRunning, QueueFull, StorageFull."""
        self._make_room(keep=job_id)
        with self._lock, storing():
            record = self.get(job_id)
            if record["status"] == "completed":
                raise NotRetryable("The job is completed. Submit a new one to describe its video again.")
            if record["status"] not in FINISHED:
                raise JobRunning("The job is queued or running already.")
            self._check_room(record["owner"])
            starts_over = record["error_code"] == "model_changed"
            self._set(
                record,
                status="submitted",
                queue_number=self.index.last_number + 1,
                is_cancel_requested=False,
                processing_started_at=None,
                failed_at=None,
                canceled_at=None,
                error_code=None,
                error_message=None,
                attempt=NO_ATTEMPT,
                redo_errors_to_seq=record["last_seq"],
                starts_over=starts_over,
                **(FRESH if starts_over else {}),
            )
            self._woken.notify_all()
            return record

    def delete(self, job_id: str) -> None:
        """Remove a job and all it keeps. Raises JobNotFound, JobRunning, StorageFull."""
        with self._lock, storing():
            record = self.get(job_id)
            if record["status"] == "processing":
                raise JobRunning("The job is running. Cancel it first, then delete it.")
            self._discard(record)
        self._clean_up(job_id)

    # Changing, on behalf of the worker

    def recover(self) -> int:
        """Queue again what a stopped or killed server was at, and tidy up after it -> how many jobs those were."""
        with self._lock, storing():
            missing = self.files.tidy(set(self._stored()))
            for record in sorted(self._stored().values(), key=lambda record: record["number"]):
                if is_ended(record) and record["job_id"] not in missing and not record["request"]["source_job_id"]:
                    self.files.remember(record["job_id"], record["stored_bytes"])
                else:  # also where the video may have become its own
                    self.files.count_again(record["job_id"])
            interrupted = [r for r in list(self._stored().values()) if r["status"] == "processing"]
            for stored in interrupted:
                record = self.get(stored["job_id"])
                status = "canceled" if record["is_cancel_requested"] else "submitted"
                self.files.remove_parts(record["job_id"])
                stored_bytes = self.files.count_again(record["job_id"])
                self._set(record, status=status, stage=None, stored_bytes=stored_bytes, **self._frame_counts(record))
        return len(interrupted)

    def claim(self, timeout_s: float, is_wanted: Callable[[], bool] = lambda: True) -> Record | None:
        """Take the job that has waited longest; None if there is none in time, or none is wanted any more."""
        with self._lock:
            self._woken.wait_for(lambda: self.index.queue or not is_wanted(), timeout_s)
            if not self.index.queue or not is_wanted():
                return None
            with storing():
                record = self.get(self.index.next_in_queue())
                started_at = record["processing_started_at"] or self._clock()
                self._set(record, status="processing", processing_started_at=started_at)
            self._live[record["job_id"]] = Live()
            return record

    def release(self) -> None:
        """Wake all who wait in claim, for them to see whether they still want a job."""
        with self._lock:
            self._woken.notify_all()

    def update(self, job_id: str, **fields: Any) -> None:
        """Set fields of a running job's record. Raises StorageFull."""
        with self._lock, storing():
            self._set(self.get(job_id), **fields)

    def end(self, job_id: str, status: JobStatusName, **fields: Any) -> None:
        """A running job leaves the worker: finished, or back in the queue. Raises StorageFull."""
        common = {"stage": None, "attempt": NO_ATTEMPT, "stored_bytes": self.files.count_again(job_id)}
        with self._lock, storing():
            record = self.get(job_id)
            if record["is_cancel_requested"]:  # that was acknowledged, whatever the job has come to since
                status, fields = "canceled", {**fields, "error_code": None, "error_message": None}
            self._set(record, status=status, **common, **self._frame_counts(record), **fields)
            self._live.pop(job_id, None)

    def is_cancel_requested(self, job_id: str) -> bool:
        record = self._table.peek(job_id)
        return record is not None and record["is_cancel_requested"]

    @property
    def kept_bytes(self) -> int:
        """Of all jobs: their files and records."""
        return self.files.total_bytes + self.index.record_bytes

    def purge(self, keep: str | None = None) -> list[str]:
        """Delete finished jobs that are too old, and the oldest ones while too much is kept, but those with webhooks to
        deliver last -> their ids"""
        ended = sorted((bool(r["webhooks"]), ended_at(r), r["job_id"]) for r in self._stored().values() if is_ended(r))
        purged, oldest = [], self._clock() - self._limits.retention_s if self.is_clock_steady() else -math.inf
        for _, at, job_id in ended:
            if job_id == keep or (at > oldest and not self._limits.is_crowded(self.kept_bytes)):
                continue
            with self._lock, storing():
                record = cast(Record | None, self._table.fetch(job_id))
                if record is None or not is_ended(record) or ended_at(record) != at:
                    continue  # deleted or retried since we looked
                self._discard(record)
            self._clean_up(job_id)
            purged.append(job_id)
        return purged

    def check_space(self) -> None:
        """Raises StorageFull if nothing more may be kept, though old jobs were deleted for it."""
        self._make_room()
        self._limits.check_space(self.files.free_bytes, self.kept_bytes)

    def check_room(self, owner: str) -> None:
        """Raises QueueFull or StorageFull if no more of an owner's jobs are accepted now."""
        self._make_room()
        self._check_room(owner)

    # Webhooks: what an Outbox of jobs/webhooks.py is asked

    def outgoing(self) -> list[Outgoing]:
        records = [cast(Record | None, self._table.peek(job_id)) for job_id in list(self.index.with_webhooks)]
        return [
            Outgoing(job_id=record["job_id"], **{**webhook, "body": webhook["body"].encode()})
            for record in records
            if record
            for webhook in record["webhooks"]
        ]

    def webhook_tried(self, item: Outgoing, *, next_try_at: float | None, outcome: str) -> None:
        """Raises StorageFull; nothing is raised for a job that was deleted meanwhile."""
        with self._lock, storing():
            try:
                record = self.get(item.job_id)
            except JobNotFound:
                return
            others = [w for w in record["webhooks"] if w["webhook_id"] != item.webhook_id]
            tried = [w for w in record["webhooks"] if w["webhook_id"] == item.webhook_id and next_try_at is not None]
            again = [{**w, "num_tries": w["num_tries"] + 1, "next_try_at": next_try_at} for w in tried]
            self._set(record, webhooks=[*others, *again])

    def wait_for_webhook(self, timeout_s: float) -> None:
        with self._lock:
            self._hooked.wait(timeout_s)

    # Within

    def _stored(self) -> Mapping[str, Record]:
        return cast(Mapping[str, Record], self._table.stored())

    def _set(self, record: Record, **fields: Any) -> None:
        """Store changed fields, and keep the indexes with them. `record` is brought up to date."""
        before = record.copy()
        now = self._clock()
        record.update(fields)  # type: ignore[typeddict-item]
        status = record["status"]
        is_changed = status != before["status"]
        if is_changed and status in FINISHED:
            record["is_cancel_requested"] = False
            record[f"{status}_at"] = now  # type: ignore[literal-required]
            if url := record["request"]["webhook_url"]:
                event = new_event(f"job.{status}", summary(record), now)
                record["webhooks"] = [*record["webhooks"], {**event, "url": url}]  # type: ignore[list-item]
        self._table.put({record["job_id"]: record})
        self.index.replace(before, record)
        if len(record["webhooks"]) > len(before["webhooks"]):
            self._hooked.notify_all()
        if is_changed:
            since = before["processing_started_at"] or before["submitted_at"]
            log_change(record, status, now - since)
        self.changes.tell(record["job_id"])

    def _frame_counts(self, record: Record) -> dict[str, int]:
        """Empty where the results are damaged: what the record has stays, and the job can be ended."""
        with suppress(ResultsDamaged), self.frames(record["job_id"]) as frames:
            return frames.counts()
        return {}

    def _check_room(self, owner: str) -> None:
        self._limits.check_queue(self.index.count(owner, "submitted"), len(self.index.queue))
        self._limits.check_space(self.files.free_bytes, self.kept_bytes)

    def _make_room(self, keep: str | None = None) -> None:
        """Not under the lock: files are removed."""
        if self._limits.is_crowded(self.kept_bytes):
            self.purge(keep)

    def _discard(self, record: Record) -> None:
        self.files.hide(record["job_id"])
        try:
            self.files.make_room(lambda: self._table.discard(record["job_id"]))
        except BaseException:
            self.files.show(record["job_id"])
            raise
        self.index.remove(record)

    def _clean_up(self, job_id: str) -> None:
        """What is left of a job that has no record any more."""
        self._frames.forget(self.files.frames(job_id))
        self.files.remove(job_id)
        self.changes.forget(job_id)
        self.on_removed(job_id)
        logger.info("%s deleted", job_id, extra={"job_id": job_id, "status": "deleted"})
