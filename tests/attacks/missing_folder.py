"""Somebody removes the folder of a job under a server: the job can be deleted, and others can submit."""

import shutil
import sys
import tempfile
from pathlib import Path

from serving import SAMPLE, ServerProcess, wait_until

from tests.attacks.outcome import Outcome, report

POINT = "2"
TITLE = "A missing folder of a job does not make every delete a 507"


def attack() -> Outcome:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "data"
        with ServerProcess(folder).start() as server, server.client() as client:
            files = {"file": ("v.mp4", SAMPLE.read_bytes())}
            job_id = client.post("/api/upload", files=files).json()["job_id"]
            wait_until(lambda: client.get(f"/api/status/{job_id}").json()["status"] == "completed")
            shutil.rmtree(folder / "jobs" / job_id)
            deleted = client.delete(f"/api/jobs/{job_id}").status_code
            submitted = client.post("/api/upload", files=files).status_code
    return Outcome((deleted, submitted) == (204, 202), f"delete {deleted}, then an upload {submitted}")


if __name__ == "__main__":
    sys.exit(report(POINT, TITLE, attack))
