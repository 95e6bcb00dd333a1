"""Damage to the last lines of jobs.jsonl: flipped bits, a flipped newline, zeros, an empty or a missing file.

Each is tried on a copy of a data directory with two acknowledged uploads. The server holds if `check` exits with 1, a
server refuses to start, and both videos are still on the disk afterwards.
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
TITLE = "Damage to the last lines of the records is never taken for a torn line"


def flipped(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


DAMAGES: dict[str, Callable[[bytes], bytes | None]] = {
    "a bit of the last line": lambda data: flipped(data, len(data) - 100),
    "a bit of its checksum": lambda data: flipped(data, len(data) - 5),
    "its newline": lambda data: flipped(data, len(data) - 1),
    "the newline before": lambda data: flipped(data, data.rindex(b"\n", 0, -1)),
    "zeros over it": lambda data: data[:-200] + bytes(200),
    "an empty file": lambda data: b"",
    "no file": lambda data: None,
}


def attack() -> Outcome:
    with tempfile.TemporaryDirectory() as place:
        made = Path(place) / "made"
        with ServerProcess(made).start(is_ready=False) as server, server.client() as client:
            for _ in range(2):
                answer = client.post("/api/upload", files={"file": ("v.mp4", SAMPLE.read_bytes())})
                assert answer.status_code == 202, answer.text
            server.kill()
        wrong = [name for name, damage in DAMAGES.items() if not _holds(made, Path(place) / "copy", damage)]
    return Outcome(
        not wrong, f"{len(DAMAGES) - len(wrong)} of {len(DAMAGES)} held; silent: {', '.join(wrong) or 'none'}"
    )


def _holds(made: Path, folder: Path, damage: Callable[[bytes], bytes | None]) -> bool:
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(made, folder)
    records = folder / "jobs.jsonl"
    damaged = damage(records.read_bytes())
    records.unlink() if damaged is None else records.write_bytes(damaged)
    check = subprocess.run([sys.executable, "-m", "jobs.store", "check", str(folder)], cwd=ROOT, capture_output=True)
    starts = True
    try:
        with ServerProcess(folder).start(is_ready=False):
            pass
    except AssertionError:  # the process has ended
        starts = False
    num_videos = sum(1 for path in folder.rglob("video") if path.is_file())
    return check.returncode == 1 and not starts and num_videos == 2


if __name__ == "__main__":
    sys.exit(report(POINT, TITLE, attack))
