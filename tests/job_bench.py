"""What the tests of the worker share: a data directory with a pool of watched engines and a worker, again and again."""

import dataclasses
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from local_server import Lab, LocalServer
from pool_watch import Watch

from jobs.frame_store import Result
from jobs.job_run import RunOptions
from jobs.job_store import JobStore
from jobs.record import Record, Upload
from jobs.schema import UPLOAD, JobRequest
from jobs.worker import Worker
from pipeline.moondream.checkpoint import Checkpoint
from pipeline.pool import Pool
from pipeline.results import FrameResult, ModelName

DEMO = ModelName("demo", None, "cpu", "float32")


class Death(BaseException):
    """Ends a run as the end of its process would: nothing more is stored."""


class Bench:
    """Jobs are run by worker.run_next() in the test's thread, or by worker.start()."""

    def __init__(self, folder: Path, demo: Checkpoint, lab: Lab) -> None:
        self.folder, self.watch, self.lab = folder, Watch(demo), lab
        self.model, self.options, self.max_running_jobs = DEMO, RunOptions(), 2
        self.is_told: Callable[[list[FrameResult]], None] = lambda results: None  # in the job's thread, of each batch
        self.num_described = 0
        self.is_open = False
        self.open()

    def open(self) -> None:
        """Start the server, as it were."""
        self.store = JobStore(self.folder / "data")
        self.store.recover()
        self.pool = Pool(self.watch.make_engine)
        options = dataclasses.replace(self.options, network=self.lab.network(), on_frames=self._on_frames)
        self.worker = Worker(self.store, self.pool, self.model, options, max_running_jobs=self.max_running_jobs)
        self.is_open = True

    def close(self) -> None:
        if self.is_open:
            self.is_open = False
            self.watch.may_go_on.set()
            self.worker.stop()
            self.pool.close()
            self.store.close()

    def reopen(self, **changed: Any) -> None:
        """End the server, and start it again with something changed: model, options, ..."""
        self.close()
        for name, value in changed.items():
            setattr(self, name, value)
        self.open()

    def serve(self, server: LocalServer) -> str:
        """-> the URL of its video"""
        self.options = dataclasses.replace(self.options, rules=self.lab.rules(server.port))
        self.reopen()
        return f"http://video.example:{server.port}/video.mp4"

    def upload(self, video: Path, **request: Any) -> str:
        """Queue a job about a copy of the video."""
        copied = Path(shutil.copy(video, self.store.files.incoming / "copy"))
        return self._add(UPLOAD + video.name, Upload(copied, "avi"), request)

    def submit(self, url: str, **request: Any) -> str:
        return self._add(url, None, request)

    def run(self, job_id: str) -> Record:
        """Run the next job, which has to be this one."""
        assert self.worker.run_next()
        record = self.store.get(job_id)
        assert record["status"] != "submitted" or self.worker._stop.is_shown
        return record

    def results(self, job_id: str) -> list[Result]:
        with self.store.frames(job_id) as frames:
            return frames.results()

    def told(self, job_id: str) -> list[tuple[int, int, str, str]]:
        """What is the same whenever it is described."""
        return [(r["frame_idx"], r["timestamp_ms"], r["status"], r["description"]) for r in self.results(job_id)]

    def after_frames(self, number: int, act: Callable[[], Any]) -> None:
        """Act once, in the job's thread, when so many frames have a result."""
        seen, due = 0, [act]

        def is_told(results: list[FrameResult]) -> None:
            nonlocal seen
            seen += len(results)
            if seen >= number and due:
                due.pop()()

        self.is_told = is_told

    def _add(self, video_url: str, upload: Upload | None, request: dict[str, Any]) -> str:
        asked = JobRequest(video_url=video_url, **{"target_fps": 25, "max_tokens": 16, "reuse_similar": 0, **request})
        return self.store.add(asked.model_dump(), "me", upload)

    def _on_frames(self, results: list[FrameResult]) -> None:
        self.num_described += sum(result.status == "success" for result in results)
        self.is_told(results)


def skippable(monkeypatch: pytest.MonkeyPatch, module: str) -> Callable[[float], None]:
    """Put a clock into a module that can be put on. -> what does that, by seconds"""
    skipped = [0.0]
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + sum(skipped), sleep=time.sleep)
    monkeypatch.setattr(f"{module}.time", clock)
    return skipped.append
