"""Look at, or mend, a data directory that no server uses: `python -m jobs.store check|repair DIR`.

`check` names damaged lines, and jobs that have a folder and no record. It changes nothing. `repair` moves damaged lines
into a file beside, and folders without a record to orphans/. It deletes nothing. A server does not start on a damaged
jobs.jsonl, nor on an empty one beside folders of jobs. Test: pytest tests/test_mend.py
"""

import argparse
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from jobs.job_files import NO_ROOM, orphan, settled
from jobs.journal import DataUnusable, damaged_lines, decode, give_like, is_torn, lines, repair
from jobs.store import owning
from pipeline.errors import StorageFull


class RecordsLost(DataUnusable):
    """There are folders of jobs, and no records at all."""


def check_records(folder: Path) -> None:
    """Raise RecordsLost where jobs.jsonl is missing or empty, and jobs have folders.

    A job's folder gets its name after the record is stored, and loses it before the record goes."""
    path, job_folders = folder / "jobs.jsonl", settled(folder)
    if job_folders and not _has_records(path):
        raise RecordsLost(
            f"{path} {'holds no record' if path.exists() else 'is missing'}, and beside it are the folders of "
            f"{len(job_folders)} jobs. Nothing was changed. Restore the file from a backup, or start without these "
            f"jobs: python -m jobs.store repair {folder} moves their folders to {folder / 'orphans'}"
        )


def _has_records(path: Path) -> bool:
    """Return whether there is a line, be it damaged, which is not torn."""
    first = next(lines(path), b"") if path.exists() else b""
    return bool(first) and (decode(first) is not None or not is_torn(first))


def unrecorded(folder: Path) -> list[Path]:
    """Return the folders of jobs that have no record."""
    path, known = folder / "jobs.jsonl", set[str]()
    for change in map(decode, lines(path) if path.exists() else ()):
        if change and change.table == "jobs":
            known.update(change.documents)
            known.difference_update(job_id for job_id, record in change.documents.items() if record is None)
    return [job_folder for job_folder in settled(folder) if job_folder.name not in known]


@contextmanager
def opening(folder: Path) -> Iterator[None]:
    """Raise StorageFull for an OSError that says that the disk is full, and DataUnusable for any other."""
    try:
        yield
    except OSError as error:
        where, why = error.filename or folder, error.strerror or error
        if error.errno in NO_ROOM:
            raise StorageFull(f"The disk of this host is full: {where} cannot be written. Make room.") from error
        raise DataUnusable(
            f"{where} cannot be used: {why}. Move it away if it does not belong there, or let the user of this process "
            "read and write it."
        ) from error


def check(folder: Path) -> int:
    """Print what is damaged -> in how many databases"""
    damaged = {path: numbers for path in databases(folder) if (numbers := damaged_lines(path))}
    for path, numbers in damaged.items():
        print(f"{path}: damaged in line {listed(numbers)}")
    lost = unrecorded(folder)
    if lost:
        print(f"{folder / 'jobs.jsonl'}: no record of {listed(path.name for path in lost)}")
    return len(damaged.keys() | ({folder / "jobs.jsonl"} if lost else set()))


def mend(folder: Path) -> None:
    """Move aside what is damaged, and print that. Raises OSError."""
    for path in databases(folder):
        if numbers := repair(path):
            print(f"{path}: damaged in line {listed(numbers)}: moved into a file beside it")
    for path in unrecorded(folder):
        moved = orphan(folder, path)
        give_like(folder, moved.parent)
        print(f"{folder / 'jobs.jsonl'}: no record of {path.name}: moved to {moved}")


def data_directory(folder: Path) -> Path:
    """Return the data directory that a folder of it lies in: that is what a server owns."""
    return next((path for path in folder.resolve().parents if (path / "jobs.jsonl").exists()), folder)


def databases(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.jsonl") if path.is_file())


def listed(things: Iterable[object]) -> str:
    return ", ".join(map(str, things))


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m jobs.store", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=("check", "repair"))
    parser.add_argument("folder", type=Path, metavar="DIR", help="the data directory, while no server uses it")
    args = parser.parse_args()
    os.umask(0o077)
    folder: Path = args.folder
    if not databases(folder) and not settled(folder):
        print(f"There are no databases in {folder}.", file=sys.stderr)
        return 2
    try:
        with opening(folder), owning(data_directory(folder), is_server=False):
            num_damaged = check(folder)
            if args.action == "repair":
                mend(folder)
    except (DataUnusable, StorageFull) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    num_databases = len({*databases(folder), *([folder / "jobs.jsonl"] if settled(folder) else [])})
    print(f"{num_databases} databases, {num_damaged} of them damaged.")
    return 1 if num_damaged and args.action == "check" else 0
