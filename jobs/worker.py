"""Runs the jobs of the store: claims the one that has waited longest, up to max_running_jobs at once, each in a thread.

Whatever happens to a job ends here: it is completed, failed with a code and a message, canceled, or put back for the
next start. A watch beside them sees jobs that do not move, deletes what is too old, and tells what is wrong.
The API never calls the worker: both know the store. Test: pytest tests/test_worker.py
"""

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from jobs.job_run import JobRun, RunOptions, Stopped, StopSign
from jobs.job_store import JobStore
from jobs.record import Record
from jobs.schema import JobStatusName
from pipeline.errors import Canceled, DescriberError, StorageFull, UnexpectedFailure
from pipeline.pool import Pool, PoolClosed
from pipeline.results import ModelName, Timings

CLAIM_S = 1.0  # between two looks at whether the worker is to stop
WATCH_S = 1.0
PURGE_S = 60.0
STORE_AGAIN_S = 2.0  # while the disk is full
PUT_AWAY_S = 1.0  # for a job that was let go to be stored as one that goes on

logger = logging.getLogger(__name__)


class Worker:
    def __init__(
        self,
        store: JobStore,
        pool: Pool,
        model: ModelName,
        options: RunOptions,
        *,
        max_running_jobs: int = 2,
        stalled_after_s: float = 300.0,
        on_end: Callable[[Timings], None] = lambda timings: None,
    ) -> None:
        """on_end is told the seconds that each run took, for metrics."""
        self._store, self._pool, self._model, self._options = store, pool, model, options
        self._stalled_after_s, self._on_end = stalled_after_s, on_end
        self._stop, self._careful_turn = StopSign(), threading.Lock()
        self._running: dict[str, threading.Thread] = {}
        self._full: str | None = None  # what storing said last, if it failed
        self._stalled: dict[str, float] = {}
        self._is_stopped = threading.Event()
        self._threads = [
            threading.Thread(target=self._claim_and_run, name=f"job-{i + 1}", daemon=True)
            for i in range(max_running_jobs)
        ]
        self._threads.append(threading.Thread(target=self._watch, name="watch", daemon=True))

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def begin_stop(self, grace_s: float = 10.0) -> None:
        """Begin nothing more. What is finished within grace_s is stored; the rest goes on at the next start."""
        self._stop.show(grace_s)
        self._is_stopped.set()
        self._store.release()

    def stop(self, grace_s: float = 10.0) -> None:
        """The same, and wait until all is put away."""
        self.begin_stop(grace_s)
        ends_at_s = self._stop.let_go_at_s + PUT_AWAY_S
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(max(0.0, ends_at_s - time.monotonic()))

    def problems(self) -> list[str]:
        """What keeps jobs from moving, for /api/ready; empty if nothing does."""
        stalled = [f"{job_id} has not moved for {seconds:.0f} s." for job_id, seconds in self._stalled.copy().items()]
        return [*([self._full] if self._full else []), *stalled]

    def run_next(self, timeout_s: float = 0.0) -> bool:
        """Run the job that has waited longest, to its end -> whether there was one."""
        try:
            record = self._store.claim(timeout_s, lambda: not self._stop.is_shown)
        except StorageFull as error:
            self._show_full(error)
            return False
        if record is None:
            return False
        self._full = None
        self._running[record["job_id"]] = threading.current_thread()
        try:
            self._run(record)
        finally:
            del self._running[record["job_id"]]
        return True

    def _claim_and_run(self) -> None:
        while not self._stop.is_shown:
            try:
                if not self.run_next(CLAIM_S) and self._full:  # else it would come back at once, over and over
                    self._is_stopped.wait(STORE_AGAIN_S)
            except Exception:  # the loop must not end: what it could not do is in the log
                logger.exception("The worker stumbled")
                self._is_stopped.wait(CLAIM_S)

    def _run(self, record: Record) -> None:
        run = JobRun(self._store, record.copy(), self._pool, self._model, self._options, self._stop, self._careful_turn)
        status: JobStatusName = "failed"
        fields: dict[str, Any] = {}
        try:
            fields = run.run()
            status = "completed"
        except Canceled:
            status = "canceled"
        except (Stopped, PoolClosed):
            status = "submitted"
        except DescriberError as error:
            fields = {"error_code": error.code, "error_message": str(error)}
        except Exception as error:
            logger.exception("%s failed unexpectedly", record["job_id"])
            what = f"Something failed that should not have ({type(error).__name__}). The server's log tells more."
            fields = {"error_code": UnexpectedFailure.code, "error_message": what}
        self._end(record["job_id"], status, {**fields, "timings": run.timings()})
        self._on_end(run.stats.timings)

    def _end(self, job_id: str, status: JobStatusName, fields: dict[str, Any]) -> None:
        """Store how a job ended. While there is no room for even that, try again: the job keeps its place."""
        while True:
            try:
                self._store.end(job_id, status, **fields)
                self._full = None
                return
            except StorageFull as error:
                self._show_full(error)
                if self._is_stopped.wait(STORE_AGAIN_S):
                    return  # the next start finds it as one that was interrupted

    def _show_full(self, error: StorageFull) -> None:
        if self._full is None:
            logger.error("%s", error)
        self._full = str(error)

    def _watch(self) -> None:
        purged_at_s = -PURGE_S
        while not self._is_stopped.wait(WATCH_S):
            try:
                self._look_for_stalled()
                self._look_for_room()
                if time.monotonic() - purged_at_s > PURGE_S:
                    purged_at_s = time.monotonic()
                    self._store.purge()
            except StorageFull as error:
                self._show_full(error)
            except Exception:
                logger.exception("The watch stumbled")

    def _look_for_room(self) -> None:
        """See whether a disk that was full still is, where no job is there to find out. Raises StorageFull."""
        if self._full and not self._running and not self._store.index.queue:
            self._store.check_space()
            self._full = None

    def _look_for_stalled(self) -> None:
        stalled = {}
        for job_id in list(self._running):
            live = self._store.live(job_id)
            if live and (seconds := time.monotonic() - live.moved_at_s) > self._stalled_after_s:
                stalled[job_id] = seconds
                if job_id not in self._stalled:
                    logger.warning("%s has not moved for %.0f s", job_id, seconds)
        self._stalled = stalled
