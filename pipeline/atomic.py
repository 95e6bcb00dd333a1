"""Write a file whole or not at all, and make it last."""

import os
from pathlib import Path

from pipeline.errors import InvalidOption


def check_writable(path: Path, must_not_be: Path | None) -> None:
    """Find out before the work whether the results can be written. Raises InvalidOption if not."""
    if not path.name or path.is_dir():
        raise InvalidOption(f"{str(path)!r} is a folder: give the name of a file for the results.")
    folder = path.resolve().parent
    if not folder.is_dir():
        raise InvalidOption(f"There is no folder {folder} to write the results to. Make it, or give another file.")
    if path.exists() and must_not_be and must_not_be.exists() and path.samefile(must_not_be):
        raise InvalidOption("The results would overwrite the video. Give another file.")
    if not path.exists() or path.is_file():
        try:
            part = _part(path)
            part.touch(exist_ok=False)
            part.unlink()
        except OSError as error:
            raise InvalidOption(f"{path} cannot be written: {error.strerror}. Give another file.") from error


def write_atomically(path: Path, text: str) -> None:
    """Write a text file that appears complete, through links, synced; a device or pipe is simply written to.

    Raises InvalidOption if the place cannot be written; then nothing is left behind.
    """
    part = _part(path)
    try:
        if path.exists() and not path.is_file():
            path.write_text(text, encoding="utf-8")
            return
        with part.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path.resolve())
    except OSError as error:
        part.unlink(missing_ok=True)
        raise InvalidOption(f"{path} cannot be written: {error.strerror}. Give another file.") from error


def write_private(path: Path, text: str) -> None:
    """Write an ASCII file whole or not at all, synced, and at no time for others to read. Raises OSError."""
    part = _part(path)
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="ascii") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make new names in a folder last."""
    if os.name != "posix":
        return  # elsewhere a folder cannot be opened
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _part(path: Path) -> Path:
    """A name of our own beside the file that `path` leads to."""
    path = path.resolve()
    return path.with_name(f".{path.name}.{os.getpid()}.part")
