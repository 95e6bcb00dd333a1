"""Copy a data directory while a server works on it: `python -m jobs.backup DIR COPY`.

The server need not stop, and is not asked. What it has acknowledged before the copy began is in the copy: databases
grow, or are replaced whole (journal.py), so a copy of one is good up to its last line, which a reader cuts off if
torn. Records are copied before results and videos: a record never promises more than what is there. A job that is
deleted meanwhile is left out. A second copy to the same place brings only what is new. To restore, start a server on
the copy, or on a copy of it: jobs that ran go on after what they have.

The cache of answers, uploads that are still arriving, and the lock are left out. Test: pytest tests/test_backup.py
"""

import argparse
import json
import os
import shutil
import sys
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from jobs.journal import JournalDamaged
from jobs.store import JournalDB

MARK = "backup.json"  # says that the copy is whole: it is the first to go, and the last to come
SMALL = ("version", "session-secret", "webhook-secret")
SKIPPED = (".part", ".removed")


class NoBackup(Exception):
    """The copy cannot be made."""


@dataclass
class Report:
    num_jobs: int = 0
    num_bytes: int = 0
    num_copied_bytes: int = 0  # that were not in the copy before
    seconds: float = 0.0


def back_up(folder: Path, copy: Path) -> Report:
    """Raises NoBackup, JournalDamaged, OSError."""
    started_s, report = time.monotonic(), Report()
    if not (folder / "jobs.jsonl").exists():
        raise NoBackup(f"There is no jobs.jsonl in {folder}: it is no data directory.")
    if copy.resolve().is_relative_to(folder.resolve()):
        raise NoBackup(f"{copy} lies in the data directory. Choose a place outside, best on another disk.")
    if copy.exists() and any(copy.iterdir()) and not (copy / "jobs.jsonl").exists():
        raise NoBackup(f"{copy} holds other things. Give a new folder, or that of an earlier backup.")
    if (copy / "lock").exists():
        raise NoBackup(f"A server has worked in {copy} since. Give a new folder.")
    copy.mkdir(parents=True, exist_ok=True, mode=0o700)
    (copy / MARK).unlink(missing_ok=True)
    for name in SMALL:
        if (folder / name).exists():
            _copy(folder / name, copy / name, report)
    _copy(folder / "jobs.jsonl", copy / "jobs.jsonl", report)
    with closing(JournalDB(copy / "jobs.jsonl")) as db:
        table = db.named("jobs")
        videos: dict[int, Path] = {}
        for job_id in table.stored():
            if _copy_job(folder / "jobs" / job_id, copy / "jobs" / job_id, videos, report):
                report.num_jobs += 1
            else:  # deleted since the records were copied
                table.discard(job_id)
        for path in (copy / "jobs").glob("*"):
            if path.name not in table.stored():
                shutil.rmtree(path)
    report.seconds = round(time.monotonic() - started_s, 3)
    (copy / MARK).write_text(json.dumps({"made_at": time.time(), **vars(report)}) + "\n", encoding="utf-8")
    os.sync()
    return report


def _copy_job(folder: Path, copy: Path, videos: dict[int, Path], report: Report) -> bool:
    """-> whether the job was still there"""
    try:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and path.suffix not in SKIPPED:
                target = copy / path.relative_to(folder)
                target.parent.mkdir(parents=True, exist_ok=True)
                inode = path.stat().st_ino
                if path.name == "video" and inode in videos and not target.exists():
                    os.link(videos[inode], target)  # two jobs about one video
                else:
                    _copy(path, target, report)
                if path.name == "video":
                    videos[inode] = target
        copy.mkdir(parents=True, exist_ok=True)
        (copy / "frames").mkdir(exist_ok=True)
    except FileNotFoundError:
        pass
    if folder.is_dir():
        return True
    shutil.rmtree(copy, ignore_errors=True)
    return False


def _copy(path: Path, target: Path, report: Report) -> None:
    """Copy a file, unless the same is there. Raises OSError."""
    of = path.stat()
    report.num_bytes += of.st_size
    if target.exists() and path.suffix != ".jsonl":
        there = target.stat()
        if (there.st_size, there.st_mtime_ns) == (of.st_size, of.st_mtime_ns):
            return
    shutil.copy2(path, target)
    report.num_copied_bytes += of.st_size


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m jobs.backup", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="the data directory; its server may run")
    parser.add_argument("copy", type=Path, metavar="COPY", help="a new folder, or that of an earlier backup")
    args = parser.parse_args(arguments)
    try:
        report = back_up(args.folder, args.copy)
    except (NoBackup, JournalDamaged) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: The backup is not complete: {error.strerror} ({error.filename}).", file=sys.stderr)
        return 1
    copied = f"{report.num_copied_bytes:,} of {report.num_bytes:,} bytes copied"
    print(f"{report.num_jobs} jobs in {args.copy}, {copied}, in {report.seconds:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
