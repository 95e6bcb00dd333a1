"""Files of a data directory that are folders, and a lock file that was removed while a server runs."""

import subprocess
import sys
import tempfile
from pathlib import Path

from serving import ServerProcess

from tests.attacks import ROOT
from tests.attacks.outcome import Outcome, report

POINT = "2"
TITLE = "a folder in the place of a file is named, and a removed lock lets no second server in"


def attack() -> Outcome:
    with tempfile.TemporaryDirectory() as place:
        held = {
            "answers.sqlite as a folder": _starts_without_cache(Path(place) / "cache"),
            "answers.sqlite as no database": _starts_without_cache(Path(place) / "text", is_folder=False),
            "lock as a folder": _is_named(Path(place) / "lock", "lock"),
            "jobs.jsonl as a folder": _is_named(Path(place) / "records", "jobs.jsonl"),
            "a removed lock": _is_alone(Path(place) / "alone"),
        }
    broken = [name for name, is_held in held.items() if not is_held]
    return Outcome(not broken, f"{len(held) - len(broken)} of {len(held)} held; not: {', '.join(broken) or 'none'}")


def _starts_without_cache(folder: Path, *, is_folder: bool = True) -> bool:
    path = folder / "answers.sqlite"
    (path if is_folder else folder).mkdir(parents=True)
    if not is_folder:
        path.write_bytes(b"no database" * 999)
    server = ServerProcess(folder, answer_cache_bytes=1_000_000)
    try:
        with server.start(is_ready=False):
            pass
    except AssertionError:  # the process has ended
        return False
    said = server.log.read_text(encoding="utf-8")
    return "cache of answers" in said and "Traceback" not in said


def _is_named(folder: Path, name: str) -> bool:
    (folder / name).mkdir(parents=True)
    code, said = _second(folder)
    return code == 2 and f"{folder / name} cannot be used: Is a directory" in said and "Traceback" not in said


def _is_alone(folder: Path) -> bool:
    with ServerProcess(folder).start(is_ready=False):
        (folder / "lock").unlink()
        code, said = _second(folder)
        check = subprocess.run(
            [sys.executable, "-m", "jobs.store", "check", str(folder)], cwd=ROOT, capture_output=True
        )
    return code == 2 and "Another process uses the data directory" in said and check.returncode == 2


def _second(folder: Path) -> tuple[int | None, str]:
    """Start a server -> its exit code, None if it does not end; and what it says."""
    server = ServerProcess(folder, log=folder.with_name(folder.name + "-second.log"))
    try:
        with server.start(is_ready=False):
            return None, ""
    except AssertionError:
        assert server.process
        return server.process.returncode, server.log.read_text(encoding="utf-8")


if __name__ == "__main__":
    sys.exit(report(POINT, TITLE, attack))
