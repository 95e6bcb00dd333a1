"""A whole server but for HTTP and the page: store, model, worker, webhooks and metrics, started and stopped together.

The model is loaded in the background: jobs are accepted at once, and wait for it. Nobody but a test or app.py needs
this file. Test: pytest tests/test_service.py
"""

import gc
import logging
import os
import threading
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

from jobs.auth import Gate, RateLimit, load_secret_bytes, parse_keys
from jobs.clock import ClockWatch
from jobs.http import Api
from jobs.job_run import RunOptions
from jobs.job_store import JobStore
from jobs.loading import load_here, load_on_cluster
from jobs.metrics import Metrics
from jobs.record import StoreLimits
from jobs.settings import Settings
from jobs.webhooks import WebhookSender, load_secret
from jobs.worker import Worker
from pipeline.answer_cache import AnswerCache
from pipeline.errors import DescriberError, QuestionTooLong
from pipeline.moondream.hub import Progress
from pipeline.moondream.prompts import Task
from pipeline.pool import Pool
from pipeline.results import ModelName
from pipeline.safe_http import Network
from pipeline.urls import UrlRules, parse_hosts

LOAD_AFTER_S = 0.3  # the server listens first: importing torch holds up everything else
LOAD_AGAIN_S = 60.0  # after a model could not be loaded: the network may be back
EXIT_STUCK = 70  # EX_SOFTWARE: whoever supervises the server starts it again
WATCH_S = 1.0
MINUTES_A_DAY = 24 * 60
MAX_LATE_S = 5.0  # that a look at the instances comes late on a busy machine
POOL_S = 1.0  # for an instance to end its step, once no job waits for it

logger = logging.getLogger(__name__)


class Service:
    """Raises InvalidOption for settings that cannot work, DataUnusable and StorageFull."""

    def __init__(
        self,
        settings: Settings,
        *,
        network: Network | None = None,
        results: Path | None = None,
        exit_process: Callable[[int], None] = os._exit,
    ) -> None:
        """results: a folder of what benchmarks have measured, by device."""
        self._settings, self._results, self._exit_process = settings, results, exit_process
        self.on_pool: Callable[[Pool], None] = lambda pool: None  # is told of it, once it is there
        self._network = network or Network(proxy_url=settings.proxy_url)
        self._rules = UrlRules(allow_private_urls=parse_hosts(settings.allow_private_urls))
        self._limits = settings.decode_limits
        keys = parse_keys(settings.api_keys, settings.admin_keys)
        self.store = JobStore(
            settings.data_dir,
            StoreLimits(
                max_queued_jobs=settings.max_queued_jobs,
                max_queued_jobs_per_owner=settings.max_queued_jobs_per_caller,
                retention_s=settings.retention_days * 86400,
                retention_bytes=settings.retention_bytes,
                min_free_bytes=settings.min_free_bytes,
            ),
        )
        try:
            session_secret = load_secret_bytes(settings.data_dir)
            self.gate = Gate(
                keys,
                session_secret,
                is_local=not (settings.allow_anonymous or settings.allowed_hosts),
                is_embedded=bool(settings.embed_origins),
            )
            secret = load_secret(settings.webhook_secret, settings.data_dir)
            self._webhooks = WebhookSender(self.store, secret, self._rules, self._network)
            self._cache: AnswerCache | None = None
            if settings.answer_cache_bytes:
                self._cache = AnswerCache(settings.data_dir / "answers.sqlite", settings.answer_cache_bytes)
                self.store.on_removed = self._cache.forget
            self.store.is_clock_steady = ClockWatch().is_steady
            num_jobs = self.store.recover()
        except BaseException:
            self.store.close()
            raise
        if num_jobs:
            logger.info("%d interrupted jobs go on", num_jobs)
        self.pool: Pool | None = None
        self._worker: Worker | None = None
        self._model: ModelName | None = None
        self._positions_needed: Callable[[Task], tuple[int, int]] | None = None  # and how many there are
        self._load_problem = f"The model {settings.model} is being loaded."
        self._num_tenths = -1  # of the download, that the log has told
        self._is_stopping, self._stopping, self._is_stopped = threading.Event(), threading.Lock(), False
        self.metrics = Metrics(self.store, lambda: self.pool, self.problems, self.warnings)
        self._threads = [
            threading.Thread(target=target, name=target.__name__.strip("_"), daemon=True)
            for target in (self._load_and_work, self._watch)
        ]

    def start(self) -> None:
        """Go on with what an earlier server left."""
        self._webhooks.start()
        for thread in self._threads:
            thread.start()

    def begin_stop(self, grace_s: float = 10.0) -> None:
        """Begin nothing more, and let those go who follow a job. From now on, grace_s runs."""
        if self._is_stopping.is_set():
            return
        logger.info("Stopping: what is finished within %g s is stored; another signal ends at once", grace_s)
        self._is_stopping.set()
        self.store.changes.tell_all()
        if self._worker:
            self._worker.begin_stop(grace_s)

    def stop(self, grace_s: float = 10.0) -> None:
        """Store what is finished within grace_s of the beginning; the rest goes on at the next start. Whoever else
        stops it meanwhile waits until all is put away."""
        with self._stopping:
            if not self._is_stopped:
                self._put_away(grace_s)
                self._is_stopped = True

    def _put_away(self, grace_s: float) -> None:
        self.begin_stop(grace_s)
        self._webhooks.stop()
        if self._worker:
            self._worker.stop(grace_s)
        if self.pool:
            self.pool.close(POOL_S)
        self.store.close()
        if self._cache:
            self._cache.close()

    def problems(self) -> list[str]:
        """Why jobs do not move; empty if they do."""
        if self._worker is None or self.pool is None:
            return [self._load_problem]
        return [*self.pool.problems(), *self._worker.problems()]

    def warnings(self) -> list[str]:
        """What is wrong although jobs move."""
        return self.pool.warnings() if self.pool else []

    @cached_property
    def api(self) -> Api:
        """What the routes of the API work with."""
        settings = self._settings
        return Api(
            store=self.store,
            gate=self.gate,
            metrics=self.metrics,
            rules=self._rules,
            rate_limit=RateLimit(settings.rate_limit_per_minute, settings.rate_limit_per_minute),
            upload_limit=RateLimit(settings.anonymous_upload_bytes / MINUTES_A_DAY, settings.anonymous_upload_bytes),
            decode_limits=self._limits,
            max_tokens=settings.max_tokens,
            model=lambda: self._model,
            pool=lambda: self.pool,
            problems=self.problems,
            warnings=self.warnings,
            check_task=self._check_task,
            is_stopping=self._is_stopping.is_set,
        )

    def _check_task(self, task: Task) -> None:
        """Raises QuestionTooLong. While the model is being loaded, nobody knows; then the job fails with it."""
        if self._positions_needed is None:
            return
        needed, available = self._positions_needed(task)
        if needed > available:
            raise QuestionTooLong(
                f"Image, prompt and answer need {needed} positions, {available} are there. Ask a shorter question or "
                "lower max_tokens."
            )

    def _load_and_work(self) -> None:
        self._is_stopping.wait(LOAD_AFTER_S)
        while not self._is_stopping.is_set():
            try:
                self._load()
                return
            except DescriberError as error:
                logger.error("No model: %s Next try in %.0f s.", error, LOAD_AGAIN_S)
                self._load_problem = f"{error} The server tries again every {LOAD_AGAIN_S:g} s."
            except Exception as error:
                logger.exception("The model could not be loaded")
                self._load_problem = f"The model could not be loaded ({type(error).__name__}): see the server's log."
            gc.collect()  # what was loaded so far: the errors held it
            self._is_stopping.wait(LOAD_AGAIN_S)

    def _load(self) -> None:
        settings = self._settings
        load = load_on_cluster if settings.pool == "ray" else load_here
        loaded = load(settings, self._results, self._tell)
        pool, model = loaded.pool, loaded.model
        self._model, self._positions_needed = model, loaded.positions_needed
        options = RunOptions(
            decode_limits=self._limits,
            rules=self._rules,
            network=self._network,
            deadline_s=settings.job_deadline_s,
            max_failures_in_row=settings.max_failures_in_row,
            cache=self._cache,
            on_frames=self.metrics.count_frames,
        )
        worker = Worker(
            self.store,
            pool,
            model,
            options,
            max_running_jobs=settings.max_running_jobs,
            stalled_after_s=settings.batch_deadline_s,
            on_end=self.metrics.count_run,
        )
        self.pool, self._worker = pool, worker
        if self._is_stopping.is_set():
            pool.close()
            return
        worker.start()
        try:
            self.on_pool(pool)
        except Exception:
            logger.exception("The page was not told how many frames the model takes at a time; it works all the same")
        logger.info("Ready: %s on %s in %s", model.id, model.device, model.dtype)

    def _tell(self, progress: Progress) -> None:
        """Tell /api/ready how far the model is, and the log at each tenth of a download."""
        self._load_problem = how_far(self._settings.model, progress)
        num_tenths = 10 * progress.num_bytes // (progress.total_bytes or progress.num_bytes or 1)
        if progress.stage == "downloaded" and num_tenths != self._num_tenths:
            self._num_tenths = num_tenths
            logger.info("%s", self._load_problem)

    def _watch(self) -> None:
        """End the process where an instance is stuck for good, or none works: no thread can be freed from a hanging
        device, and after some errors of CUDA only a new process can use it."""
        limit_s = self._settings.batch_deadline_s + self._settings.exit_when_stuck_s
        awake_s = worked_s = looked_s = time.monotonic()
        while not self._is_stopping.wait(WATCH_S):
            now_s = time.monotonic()
            if now_s - looked_s > MAX_LATE_S:  # the process itself was stopped: steps get their time anew
                awake_s = worked_s = now_s
            looked_s = now_s
            if self.pool is None or self.pool.num_working:
                worked_s = now_s
            elif now_s - worked_s > limit_s:
                logger.critical("No instance works since %.0f s: the server ends, to be started again", limit_s)
                self._exit_process(EXIT_STUCK)
                return
            if self.pool and (seconds := min(self.pool.longest_step_s(), now_s - awake_s)) > limit_s:
                logger.critical("A batch has run for %.0f s: the server ends, to be started again", seconds)
                self._exit_process(EXIT_STUCK)
                return


def how_far(model: str, progress: Progress) -> str:
    """Say it in a sentence: The model m is being downloaded: 1.2 of 3.9 GB (31%)."""
    num_bytes, total_bytes = progress.num_bytes, progress.total_bytes
    begun = f"The model {model} is being {progress.stage}"
    unit_bytes, unit = (1e9, "GB") if (total_bytes or num_bytes) >= 1e9 else (1e6, "MB")
    if total_bytes is None:
        return f"{begun}: {num_bytes / unit_bytes:.1f} {unit}."
    percentage = f"{100 * num_bytes // total_bytes}%"
    if progress.stage == "loaded":
        return f"{begun}: {percentage}."
    return f"{begun}: {num_bytes / unit_bytes:.1f} of {total_bytes / unit_bytes:.1f} {unit} ({percentage})."
