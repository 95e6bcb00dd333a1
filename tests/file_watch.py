"""Notice who opens a file, with Linux's inotify."""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

IN_OPEN = 0x20


class FileWatch:
    """Counts how often a file is opened, by any process."""

    def __init__(self, path: Path) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self._fd: int = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self._fd < 0 or libc.inotify_add_watch(self._fd, os.fsencode(path), IN_OPEN) < 0:
            raise OSError(ctypes.get_errno(), "inotify")

    def was_opened(self) -> bool:
        """Whether anybody did since the last call."""
        try:
            return len(os.read(self._fd, 65536)) > 0
        except BlockingIOError:
            return False

    def close(self) -> None:
        os.close(self._fd)


@contextmanager
def watching(path: Path) -> Iterator[FileWatch]:
    watch = FileWatch(path)
    try:
        yield watch
    finally:
        watch.close()
