"""A file of changes, one line of JSON each: a change counts once its line is on the disk, and then whatever happens.

A line is [table, {document id: document or null}, checksum]: what one transaction put in place or removed, and the
CRC-32 of what stands before it. Reading the lines in order gives the state. A process killed in the middle of a line
leaves a torn last one, which was never acknowledged and is cut off when the file is opened; any other line that does
not check is damage, which is named and never passed over. Knows nothing of TinyDB or jobs.
Test: pytest tests/test_journal.py
"""

import contextlib
import errno
import logging
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from pipeline.atomic import sync_folder

logger = logging.getLogger(__name__)

Documents = Mapping[str, Mapping[str, Any] | None]  # None: removed


@dataclass(frozen=True)
class Change:
    """One transaction on one table."""

    table: str
    documents: Documents


class JournalDamaged(Exception):
    """A line other than the last does not check."""

    def __init__(self, path: Path, line_number: int, offset: int) -> None:
        super().__init__(
            f"{path} is damaged in line {line_number}, at byte {offset}. Nothing was changed. Restore the file from a "
            f"backup, or move the line aside: python -m jobs.store repair {path.parent}"
        )
        self.path, self.line_number, self.offset = path, line_number, offset


class Journal:
    """An open file of changes. One writer at a time: the caller holds a lock."""

    def __init__(self, path: Path, *, is_synced: bool = True) -> None:
        """Open or create the file. is_synced=False leaves the last changes to the system, and so to a power failure."""
        self.path, self._is_synced = path, is_synced
        is_new = not path.exists()
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        self._size = os.fstat(self._fd).st_size
        self.num_lines = 0
        if is_new:
            sync_folder(path.parent)

    def read(self) -> Iterator[Change]:
        """Read all changes, once, before the first append. Cuts a torn last line off. Raises JournalDamaged."""
        offset, self.num_lines = 0, 0
        for line in lines(self.path):
            change = decode(line)
            if change is None:
                if offset + len(line) < self._size:
                    raise JournalDamaged(self.path, self.num_lines + 1, offset)
                logger.warning("%s: cut %d bytes of a line that was never finished", self.path, len(line))
                self._cut(offset)
                return
            yield change
            offset, self.num_lines = offset + len(line), self.num_lines + 1

    def append(self, change: Change) -> None:
        """Write a change, and return when it is on the disk. Raises OSError, and nothing is written then."""
        line = encode(change)
        if os.fstat(self._fd).st_size != self._size:  # what an earlier failure left could not be cut then
            self._cut(self._size)
        try:
            if os.write(self._fd, line) != len(line):  # a full disk takes a part of it
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if self._is_synced:
                _sync(self._fd)
        except OSError:
            with contextlib.suppress(OSError):
                self._cut(self._size)
            raise
        self._size, self.num_lines = self._size + len(line), self.num_lines + 1

    def rewrite(self, changes: Iterable[Change]) -> None:
        """Replace the whole file by these changes, at once. Raises OSError, and the old file stays then."""
        part = self.path.with_name(self.path.name + ".part")
        num_lines = size = 0
        # Opened before the old file is gone: if no file can be opened, nothing has changed yet.
        fd = os.open(part, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)
        try:
            with open(fd, "wb", closefd=False) as file:
                for change in changes:
                    num_lines, size = num_lines + 1, size + file.write(encode(change))
                file.flush()
                os.fsync(fd)
            os.replace(part, self.path)
        except BaseException:
            os.close(fd)
            part.unlink(missing_ok=True)
            raise
        os.close(self._fd)
        self._fd, self._size, self.num_lines = fd, size, num_lines
        sync_folder(self.path.parent)

    def close(self) -> None:
        fd, self._fd = self._fd, -1  # the number may be another file's next: whoever still writes is refused
        os.close(fd)

    def _cut(self, size: int) -> None:
        os.ftruncate(self._fd, size)
        _sync(self._fd)
        self._size = size


def encode(change: Change) -> bytes:
    """Raises TypeError for what JSON cannot hold."""
    body = orjson.dumps([change.table, change.documents])[:-1]
    return body + b',"%08x"]\n' % zlib.crc32(body)


def decode(line: bytes) -> Change | None:
    """None for a line that is torn or damaged."""
    body, mark, checksum = line[:-13], line[-13:-11], line[-11:-3]
    if not line.endswith(b'"]\n') or mark != b',"' or checksum != b"%08x" % zlib.crc32(body):
        return None
    try:
        table, documents, _ = orjson.loads(line)
    except (orjson.JSONDecodeError, ValueError):
        return None
    return Change(table, documents)


def lines(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        yield from file


def damaged_lines(path: Path) -> list[int]:
    """The numbers of the lines that do not check. A torn last line is none of them: opening the file cuts it off."""
    is_whole = [decode(line) is not None for line in lines(path)]
    return [number for number, whole in enumerate(is_whole[:-1], 1) if not whole]


def repair(path: Path) -> list[int]:
    """Move the damaged lines into a file beside this one. -> their numbers"""
    numbers = damaged_lines(path)
    if numbers:
        num_before = len(list(path.parent.glob(f"{path.name}.damaged-*")))
        numbered = list(enumerate(lines(path), 1))
        aside = path.with_name(f"{path.name}.damaged-{num_before + 1}")
        _write_whole(aside, b"".join(line for number, line in numbered if number in numbers))
        _write_whole(path, b"".join(line for number, line in numbered if number not in numbers))
    return numbers


def _write_whole(path: Path, content: bytes) -> None:
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
    sync_folder(path.parent)


_sync = getattr(os, "fdatasync", os.fsync)  # not on macOS
