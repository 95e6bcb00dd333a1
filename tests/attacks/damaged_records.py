"""Damage to the last lines of jobs.jsonl: flipped bits, a flipped newline, zeros, an empty or a missing file.

Each is done to a copy of a data directory with two acknowledged uploads. The server holds if `check` exits with 1, if a
server does not start and says what to do, if `repair` lets it start, and if both videos are still on the disk then.
"""

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from serving import SAMPLE, ServerProcess

from tests.attacks import ROOT
from tests.attacks.outcome import Outcome, report

POINT = "1"
TITLE = "damage to the last lines of the records is named, and no acknowledged upload loses its video"
NUM_UPLOADS = 2
NUM_FLIPS = 24  # in the last line, evenly over it, that `check` has to name


def attack() -> Outcome:
    with tempfile.TemporaryDirectory() as place:
        made, folder = Path(place) / "made", Path(place) / "copy"
        with ServerProcess(made).start(is_ready=False) as server, server.client() as http:
            for _ in range(NUM_UPLOADS):
                http.post("/api/upload", files={"file": ("v.mp4", SAMPLE.read_bytes())}).raise_for_status()
            server.kill()
        num_named = sum(_check(made, folder, flipped(bit)) == 1 for bit in _bits(made))
        silent = [name for name, damage in DAMAGES.items() if not _holds(made, folder, damage)]
    return Outcome(
        num_named == NUM_FLIPS and not silent,
        f"check named {num_named} of {NUM_FLIPS} flipped bits of the last line; {len(DAMAGES) - len(silent)} of "
        f"{len(DAMAGES)} kinds of damage kept the server from starting, with all videos kept"
        + (f"; not: {', '.join(silent)}" if silent else ""),
    )


Damage = Callable[[bytes], bytes | None]  # None: the file is removed


def flipped(bit: int) -> Damage:
    """Flip a bit, counted from the end of the file where it is negative."""

    def flip(data: bytes) -> bytes:
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        return bytes(changed)

    return flip


def zeros(num_lines: int, num_more: int) -> Damage:
    """Put zeros over the last lines, and behind them."""

    def blank(data: bytes) -> bytes:
        lines = data.splitlines(keepends=True)
        kept = b"".join(lines[:-num_lines])
        return kept + bytes(len(data) - len(kept) + num_more)

    return blank


DAMAGES: dict[str, Damage] = {
    "a bit in the last line": flipped(-8 * 200),
    "a bit of its checksum": flipped(-8 * 5),
    "its newline": flipped(-7),
    "the newline before it": lambda data: flipped(8 * data.rindex(b"\n", 0, -1) + 5)(data),
    "zeros over its end": lambda data: data[:-60] + bytes(60),
    "zeros over it": zeros(1, 0),
    "zeros over the last two lines and behind": zeros(2, 4096),
    "zeros over everything": lambda data: bytes(len(data)),
    "an empty file": lambda data: b"",
    "no file": lambda data: None,
}


def _bits(made: Path) -> list[int]:
    data = (made / "jobs.jsonl").read_bytes()
    num_bits = 8 * (len(data) - data.rindex(b"\n", 0, -1) - 1)
    return [-1 - number * num_bits // NUM_FLIPS for number in range(NUM_FLIPS)]


def _damaged(made: Path, folder: Path, damage: Damage) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(made, folder)
    records = folder / "jobs.jsonl"
    changed = damage(records.read_bytes())
    if changed is None:
        records.unlink()
    else:
        records.write_bytes(changed)


def _store(action: str, folder: Path) -> int:
    command = [sys.executable, "-m", "jobs.store", action, str(folder)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, timeout=60).returncode


def _check(made: Path, folder: Path, damage: Damage) -> int:
    _damaged(made, folder, damage)
    return _store("check", folder)


def _holds(made: Path, folder: Path, damage: Damage) -> bool:
    is_named = _check(made, folder, damage) == 1
    server = ServerProcess(folder, log=folder.with_name("refused.log"))
    server.log.write_bytes(b"")
    is_refused = not _starts(server)
    said = server.log.read_text(encoding="utf-8")
    is_clear = "python -m jobs.store repair" in said and "Traceback" not in said
    is_kept = _num_videos(folder) == NUM_UPLOADS
    is_repaired = _store("repair", folder) == 0 and _starts(ServerProcess(folder)) and _store("check", folder) == 0
    return is_named and is_refused and is_clear and is_kept and is_repaired and _num_videos(folder) == NUM_UPLOADS


def _starts(server: ServerProcess) -> bool:
    try:
        with server.start(is_ready=False):
            return True
    except AssertionError:  # the process has ended
        return False


def _num_videos(folder: Path) -> int:
    return sum(path.is_file() for path in folder.rglob("video"))


if __name__ == "__main__":
    sys.exit(report(POINT, TITLE, attack))
