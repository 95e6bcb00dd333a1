"""Copy a data directory while a server works on it: `python -m jobs.backup DIR COPY`.

The server need not stop, and is not asked. What it has acknowledged before the copy began is in the copy: databases
grow, or are replaced whole (journal.py), so a copy of one is good up to its last line, which a reader cuts off if
torn. Records are copied before results, and results before pictures and videos: what is copied first never promises
more than what follows. A job that is deleted meanwhile is left out. A second copy to the same place brings only what is
new. To restore, start a server on the copy, or on a copy of it: jobs that ran go on after what they have.

Left out are the cache of answers, uploads that are still arriving, the lock, and what was moved aside: orphans/ and
before-N/. Test: pytest tests/test_backup.py
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

from jobs.journal import DataUnusable, verify
from jobs.mend import check_records
from jobs.store import JournalDB

MARK = "backup.json"  # says that the copy is whole: it is the first to go, and the last to come
SMALL = ("version", "session-secret", "webhook-secret")

# What a file is known by: an inode alone is another file's once its file is deleted.
Identity = tuple[int, int, int]


class NoBackup(Exception):
    """The copy cannot be made."""


@dataclass
class Report:
    num_jobs: int = 0
    num_bytes: int = 0
    num_copied_bytes: int = 0  # that were not in the copy before
    seconds: float = 0.0


def back_up(folder: Path, copy: Path) -> Report:
    """Raises NoBackup, DataUnusable, OSError."""
    started_s, report = time.monotonic(), Report()
    if not (folder / "jobs.jsonl").exists():
        raise NoBackup(f"There is no jobs.jsonl in {folder}: it is no data directory.")
    if copy.resolve().is_relative_to(folder.resolve()):
        raise NoBackup(f"{copy} lies in the data directory. Choose a place outside, best on another disk.")
    if copy.exists() and any(copy.iterdir()) and not (copy / "jobs.jsonl").exists():
        raise NoBackup(f"{copy} holds other things. Give a new folder, or that of an earlier backup.")
    if (copy / "lock").exists():
        raise NoBackup(f"A server has worked in {copy} since. Give a new folder.")
    check_records(folder)  # an earlier copy is not replaced by what is damaged
    verify(folder / "jobs.jsonl")
    copy.mkdir(parents=True, exist_ok=True)
    copy.chmod(0o700)  # there are secrets in it
    (copy / MARK).unlink(missing_ok=True)
    for name in SMALL:
        if (folder / name).exists():
            _copy(folder / name, copy / name, report)
    _copy(folder / "jobs.jsonl", copy / "jobs.jsonl", report)
    with closing(JournalDB(copy / "jobs.jsonl")) as db:
        table = db.named("jobs")
        videos: dict[Identity, Path] = {}  # where each is in the copy
        for job_id in table.stored():
            if _copy_job(folder / "jobs" / job_id, copy / "jobs" / job_id, videos, report):
                report.num_jobs += 1
            else:  # deleted since the records were copied
                table.discard(job_id)
        for path in (copy / "jobs").glob("*"):
            if path.name not in table.stored():
                shutil.rmtree(path)
    os.sync()  # before the mark says so
    report.seconds = round(time.monotonic() - started_s, 3)
    (copy / MARK).write_text(json.dumps({"made_at": time.time(), **vars(report)}) + "\n", encoding="utf-8")
    return report


def _copy_job(folder: Path, copy: Path, videos: dict[Identity, Path], report: Report) -> bool:
    """-> whether the job was still there. Raises OSError."""
    while folder.is_dir():
        try:
            _copy_files(folder, copy, videos, report)
        except FileNotFoundError:
            continue  # one of them has gone since it was listed, perhaps with the job
        if folder.is_dir():
            return True
    shutil.rmtree(copy, ignore_errors=True)
    return False


def _copy_files(folder: Path, copy: Path, videos: dict[Identity, Path], report: Report) -> None:
    """Raises FileNotFoundError, OSError."""
    (copy / "frames").mkdir(parents=True, exist_ok=True)
    results = folder / "frames.jsonl"
    if results.exists():
        _copy(results, copy / results.name, report)
    for path in sorted(folder.rglob("*")):  # listed only now: a picture is stored before its result
        if path == results or path.suffix == ".part" or not path.is_file():
            continue
        target = copy / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        of = path.stat()
        shared = videos.setdefault((of.st_ino, of.st_mtime_ns, of.st_size), target) if path.name == "video" else target
        if shared != target and shared.exists() and not target.exists():
            os.link(shared, target)  # two jobs about one video
        else:
            _copy(path, target, report)


def _copy(path: Path, target: Path, report: Report) -> None:
    """Copy a file whole, unless the same is there. Raises FileNotFoundError, OSError."""
    of = path.stat()
    report.num_bytes += of.st_size
    if target.exists() and path.suffix != ".jsonl":
        there = target.stat()
        if (there.st_size, there.st_mtime_ns) == (of.st_size, of.st_mtime_ns):
            return
    part = target.with_name(target.name + ".part")
    shutil.copy2(path, part)
    os.replace(part, target)  # not written in place: another job's video may be the same file
    report.num_copied_bytes += of.st_size


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m jobs.backup", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="the data directory; its server may run")
    parser.add_argument("copy", type=Path, metavar="COPY", help="a new folder, or that of an earlier backup")
    args = parser.parse_args(arguments)
    os.umask(0o077)
    try:
        report = back_up(args.folder, args.copy)
    except (NoBackup, DataUnusable) as error:
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
