"""The files of jobs under the data directory, and how many bytes they take.

    jobs.jsonl                the records of all jobs
    incoming/                 uploads that are still arriving
    jobs/<job_id>/video       downloaded or uploaded
    jobs/<job_id>/frames.jsonl
    jobs/<job_id>/frames/<frame_idx>.jpg
    jobs/<job_id>.new         on its way in: no record is stored yet
    jobs/<job_id>.removed     on its way out
    orphans/<job_id>          files whose record was lost, for the operator to look at and to delete
    reserve                   room on the disk, to be given up so that a job can be deleted when there is no other

Test: pytest tests/test_job_files.py
"""

import errno
import itertools
import logging
import os
import secrets
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline.atomic import sync_folder
from pipeline.errors import StorageFull

NEW, HIDDEN = ".new", ".removed"
RESERVE_BYTES = 65536  # the lines of a thousand removals
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

logger = logging.getLogger(__name__)


class JobFiles:
    """Where the files of each job are. Counts what is kept, so that no request has to walk the disk."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.incoming, self._reserve = folder / "incoming", folder / "reserve"
        self._lock = threading.Lock()
        self._bytes: dict[str, int] = {}
        self._sharers: dict[int, list[str]] = {}  # jobs of one video, by its inode; its bytes count for the first
        self.total_bytes = 0
        with storing():
            (folder / "jobs").mkdir(parents=True, exist_ok=True)
            shutil.rmtree(self.incoming, ignore_errors=True)  # uploads that a killed server never acknowledged
            self.incoming.mkdir(exist_ok=True)
        self._keep_reserve()

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

    def link_video(self, job_id: str) -> Path:
        """Another name for a job's video, in incoming/, for another job to take over. Raises OSError."""
        path = self.incoming / secrets.token_hex(16)
        try:
            os.link(self.video(job_id), path)
            self._video_bytes(job_id)  # before the other job's
        except FileNotFoundError:
            raise
        except OSError:  # not every file system knows links
            try:
                shutil.copyfile(self.video(job_id), path)
            except BaseException:
                path.unlink(missing_ok=True)
                raise
        return path

    def make(self, job_id: str, upload: Path | None, store_record: Callable[[], object] = lambda: None) -> None:
        """Make a job's folder, with the uploaded video in it, and call `store_record`. Raises OSError.

        The folder has another name until the record is stored. So a start can tell the folder of a job that was never
        acknowledged, which it removes, from the folder of a job whose record was lost, which it keeps."""
        folder = self._new(job_id)
        if self.of(job_id).exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(self.of(job_id)))
        (folder / "frames").mkdir(parents=True)
        if upload is not None:
            os.replace(upload, folder / "video")
            sync_folder(folder)
        sync_folder(folder.parent)
        store_record()
        os.replace(folder, self.of(job_id))  # a start renames it if a kill or a power failure prevents it here
        if upload is not None:
            self.count(job_id, self._video_bytes(job_id))
        self._keep_reserve()

    def make_again(self, job_id: str) -> None:
        """Make the folder of a job that runs, if somebody has removed it. Raises OSError."""
        (self.of(job_id) / "frames").mkdir(parents=True, exist_ok=True)

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

    def remove_parts(self, job_id: str) -> None:
        """Remove what a killed server was writing. Raises OSError."""
        for path in self.of(job_id).rglob("*.part"):
            path.unlink()

    def count(self, job_id: str, num_bytes: int) -> None:
        """Some bytes were added to what a job keeps."""
        with self._lock:
            self._bytes[job_id] = self._bytes.get(job_id, 0) + num_bytes
            self.total_bytes += num_bytes

    def count_again(self, job_id: str) -> int:
        """Walk a job's folder -> its bytes, which are counted from now on."""
        video = self.video(job_id)
        others = [path for path in self.of(job_id).rglob("*") if path != video and path.is_file()]
        num_bytes = self._video_bytes(job_id) + sum(path.stat().st_size for path in others)
        self.remember(job_id, num_bytes)
        return num_bytes

    def _video_bytes(self, job_id: str) -> int:
        """What a job's video counts for: nothing if another job has the same file, and had it first."""
        try:
            of = self.video(job_id).stat()
        except OSError:
            return 0
        if of.st_nlink == 1:
            return of.st_size
        with self._lock:
            sharers = self._sharers.setdefault(of.st_ino, [])
            if job_id not in sharers:
                sharers.append(job_id)
            return of.st_size if sharers[0] == job_id else 0

    def remember(self, job_id: str, num_bytes: int) -> None:
        """What is known of a job's bytes without a walk."""
        self._video_bytes(job_id)  # before those of later jobs
        with self._lock:
            self.total_bytes += num_bytes - self._bytes.get(job_id, 0)
            self._bytes[job_id] = num_bytes

    def hide(self, job_id: str) -> None:
        """The first step of removing: until the record is gone, it can be taken back. A missing folder counts as
        removed. Raises OSError."""
        with suppress(FileNotFoundError):
            os.replace(self.of(job_id), self._hidden(job_id))

    def show(self, job_id: str) -> None:
        """Take the first step back. Raises OSError."""
        with suppress(FileNotFoundError):
            os.replace(self._hidden(job_id), self.of(job_id))

    def make_room(self, write: Callable[[], None]) -> None:
        """Write what lets a job be removed, if need be into the room kept for that. Raises OSError."""
        try:
            write()
        except OSError:
            self._reserve.unlink(missing_ok=True)
            write()

    def remove(self, job_id: str) -> None:
        """Remove all that a job keeps. What cannot be removed now is removed at the next start."""
        for folder in (self._new(job_id), self.of(job_id), self._hidden(job_id)):
            shutil.rmtree(folder, ignore_errors=True)
        self._keep_reserve()
        with self._lock:
            self.total_bytes -= self._bytes.pop(job_id, 0)
            inode = next((inode for inode, sharers in self._sharers.items() if job_id in sharers), None)
            if inode is None:
                return
            sharers = self._sharers[inode]
            heir = sharers[1] if sharers[0] == job_id and len(sharers) > 1 else None
            sharers.remove(job_id)
            if not sharers:
                del self._sharers[inode]
        if heir:
            self.count(heir, self._video_bytes(heir))

    def tidy(self, known: set[str]) -> set[str]:
        """See to the folders that a killed server left, and return the known jobs that have no folder. Raises OSError.

        A folder on its way in or out is removed, unless its job has a record: then it gets its name back. Files of a
        job without a record, as after a repair of jobs.jsonl, are nobody's to delete: they go to orphans/."""
        for path in [path for path in (self.folder / "jobs").iterdir() if path.is_dir() and not path.is_symlink()]:
            job_id = path.name.removesuffix(NEW).removesuffix(HIDDEN)
            is_moving, is_known = path.name != job_id, job_id in known
            if is_moving and is_known and not self.of(job_id).exists():
                os.replace(path, self.of(job_id))
            elif is_moving or not (is_known or _holds_files(path)):
                shutil.rmtree(path, ignore_errors=True)
            elif not is_known:
                logger.warning("%s has files and no record: moved to %s", job_id, orphan(self.folder, path))
        missing = {job_id for job_id in known if not self.of(job_id).exists()}
        for job_id in sorted(missing):
            logger.warning("The folder of %s is missing: its video and its results are lost", job_id)
        if num_orphans := sum(1 for _ in self.folder.glob("orphans/*")):
            what = "%d folders in %s belong to no job: look at them, and delete what nobody needs"
            logger.warning(what, num_orphans, self.folder / "orphans")
        return missing

    def _keep_reserve(self) -> None:
        """Take the room again, if it was given up and there is some now."""
        if not self._reserve.exists():
            try:
                self._reserve.write_bytes(os.urandom(RESERVE_BYTES))  # zeros take no room where disks are compressed
            except OSError:
                with suppress(OSError):
                    self._reserve.unlink(missing_ok=True)

    def _new(self, job_id: str) -> Path:
        return self.of(job_id).with_name(job_id + NEW)

    def _hidden(self, job_id: str) -> Path:
        return self.of(job_id).with_name(job_id + HIDDEN)


def settled(folder: Path) -> list[Path]:
    """Return the folders of jobs in a data directory whose records have to be stored: the others are on their way."""
    paths = folder.glob("jobs/*")
    return sorted(
        path for path in paths if path.is_dir() and not path.is_symlink() and path.suffix not in (NEW, HIDDEN)
    )


def orphan(folder: Path, job_folder: Path) -> Path:
    """Move the folder of a job that has no record to orphans/ -> where it is now. Raises OSError."""
    orphans = folder / "orphans"
    orphans.mkdir(exist_ok=True)
    names = itertools.chain([job_folder.name], (f"{job_folder.name}-{number}" for number in itertools.count(2)))
    free = next(orphans / name for name in names if not (orphans / name).exists())
    os.replace(job_folder, free)
    return free


def _holds_files(job_folder: Path) -> bool:
    """Return whether there is more than what a killed server was still writing."""
    return any(path.is_file() and path.suffix != ".part" for path in job_folder.rglob("*"))


@contextmanager
def storing() -> Iterator[None]:
    """Raises StorageFull for an OSError, which here is about the disk."""
    try:
        yield
    except OSError as error:
        is_full, why = error.errno in NO_ROOM, error.strerror or error
        what = "The disk of this host is full" if is_full else f"This host cannot store: {why}"
        raise StorageFull(
            f"{what}. Nothing was lost. Make room, for example by deleting old jobs, and try again."
        ) from error
