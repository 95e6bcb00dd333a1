"""Faults of the disk, the clock, the process and the model's files. Run: python -m tests.faults"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path

from faults import FAULTS, LONG, NeedsRoot, Outcome, Scene, answered, fault
from serving import ROOT, SAMPLE, wait_until

__all__ = ["FAULTS"]
DISK_MB = 24
NO_LIMITS = {"min_free_bytes": 0, "rate_limit_per_minute": 1000}
NUM_DELETED = 80  # the lines that remove them are longer than a block of the disk
DAY_S = 86400
STOPPED_S = 60.0


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A disk of DISK_MB. Raises NeedsRoot."""
    disk = folder / "disk"
    disk.mkdir()
    mount(["-t", "tmpfs", "-o", f"size={DISK_MB}m", "none", str(disk)])
    try:
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def mount(arguments: list[str]) -> None:
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise NeedsRoot(done.stderr.strip())


@fault
def disk_full(folder: Path) -> Outcome:
    """Filled to the last byte while a job runs; then room is made."""
    with small_disk(folder) as disk:
        scene = Scene(folder, {"min_free_bytes": 0}, disk / "data")
        with scene.going() as http:
            job_id = scene.running(http)
            scene.may_end[job_id] = {"failed"}
            ballast = disk / "ballast"
            with ballast.open("wb", buffering=0) as file:
                fill(file)
                file.truncate(file.tell() - (1 << 20))
                file.seek(0, os.SEEK_END)
                half = http.post("/api/upload", files={"file": ("v.mp4", SAMPLE.read_bytes() + bytes(4 << 20))})
                assert half.status_code == 507, half.text
                assert not any((disk / "data" / "incoming").iterdir()), "half an upload was left"
                fill(file)
            upload = http.post("/api/upload", files={"file": ("v.mp4", SAMPLE.read_bytes())})
            assert upload.status_code == 507, upload.text
            wait_until(lambda: http.get("/api/ready").status_code == 503)
            ready = http.get("/api/ready")
            scene.read(http, next(iter(scene.may_end)))  # what is stored can be read
            ballast.unlink()
            failed = scene.ended(http, job_id)
            assert failed["error_code"] == "storage_full", failed
            wait_until(lambda: http.get("/api/ready").status_code == 200)
            assert http.post(f"/api/jobs/{job_id}/retry").status_code == 200
            scene.may_end[job_id] = {"completed"}
            scene.audit(http)
    return Outcome(
        f"A submit is answered {answered(upload)} /api/ready says {answered(ready)} The running job fails "
        f"({failed['error_code']}) and keeps its {failed['frames_processed']} frames.",
        "Make room, or delete jobs; the server goes on by itself. Retry the job: it goes on after what it has.",
    )


@fault
def deleting_on_a_full_disk(folder: Path) -> Outcome:
    """Others take what each deleted job leaves, until there is no byte for the line that removes a record, either."""
    with small_disk(folder) as disk:
        scene = Scene(folder, {**NO_LIMITS, "model": str(folder / "none")}, disk / "data")
        with scene.server.start(is_ready=False), scene.client() as http:  # jobs wait, and can be deleted
            kept, *unwanted = [scene.submit(http, max_frames=1) for _ in range(NUM_DELETED + 1)]
            with (disk / "ballast").open("wb", buffering=0) as file:
                answers = []
                for job_id in unwanted:
                    fill(file)
                    answers.append(http.delete(f"/api/jobs/{job_id}"))
                    assert answers[-1].is_success, f"after {len(answers)}: {answers[-1].text}"
                    del scene.may_end[job_id]
            (disk / "ballast").unlink()
            listed = [job["job_id"] for job in http.get("/api/jobs/list").json()["jobs"]]
            assert listed == [kept], listed
            assert scene.server.stop() == 0
        scene.server.settings["model"] = "demo"
        with scene.server.start(), scene.client() as http:
            scene.audit(http)
    return Outcome(
        f"Nothing: {len(answers)} jobs are deleted one after the other (each {answers[-1].status_code}), none of them "
        "comes back at the next start.",
        "Nothing to do: the server keeps some room for that, which it gives up last.",
    )


def fill(file: FileIO) -> None:
    """Take the last byte of the disk."""
    for num_bytes in (65536, 512, 1):
        with suppress(OSError):
            while True:
                file.write(bytes(num_bytes))


@fault
def read_only(folder: Path) -> Outcome:
    """A file system makes itself read-only while a job runs, as ext4 does after an error of the disk."""
    image, disk = folder / "image", folder / "disk"
    disk.mkdir()
    with image.open("wb") as file:
        file.truncate(DISK_MB << 20)
    subprocess.run(["/sbin/mkfs.ext4", "-q", str(image)], check=True)
    mount(["-o", "loop", str(image), str(disk)])
    try:
        scene = Scene(folder, {"min_free_bytes": 0}, disk / "data")
        with scene.going() as http:
            done, job_id = next(iter(scene.may_end)), scene.running(http)
            mount(["-o", "remount,abort", str(disk)])
            upload = http.post("/api/upload", files={"file": ("v.mp4", SAMPLE.read_bytes())})
            assert upload.status_code == 507, upload.text
            wait_until(lambda: http.get("/api/ready").status_code == 503)
            ready = http.get("/api/ready")
            scene.read(http, done)
            assert http.get(f"/api/jobs/{done}/export?format=srt").status_code == 200
            code = scene.server.stop()
        subprocess.run(["umount", str(disk)], check=True)
        subprocess.run(["/sbin/fsck.ext4", "-fy", str(image)], capture_output=True, check=False)
        mount(["-o", "loop", str(image), str(disk)])
        with scene.server.start(), scene.client() as http:
            scene.audit(http)  # the running job goes on
            assert scene.ended(http, job_id)["status"] == "completed"
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=False)
    assert code == 0, f"it ended with {code}"
    return Outcome(
        f"A submit is answered {answered(upload)} /api/ready says {answered(ready)} What is stored can be read.",
        "Stop the server (it ends with 0), mend and mount the disk, start it: jobs go on after what they have.",
    )


@fault
def store_damaged(folder: Path) -> Outcome:
    """A byte in the middle of the job records, and one in the middle of a job's results, flipped by the disk."""
    scene = Scene(folder)
    with scene.going() as http:
        done, other = next(iter(scene.may_end)), scene.submit(http, max_frames=3)
        scene.ended(http, other)
        assert scene.server.stop() == 0
    records = scene.server.settings["data_dir"] / "jobs.jsonl"
    untouched = records.read_bytes()
    results = records.parent / "jobs" / done / "frames.jsonl"
    number = flip(records, "submitted")
    flip(results, "description")
    refused = subprocess.run(
        [sys.executable, "app.py", "--model", "demo", "--port", "0", "--data-dir", str(records.parent)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert refused.returncode == 2 and f"damaged in line {number}" in refused.stderr, refused.stderr
    assert store("check", records.parent).returncode == 1
    mended = store("repair", records.parent)
    assert mended.returncode == 0 and f"damaged in line {number}" in mended.stdout, mended.stdout
    assert len(untouched) > records.stat().st_size
    del scene.frames[done]
    with scene.server.start(), scene.client() as http:
        listed = {job["job_id"] for job in http.get("/api/jobs/list").json()["jobs"]}
        assert {done, other} <= listed, "a job whose other lines are whole was lost"
        num_left = len(http.get(f"/api/jobs/{done}/frames?limit=1000").json()["frames"])
        scene.read(http, other)
    return Outcome(
        f"The next start ends with 2: {refused.stderr.strip().splitlines()[-1].replace(str(records.parent), 'DIR')}",
        f"`python -m jobs.store repair DIR` moves the line aside; all else is there (of 25 results, {num_left}).",
    )


@fault
def results_damaged(folder: Path) -> Outcome:
    """A byte in the middle of a job's results, flipped while a server runs that has not read them yet."""
    scene = Scene(folder)
    with scene.going() as http:
        done = next(iter(scene.may_end))
        assert scene.server.stop() == 0
    data = folder / "data"
    with scene.server.start(), scene.client() as http:
        running = scene.running(http)
        number = flip(data / "jobs" / done / "frames.jsonl", "description")
        refused = http.get(f"/api/jobs/{done}/frames")
        assert refused.json()["code"] == "results_damaged", refused.text
        scene.server.wait_for_log(f"frames.jsonl is damaged in line {number}")
        assert http.get("/api/ready").status_code == 200
        assert scene.ended(http, running)["status"] == "completed"
        assert scene.server.stop() == 0
    mended = store("repair", data)
    assert mended.returncode == 0 and f"damaged in line {number}" in mended.stdout, mended.stdout
    before = scene.frames.pop(done)
    with scene.server.start(), scene.client() as http:
        num_left = scene.read(http, done)
        assert 0 < num_left < len(before) and scene.frames[done].items() < before.items(), "what is left has changed"
        scene.read(http, running)
    return Outcome(
        f"Reading that job is answered {answered(refused)} All others go on.",
        f"Stop it, `python -m jobs.store repair DIR`, start it: of {len(before)} results, {num_left} are left.",
    )


def flip(path: Path, word: str) -> int:
    """Change a letter of a word in a line in the middle. -> the line's number"""
    lines = path.read_bytes().splitlines(keepends=True)
    number = next(i for i in range(len(lines) // 2, 0, -1) if word.encode() in lines[i])
    lines[number] = lines[number].replace(word.encode(), b"X" + word.encode()[1:], 1)
    path.write_bytes(b"".join(lines))
    return number + 1


def store(action: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "jobs.store", action, str(folder)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


@fault
def clock_jumps(folder: Path) -> Outcome:
    """A year forward, and a day back, while a job runs."""
    scene = Scene(folder, {"retention_days": 30})
    with scene.going() as http:
        job_id = scene.running(http)
        scene.switch("clock", str(365 * DAY_S))
        late = scene.submit(http, max_frames=2)
        shown = scene.ended(http, late)
        assert shown["completed_at"] - shown["submitted_at"] >= 0
        scene.server.wait_for_log("deletes nothing by age", 90)
        scene.switch("clock", str(-DAY_S))
        early = scene.submit(http, max_frames=2)
        scene.ended(http, early)
        order = [job["job_id"] for job in http.get("/api/jobs/list").json()["jobs"]]
        assert order[0] == early, "the newest is not listed first"
        scene.switch("clock", None)
        scene.ended(http, job_id)
        scene.audit(http)
    return Outcome(
        "Nothing, but times of that stretch: no job is deleted for its age, durations are never negative, the newest "
        "job is listed first. The log says that the clock was set.",
        "Nothing to do; deleting by age goes on after a restart, or when the clock is right again.",
    )


@fault
def model_files_vanish(folder: Path) -> Outcome:
    """While the server runs, and at its next start."""
    model = folder / "model"
    shutil.copytree(ROOT / "pipeline" / "demo" / "checkpoint", model)
    scene = Scene(folder, {"model": str(model), "dtype": "float32"})
    with scene.going() as http:
        job_id = scene.running(http)
        model.rename(folder / "gone")
        waiting = scene.submit(http, **LONG)
        scene.ended(http, job_id)
        assert scene.server.stop() == 0
    with scene.server.start(is_ready=False), scene.client() as http:
        wait_until(lambda: "being loaded" not in http.get("/api/ready").json()["detail"])
        ready = http.get("/api/ready")
        assert ready.status_code == 503, ready.text
        accepted = scene.submit(http, max_frames=1)
        (folder / "gone").rename(model)
        scene.ended(http, accepted, 150)
        scene.ended(http, waiting)
        scene.audit(http)
    seen = answered(ready).replace(str(folder), "")
    return Outcome(
        f"A running server goes on. After a restart, /api/ready says {seen} Jobs are accepted and wait.",
        "Put the files back: the server looks again every minute.",
    )


@fault
def stopped_for_a_minute(folder: Path) -> Outcome:
    """SIGSTOP for 60 s, far longer than a batch may take and the server may be stuck."""
    return stopped(folder, STOPPED_S)


def stopped(folder: Path, seconds: float) -> Outcome:
    deadline_s = seconds / 12
    scene = Scene(folder, {"batch_deadline_s": deadline_s, "exit_when_stuck_s": deadline_s})
    with scene.going() as http:
        job_id = scene.running(http)
        process = scene.server.process
        assert process
        process.send_signal(signal.SIGSTOP)
        os.waitpid(process.pid, os.WUNTRACED)
        time.sleep(seconds)
        process.send_signal(signal.SIGCONT)
        started_s = time.monotonic()
        assert scene.ended(http, job_id)["status"] == "completed"
        back_s = time.monotonic() - started_s
        assert process.poll() is None, "the server took the pause for a hanging device, and ended"
        scene.audit(http)
    return Outcome(
        f"Answers come when it goes on; the running job was done {back_s:.0f} s later. That a batch took longer than "
        f"BATCH_DEADLINE_S and EXIT_WHEN_STUCK_S ({deadline_s:g} s each here) is not taken for a hanging device.",
        "Nothing to do.",
    )


@fault
def two_servers(folder: Path) -> Outcome:
    """A second server on the data directory, while a job runs; and one after kill -9, when the lock file is there."""
    scene = Scene(folder)
    with scene.going() as http:
        job_id = scene.running(http)
        second = subprocess.run(
            [sys.executable, "app.py", "--model", "demo", "--port", "0", "--data-dir", str(folder / "data")],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert second.returncode == 2 and "Another process uses the data directory" in second.stderr, second.stderr
        assert http.get("/api/ready").status_code == 200
        scene.read(http, job_id)
        scene.server.kill()
    with scene.server.start(), scene.client() as http:
        scene.audit(http)
    return Outcome(
        f"The second ends with 2: {second.stderr.strip().splitlines()[-1].replace(str(folder / 'data'), 'DIR')}",
        "Nothing to do for the first. After kill -9, the system has let go of the lock: a start works at once.",
    )
