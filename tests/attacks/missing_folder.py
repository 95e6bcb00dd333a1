"""Somebody removes the folders of jobs under a server, and starts it again: each job can be deleted, and more can be
submitted, also where so much is kept that old jobs have to make room."""

import shutil
import sys
import tempfile
from pathlib import Path

from serving import SAMPLE, ServerProcess, wait_until

from tests.attacks.outcome import Outcome, report

POINT = "2"
TITLE = "a job whose folder is missing can be deleted, and hinders no submit"
NUM_JOBS = 4
KEPT_BESIDE_BYTES = 40_000  # of a job: its record, results and pictures


def attack() -> Outcome:
    files = {"file": ("v.mp4", SAMPLE.read_bytes())}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "data"
        server = ServerProcess(folder, retention_bytes=(NUM_JOBS + 2) * (SAMPLE.stat().st_size + KEPT_BESIDE_BYTES))
        with server.start(), server.client() as http:
            job_ids = [
                http.post("/api/upload", files=files, data={"max_frames": "1"}).json()["job_id"]
                for _ in range(NUM_JOBS)
            ]
            for job_id in job_ids:
                wait_until(lambda job_id=job_id: http.get(f"/api/status/{job_id}").json()["status"] == "completed")
            for job_id in job_ids:
                shutil.rmtree(folder / "jobs" / job_id)
            deleted = [http.delete(f"/api/jobs/{job_ids[0]}").status_code]
            submitted = [http.post("/api/upload", files=files).status_code for _ in range(NUM_JOBS)]
        with server.start(), server.client() as http:
            rest = [job["job_id"] for job in http.get("/api/jobs/list").json()["jobs"] if job["job_id"] in job_ids]
            deleted += [http.delete(f"/api/jobs/{job_id}").status_code for job_id in rest]
            submitted.append(http.post("/api/upload", files=files).status_code)
    is_held = set(deleted) == {204} and set(submitted) == {202}
    return Outcome(is_held, f"of jobs without a folder, deletes answered {deleted}; submits beside them {submitted}")


if __name__ == "__main__":
    sys.exit(report(POINT, TITLE, attack))
