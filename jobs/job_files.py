"""The files of jobs under the data directory, and how many bytes they take.

    jobs.jsonl                the records of all jobs
    incoming/                 uploads that are still arriving
    jobs/<job_id>/video       downloaded or uploaded
    jobs/<job_id>/frames.jsonl
    jobs/<job_id>/frames/<frame_idx>.jpg

Test: pytest tests/test_job_files.py
"""

import errno
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.atomic import sync_folder
from pipeline.errors import StorageFull

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class JobFiles:
    """Where the files of each job are. Counts what is kept, so that no request has to walk the disk."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.incoming = folder / "incoming"
        self._lock = threading.Lock()
        self._bytes: dict[str, int] = {}
        self.total_bytes = 0
        with storing():
            (folder / "jobs").mkdir(parents=True, exist_ok=True)
            shutil.rmtree(self.incoming, ignore_errors=True)  # uploads that a killed server never acknowledged
            self.incoming.mkdir(exist_ok=True)

    @property
    def free_bytes(self) -> int:
        return shutil.disk_usage(self.folder).free

    def of(self, job_id: str) -> Path:
        return self.folder / "jobs" / job_id

    def video(self, job_id: str) -> Path:
        return self.of(job_id) / "video"

    def frames(self, job_id: str) -> Path:
        return self.of(job_id) / "frames.jsonl"

    def picture(self, job_id: str, frame_idx: int) -> Path:
        return self.of(job_id) / "frames" / f"{frame_idx}.jpg"

    def make(self, job_id: str, upload: Path | None) -> None:
        """Make a job's folder, last, with the uploaded video in it. Raises OSError."""
        folder = self.of(job_id)
        (folder / "frames").mkdir(parents=True)
        if upload is not None:
            self.count(job_id, upload.stat().st_size)
            os.replace(upload, self.video(job_id))
            sync_folder(folder)
        sync_folder(folder.parent)

    def put_picture(self, job_id: str, frame_idx: int, jpeg: bytes) -> None:
        """Keep a frame's picture, whole or not at all. Raises OSError."""
        path = self.picture(job_id, frame_idx)
        if path.exists():  # of an earlier start
            return
        part = path.with_suffix(".part")
        try:
            part.write_bytes(jpeg)
            os.replace(part, path)
        except OSError:
            part.unlink(missing_ok=True)
            raise
        self.count(job_id, len(jpeg))

    def count(self, job_id: str, num_bytes: int) -> None:
        """Some bytes were added to what a job keeps."""
        with self._lock:
            self._bytes[job_id] = self._bytes.get(job_id, 0) + num_bytes
            self.total_bytes += num_bytes

    def count_again(self, job_id: str) -> int:
        """Walk a job's folder -> its bytes, which are counted from now on."""
        num_bytes = sum(path.stat().st_size for path in self.of(job_id).rglob("*") if path.is_file())
        self.remember(job_id, num_bytes)
        return num_bytes

    def remember(self, job_id: str, num_bytes: int) -> None:
        """What is known of a job's bytes without a walk."""
        self.count(job_id, num_bytes - self._bytes.get(job_id, 0))

    def remove(self, job_id: str) -> None:
        """Remove all that a job keeps. What cannot be removed now is removed at the next start."""
        shutil.rmtree(self.of(job_id), ignore_errors=True)
        with self._lock:
            self.total_bytes -= self._bytes.pop(job_id, 0)

    def remove_strangers(self, known: set[str]) -> list[str]:
        """Remove the folders of jobs that have no record -> their names"""
        strangers = [path.name for path in (self.folder / "jobs").iterdir() if path.name not in known]
        for name in strangers:
            self.remove(name)
        return strangers


@contextmanager
def storing() -> Iterator[None]:
    """Raises StorageFull for an OSError, which here is about the disk."""
    try:
        yield
    except OSError as error:
        what = (
            "The disk of this host is full" if error.errno in NO_ROOM else f"This host cannot store: {error.strerror}"
        )
        raise StorageFull(
            f"{what}. Nothing was lost. Make room, for example by deleting old jobs, and try again."
        ) from error
