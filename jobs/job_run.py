"""One start of one job, in the thread of its caller: download, sample, describe, store.

A start goes on where the one before ended, however that was. What it stores is on the disk before it counts. Where the
server died while a job ran, that job is under suspicion: its next frames go through the model one at a time, each noted
before, so that a frame that kills the server is found; after two deaths over it, it is a result with an error. Of jobs
under suspicion, one has its turn at a time, so none is blamed for another's. Test: pytest tests/test_job_run.py
"""

import logging
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, cast

from jobs.frame_store import FrameStore
from jobs.job_files import storing
from jobs.job_store import JobStore
from jobs.live import Live
from jobs.record import Attempt, Record
from jobs.schema import UPLOAD, JobRequest
from pipeline.answer_cache import AnswerCache, answer_key
from pipeline.describe import LOOKAHEAD, describe_batches
from pipeline.download import DEFAULT_NETWORK, DEFAULT_RULES, DownloadLimits, download
from pipeline.errors import (
    Canceled,
    DeadlineExceeded,
    DownloadFailed,
    ModelChanged,
    NothingDescribed,
    ServerDied,
    StorageFull,
    TooManyFailures,
    VideoNotFound,
)
from pipeline.frames import SamplingNotes, probe, sample_frames
from pipeline.pool import Lane, Pool
from pipeline.results import FrameResult, ModelName, RunStats
from pipeline.safe_http import Network
from pipeline.sampling import DEFAULT_LIMITS, DecodeLimits, Frame, check_size
from pipeline.similarity import Gate, Repeat
from pipeline.thumbnail import thumbnail
from pipeline.urls import UrlRules

MAX_DEATHS_OVER_FRAME = 2
MAX_STARTS_WITHOUT_FRAME = 3
CHECK_BYTES = 16_000_000
TURN_S = 0.1  # between two looks at whether a waiting job has been canceled

logger = logging.getLogger(__name__)


class Stopped(Exception):
    """The server is stopping: the job goes on at the next start."""


@dataclass(frozen=True)
class RunOptions:
    """What holds for all jobs of a server."""

    decode_limits: DecodeLimits = DEFAULT_LIMITS
    rules: UrlRules = DEFAULT_RULES
    network: Network = DEFAULT_NETWORK
    deadline_s: float | None = None  # of a start
    max_failures_in_row: int = 10
    cache: AnswerCache | None = None
    on_frames: Callable[[list[FrameResult]], None] = lambda results: None


@dataclass
class StopSign:
    """Tells running jobs that the server stops: at once to begin nothing, and when to let go of what is begun.

    What is shown first counts."""

    is_shown: bool = False
    let_go_at_s: float = math.inf  # of the monotonic clock

    def show(self, grace_s: float) -> None:
        self.let_go_at_s = min(self.let_go_at_s, time.monotonic() + grace_s)
        self.is_shown = True


class JobRun:
    def __init__(
        self,
        store: JobStore,
        record: Record,
        pool: Pool,
        model: ModelName,
        options: RunOptions,
        stop: StopSign,
        careful_turn: threading.Lock,
    ) -> None:
        """`careful_turn` is held by a job under suspicion until it has stored a frame, and over each careful one."""
        self.job_id = record["job_id"]
        self.stats = RunStats()
        self._store, self._record, self._pool, self._model = store, record, pool, model
        self._options, self._stop, self._careful_turn = options, stop, careful_turn
        self._live = store.live(self.job_id) or Live()
        self._started_s = time.monotonic()
        self._attempt = record["attempt"]
        self._has_turn = False
        self._num_careful = 0  # frames that still go alone
        self._keys: dict[int, bytes] = {}  # under which the answers of frames in flight are to be remembered
        self._alone_idx: int | None = None  # the one that is in the model alone
        self._num_failures = 0  # in a row
        self._first_failure: str | None = None  # of these
        self._checked_bytes = 0  # of the download, when free space was last looked at

    def run(self) -> dict[str, Any]:
        """Describe what is left of the video -> what else is known of the completed job, as fields of its record.

        Raises DescriberError where the job fails, Canceled where somebody asked for that, and Stopped."""
        self._request = JobRequest.model_validate(self._record["request"])
        self._pin_model()
        with storing():
            self._store.files.make_again(self.job_id)
        video = self._video()
        notes = SamplingNotes()
        with self._store.frames(self.job_id) as frames, self._pool.lane(self._check) as lane:
            try:
                self._start_over(frames)
                self._count_failures(frames)
                self._judge_attempt(frames, lane)
                self._begin_attempt()
                self._probe(video)
                self._check()
                self._live.num_frames_before, self._live.describing_since_s = len(frames), time.monotonic()
                self._describe(video, frames, lane, notes)
            finally:
                self._end_turn()
            results = frames.results()
        if self._stop.is_shown:
            raise Stopped
        if all(result["status"] == "error" for result in results):
            raise NothingDescribed(f"No frame could be described. {results[0]['error_message']}")
        return {
            "num_frames_expected": len(results),
            "is_truncated": notes.is_truncated,
            "warnings": notes.warnings,
        }

    def timings(self) -> dict[str, float]:
        """Seconds by stage, with those of earlier starts."""
        self.stats.timings.overall_pipeline_internal = time.monotonic() - self._started_s
        before = self._record["timings"]
        return {stage: before.get(stage, 0.0) + seconds for stage, seconds in vars(self.stats.timings).items()}

    def _pin_model(self) -> None:
        pinned, own = self._record["model"], vars(self._model)
        if pinned is None:
            self._update(model=own)
        elif any(pinned[name] != own[name] for name in ("id", "revision", "dtype")):
            raise ModelChanged(
                f"The job was begun with {_named(pinned)}; this server now runs {_named(own)}. Retry starts it over."
            )

    def _video(self) -> Path:
        """The job's video on the disk, downloaded if it is not there."""
        path, url = self._store.files.video(self.job_id), self._request.video_url
        if path.exists():  # an upload, or downloaded by an earlier start: it gets its name when it is complete
            return path
        if url.startswith(UPLOAD):
            raise VideoNotFound("The uploaded file is not there any more. Upload it again.")
        self._update(stage="downloading")
        try:
            arrived = download(
                url,
                path,
                limits=DownloadLimits(max_video_bytes=self._options.decode_limits.max_video_bytes),
                rules=self._options.rules,
                network=self._options.network,
                on_progress=self._show_download,
                is_cancelled=self._is_interrupted,
            )
        except Canceled:
            self._check()  # tells why, if it is not that the server stops
            raise Stopped from None
        except DownloadFailed as error:
            if isinstance(error.__cause__, OSError):  # it is not the server that is to blame, but the disk
                raise StorageFull(str(error)) from error
            raise
        self._store.files.count(self.job_id, arrived.num_bytes)
        self.stats.timings.video_download = arrived.seconds
        self._update(container=arrived.container)
        return path

    def _probe(self, video: Path) -> None:
        """Find out how much there is to do."""
        limits, window = self._options.decode_limits, self._request.window()
        info = probe(video, limits)
        check_size(info, window, limits)
        self._update(
            stage="describing",
            container=info.container,
            duration_s=info.duration_s,
            average_fps=info.average_fps,
            num_frames_expected=info.estimate_samples(window),
        )

    def _start_over(self, frames: FrameStore) -> None:
        if self._record["starts_over"]:
            with storing():
                frames.clear()
            self._update(starts_over=False)

    def _count_failures(self, frames: FrameStore) -> None:
        """How many results up to the last are errors. Those from before a retry do not count."""
        stored = frames.after(self._record["redo_errors_to_seq"], len(frames))
        described = [result for result in stored if result.get("reused_from_frame_idx") is None]
        in_row = list(takewhile(lambda result: result["status"] == "error", reversed(described)))
        self._num_failures, self._first_failure = len(in_row), in_row[-1]["error_message"] if in_row else None

    def _judge_attempt(self, frames: FrameStore, lane: Lane) -> None:
        """Draw the conclusions if the server died while this job ran. Raises ServerDied, or what _keep raises."""
        attempt = self._attempt
        if not attempt["is_open"]:
            return
        self._num_careful = LOOKAHEAD * lane.num_slots  # every frame that can have been in flight
        frame_idx, num_deaths = attempt["frame_idx"], attempt["num_deaths"]
        if frame_idx is not None and num_deaths >= MAX_DEATHS_OVER_FRAME and frame_idx not in self._done(frames):
            message = f"The server died {num_deaths} times while it described this frame."
            logger.error("%s: frame %d is given up: %s", self.job_id, frame_idx, message)
            self._keep(frames, [FrameResult(frame_idx, attempt["timestamp_ms"], "", "error", message)])
        elif attempt["num_starts"] >= MAX_STARTS_WITHOUT_FRAME:
            raise ServerDied(
                f"The job was started {attempt['num_starts']} times, and each time the server died before it had "
                "described a frame. Look at the server's log, and retry the job when the cause is gone."
            )

    def _begin_attempt(self) -> None:
        """Leave word of this start, should the server die before it has stored a frame."""
        if self._attempt["is_open"]:
            self._take_turn()
        self._note(is_open=True, num_starts=self._attempt["num_starts"] + 1)

    def _take_turn(self) -> None:
        while not self._has_turn:
            self._has_turn = self._careful_turn.acquire(timeout=TURN_S)
            self._live.moved()  # if somebody is stuck, it is the one who has the turn
            self._check()

    def _end_turn(self) -> None:
        self._alone_idx = None
        if self._has_turn:
            self._has_turn = False
            self._careful_turn.release()

    def _done(self, frames: FrameStore) -> set[int]:
        """The frames that need no look: those with an answer, and with an error since the last retry."""
        redo_to_seq = self._record["redo_errors_to_seq"]
        return {r["frame_idx"] for r in frames.results() if r["status"] == "success" or r["seq"] > redo_to_seq}

    def _describe(self, video: Path, frames: FrameStore, lane: Lane, notes: SamplingNotes) -> None:
        window, task = self._request.window(), self._request.task()
        limits, show = self._options.decode_limits, self._show_sampling
        sampled = sample_frames(video, **vars(window), limits=limits, notes=notes, on_progress=show)
        with closing(sampled):
            source = self._to_describe(sampled, frames, Gate(self._request.reuse_similar))
            with closing(describe_batches(source, lane, task, self.stats, self._is_alone)) as batches:
                for batch in batches:
                    self._keep(frames, batch)

    def _to_describe(
        self, sampled: Iterator[Frame], frames: FrameStore, gate: Gate
    ) -> Iterator[Frame | Repeat | FrameResult]:
        """The frames that have no result yet, with their pictures kept: repeats marked, known answers given."""
        done = self._done(frames)
        for frame in sampled:
            if self._stop.is_shown:
                return  # what is in flight is finished
            if frame.frame_idx in done:
                result = frames.get(frame.frame_idx)
                if result and result["status"] == "success" and result.get("reused_from_frame_idx") is None:
                    gate.restore(frame, result["description"])
                continue
            with storing():
                self._store.files.put_picture(self.job_id, frame.frame_idx, thumbnail(frame.image))
            if repeat := gate.repeat(frame):
                yield repeat
                continue
            if known := self._known(frame):
                yield known
                continue
            if self._num_careful:
                self._send_alone(frame)
            yield frame

    def _known(self, frame: Frame) -> FrameResult | None:
        """The result of a frame whose answer was given before."""
        cache, task = self._options.cache, self._request.task()
        if cache is None or task.sampling.temperature > 0:
            return None
        key = answer_key(frame.image, task, self._model, self._record["owner"])
        text = cache.get(key)
        if text is None:
            self._keys[frame.frame_idx] = key
            return None
        return FrameResult(frame.frame_idx, frame.timestamp_ms, text, is_cached=True)

    def _remember(self, batch: list[FrameResult]) -> None:
        for result in batch:
            key = self._keys.pop(result.frame_idx, None)
            if key and result.status == "success" and self._options.cache:
                self._options.cache.put(key, result.description, self.job_id)

    def _send_alone(self, frame: Frame) -> None:
        """Leave word of the frame that goes to the model alone now, should the server die over it."""
        self._take_turn()
        self._num_careful, self._alone_idx = self._num_careful - 1, frame.frame_idx
        num_deaths = self._attempt["num_deaths"] if self._attempt["frame_idx"] == frame.frame_idx else 0
        self._note(frame_idx=frame.frame_idx, timestamp_ms=frame.timestamp_ms, num_deaths=num_deaths + 1)

    def _is_alone(self, frame_idx: int) -> bool:
        return frame_idx == self._alone_idx

    def _keep(self, frames: FrameStore, batch: list[FrameResult]) -> None:
        """Store results, and show that it goes on. Raises StorageFull, TooManyFailures."""
        with storing():
            frames.append([result.to_json(self.job_id) for result in batch])
        self._remember(batch)
        self._end_turn()
        if self._attempt["num_starts"]:
            self._note(num_starts=0)
        self._live.moved()
        self._store.changes.tell(self.job_id)
        self._options.on_frames(batch)
        for result in [result for result in batch if result.reused_from_frame_idx is None]:
            self._num_failures = self._num_failures + 1 if result.status == "error" else 0
            if self._num_failures == 1:
                self._first_failure = result.error_message
            if self._num_failures >= self._options.max_failures_in_row:
                raise TooManyFailures(
                    f"{self._num_failures} frames in a row could not be described. The first: {self._first_failure}"
                )

    def _note(self, **fields: Any) -> None:
        self._attempt = cast(Attempt, {**self._attempt, **fields})
        self._update(attempt=self._attempt)

    def _update(self, **fields: Any) -> None:
        self._store.update(self.job_id, **fields)
        self._record.update(fields)  # type: ignore[typeddict-item]

    def _check(self) -> None:
        """Called at least a few times a second, wherever the job waits. Raises Canceled, Stopped, DeadlineExceeded."""
        if self._store.is_cancel_requested(self.job_id):
            raise Canceled("The job was canceled.")
        if time.monotonic() >= self._stop.let_go_at_s:
            raise Stopped
        deadline_s = self._options.deadline_s
        if deadline_s is not None and time.monotonic() - self._started_s > deadline_s:
            raise DeadlineExceeded(
                f"The job ran longer than {deadline_s:g} s (setting job_deadline_s). What it described is kept; retry "
                "goes on from there."
            )

    def _is_interrupted(self) -> bool:
        try:
            self._check()
        except (Canceled, Stopped, DeadlineExceeded):
            return True
        return self._stop.is_shown

    def _show_download(self, num_bytes: int, num_total_bytes: int | None) -> None:
        if num_bytes - self._checked_bytes >= CHECK_BYTES:  # others fill the disk meanwhile, too
            self._checked_bytes = num_bytes
            self._store.check_space()
        self._live.bytes_downloaded, self._live.num_bytes_expected = num_bytes, num_total_bytes
        self._live.moved()
        self._store.changes.tell(self.job_id)

    def _show_sampling(self, time_s: float) -> None:
        self._live.moved()
        self._check()


def _named(model: dict[str, Any]) -> str:
    return f"{model['id']} {model['revision'] or ''} in {model['dtype']}".replace("  ", " ")
