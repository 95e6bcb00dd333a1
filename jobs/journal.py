"""A file of changes, one line of JSON each: a change counts once its line is on the disk, and then whatever happens.

A line is [table, {document id: document or null}, checksum]: what one transaction put in place or removed, and the
CRC-32 of what stands before it. Reading the lines in order gives the state. Two kinds of lines do not check:

- A torn line is the last one, and only the beginning of a line: a process was killed while it wrote, or the disk was
  full. It has no newline and was never acknowledged. Opening the file moves its bytes into NAME.cut, with a warning.
- Every other line that does not check is damage, also a last line that ends in a newline, and zeros at the end. Opening
  the file raises JournalDamaged and changes nothing.

Knows nothing of TinyDB or jobs. Test: pytest tests/test_journal.py
"""

import contextlib
import errno
import itertools
import json
import logging
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from pipeline.atomic import sync_folder

logger = logging.getLogger(__name__)

Documents = Mapping[str, Mapping[str, Any] | None]  # None: removed
MAX_CUT_BYTES = 1_000_000  # of torn lines kept in NAME.cut, but for the last one
FIRST_PRINTABLE = 0x20  # JSON text on one line has no byte below: the newline and zeros are below


@dataclass(frozen=True)
class Change:
    """One transaction on one table."""

    table: str
    documents: Documents


class DataUnusable(Exception):
    """A data directory cannot be used as it is. The message says what to do."""


class JournalDamaged(DataUnusable):
    """A line does not check, and it is not a torn one."""

    def __init__(self, path: Path, line_number: int, offset: int) -> None:
        super().__init__(
            f"{path} is damaged in line {line_number}, at byte {offset}. Nothing was changed. Restore the file from a "
            f"backup, or move the line aside: python -m jobs.store repair {path.parent}"
        )


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
                if not is_torn(line):
                    raise JournalDamaged(self.path, self.num_lines + 1, offset)
                self._keep_aside(line)
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

    def _keep_aside(self, torn: bytes) -> None:
        """Add a torn line to NAME.cut, which begins anew when it is large. A full disk must not keep a server from
        starting, as nobody was ever told that the line is stored: then the warning alone is left."""
        path = self.path.with_name(self.path.name + ".cut")
        kept = f"kept in {path.name}"
        try:
            flags = os.O_TRUNC if path.exists() and path.stat().st_size > MAX_CUT_BYTES else os.O_APPEND
            with open(os.open(path, os.O_WRONLY | os.O_CREAT | flags, 0o600), "wb") as file:
                file.write(torn + b"\n")
        except OSError as error:
            kept = f"not kept: {error.strerror}"
        logger.warning("%s: cut %d bytes of a line that was never finished (%s)", self.path, len(torn), kept)

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


def is_torn(line: bytes) -> bool:
    """Return whether bytes that do not decode are the beginning of a line and nothing else.

    A whole line with a wrong byte in place of its newline is no beginning. Zeros are none either: a disk can put them
    over acknowledged lines. A power failure can also leave them behind the last acknowledged line (ext4, in the last
    block); nothing tells the two apart, so both are damage, and `repair` moves the zeros aside."""
    if not line.startswith(b'["'[: len(line)]) or min(line) < FIRST_PRINTABLE:
        return False
    text = line.decode(errors="replace")
    try:
        _, end = json.JSONDecoder().raw_decode(text)
    except ValueError:
        return True  # the JSON text is not finished
    return end == len(text)  # it lacks its newline alone: it was not acknowledged, and perhaps refused


def lines(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        yield from file


def damaged_lines(path: Path) -> list[int]:
    """Return the numbers of the damaged lines. A torn line is none of them: opening the file cuts it off."""
    return [number for number, _ in _damage(path)]


def verify(path: Path) -> None:
    """Raise JournalDamaged if any line is damaged. Changes nothing, also while a server writes."""
    for number, offset in _damage(path):
        raise JournalDamaged(path, number, offset)


def _damage(path: Path) -> Iterator[tuple[int, int]]:
    """Yield the number and the offset of each damaged line."""
    offset = 0
    for number, line in enumerate(lines(path), 1):
        if decode(line) is None and not is_torn(line):
            yield number, offset
        offset += len(line)


def repair(path: Path) -> list[int]:
    """Move the damaged lines into NAME.damaged-N, and return their numbers. Raises OSError, and nothing has changed."""
    damaged = damaged_lines(path)
    if damaged:
        names = (path.with_name(f"{path.name}.damaged-{number}") for number in itertools.count(1))
        aside = next(name for name in names if not name.exists())
        try:
            _write_like(path, aside, (line for number, line in enumerate(lines(path), 1) if number in damaged))
            _write_like(path, path, (line for number, line in enumerate(lines(path), 1) if number not in damaged))
        except OSError:
            aside.unlink(missing_ok=True)
            raise
    return damaged


def _write_like(model: Path, path: Path, content: Iterable[bytes]) -> None:
    """Write a file whole or not at all, with the mode and, where root does it, the owner of `model`. Raises OSError."""
    part = path.with_name(path.name + ".part")
    try:
        with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.writelines(content)
            file.flush()
            os.fsync(file.fileno())
        shutil.copymode(model, part)
        give_like(model, part)
        os.replace(part, path)
    except OSError:
        part.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def give_like(model: Path, path: Path) -> None:
    """Give a file to the owner of `model`, if this process may: root mends what a server without its rights reads."""
    of = model.stat()
    if hasattr(os, "chown"):  # not on Windows
        with contextlib.suppress(PermissionError):
            os.chown(path, of.st_uid, of.st_gid)


_sync = getattr(os, "fdatasync", os.fsync)  # not on macOS
