"""Which version a data directory is of, and how one of an older server becomes one of this.

    version     this number; a directory that has jobs.jsonl and no such file is of version 0
    before-1/   the databases as they were before version 1, kept until somebody deletes them

A migration is done at the start, by whoever owns the directory. Its last step is to write the number: a server that is
killed over it does it again. To change what is stored: add a step to STEPS, and keep a small directory of the version
before in tests/data. Test: pytest tests/test_data_version.py
"""

import logging
import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from jobs.journal import DataUnusable, verify
from jobs.record import new_record
from jobs.store import JournalDB
from pipeline.atomic import write_private

logger = logging.getLogger(__name__)


class DataTooNew(DataUnusable):
    """A newer server has used the data directory, or something else has written its version."""


def _complete_records(folder: Path) -> None:
    """0 -> 1: what records lacked that were written before there was reuse, or other questions about a job."""
    with closing(JournalDB(folder / "jobs.jsonl")) as db:
        table = db.named("jobs")
        completed: dict[str, dict[str, Any]] = {}
        for job_id, record in table.stored().items():
            request = {"source_job_id": None, "reuse_similar": 0.0, **record["request"]}
            fresh = new_record(job_id, record["number"], record["owner"], request, record["submitted_at"])
            completed[job_id] = {**fresh, **record, "request": request}
        table.put(completed)


STEPS: tuple[Callable[[Path], None], ...] = (_complete_records,)  # STEPS[n] makes version n + 1 of version n
VERSION = len(STEPS)


def upgrade(folder: Path) -> None:
    """Make an owned data directory one of VERSION. Raises DataTooNew, JournalDamaged, OSError."""
    mark = folder / "version"
    version = _read(mark) if mark.exists() else 0 if (folder / "jobs.jsonl").exists() else VERSION
    if version > VERSION:
        raise DataTooNew(
            f"The data directory {folder} is of version {version}, by a newer server; this one knows {VERSION}. "
            "Nothing was changed. Start the newer server, or restore a backup from before."
        )
    for number in range(version, VERSION):
        verify(folder / "jobs.jsonl")  # before it is copied
        aside = folder / f"before-{number + 1}"
        if not aside.exists():
            part = aside.with_name(aside.name + ".part")
            shutil.rmtree(part, ignore_errors=True)
            for path in (folder / "jobs.jsonl", *folder.glob("jobs/*/frames.jsonl")):
                copied = part / path.relative_to(folder)
                copied.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(path, copied)
            part.rename(aside)
        STEPS[number](folder)
        logger.info(
            "The data directory %s is of version %d now; as it was before, it is in %s", folder, number + 1, aside
        )
    if version < VERSION or not mark.exists():
        write_private(mark, f"{VERSION}\n")


def _read(mark: Path) -> int:
    text = mark.read_text(encoding="utf-8", errors="replace").strip()
    if not (text.isascii() and text.isdigit()):
        raise DataTooNew(
            f"{mark} holds {text[:20]!r}, not the number of a version. Nothing was changed. If this server has used "
            f"the directory before, write {VERSION} into that file; if not, restore a backup."
        )
    return int(text)
