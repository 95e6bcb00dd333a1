"""A server is started with the usual umask of 022: other users of the machine can read none of its files."""

import subprocess
import sys
import tempfile
from pathlib import Path

from serving import SAMPLE, ServerProcess, wait_until

from tests.attacks import ROOT
from tests.attacks.outcome import Outcome, report

POINT = "5"
TITLE = "files of a server, and of a backup, are for their owner alone"


class Careless(ServerProcess):
    program = ("-c", "import os, runpy; os.umask(0o022); runpy.run_path('app.py', run_name='__main__')")


def attack() -> Outcome:
    with tempfile.TemporaryDirectory() as place:
        folder, copy = Path(place) / "data", Path(place) / "copy"
        with Careless(folder, answer_cache_bytes=1_000_000).start() as server, server.client() as http:
            files = {"file": ("v.mp4", SAMPLE.read_bytes())}
            job_id = http.post("/api/upload", files=files, data={"max_frames": "3"}).json()["job_id"]
            wait_until(lambda: http.get(f"/api/status/{job_id}").json()["status"] == "completed")
            command = f"umask 022 && exec {sys.executable} -m jobs.backup {folder} {copy}"
            subprocess.run(["sh", "-c", command], cwd=ROOT, check=True, capture_output=True)
            made = [folder, copy, *folder.rglob("*"), *copy.rglob("*")]
            readable = [path for path in made if path.stat().st_mode & 0o077]
    names = sorted({path.name for path in readable})
    return Outcome(not readable, f"{len(readable)} of {len(made)} files and folders open to others: {names}")


if __name__ == "__main__":
    sys.exit(report(POINT, TITLE, attack))
