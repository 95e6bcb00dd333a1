"""A copy of a data directory whose server works: nothing that was acknowledged before is missing, and it starts."""

import itertools
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from job_house import House, frame
from serving import ROOT, SAMPLE, ServerProcess, wait_until

from jobs import backup
from jobs.backup import MARK, NoBackup, back_up, main
from jobs.job_store import JobStore
from jobs.record import Upload


def test_a_server_on_the_copy_has_what_was_acknowledged_and_goes_on(tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    with ServerProcess(tmp_path / "data").start() as server, server.client() as http:
        files = {"file": ("v.mp4", SAMPLE.read_bytes())}
        done = http.post("/api/upload", files=files).json()["job_id"]
        wait_until(lambda: http.get(f"/api/status/{done}").json()["status"] == "completed")
        frames = http.get(f"/api/jobs/{done}/frames?limit=1000").json()
        going = http.post("/api/upload", files=files, data={"target_fps": 4, "reuse_similar": 0}).json()["job_id"]
        wait_until(lambda: len(http.get(f"/api/jobs/{going}/frames").json()["frames"]) > 3)
        seen = http.get(f"/api/jobs/{going}/frames?limit=1000").json()["frames"]
        assert main([str(tmp_path / "data"), str(copy)]) == 0
        server.kill()
    with ServerProcess(copy).start() as server, server.client() as http:
        assert http.get(f"/api/jobs/{done}/frames?limit=1000").json() == frames
        assert http.get(f"/api/jobs/{done}/video").content == SAMPLE.read_bytes()
        assert http.get(f"/api/jobs/{going}/frames?limit=1000").json()["frames"][: len(seen)] == seen
        for result in seen:
            assert http.get(f"/api/jobs/{going}/frames/{result['frame_idx']}.jpg").status_code == 200
        wait_until(lambda: http.get(f"/api/status/{going}").json()["status"] == "completed")
        assert http.get(f"/api/status/{going}").json()["frames_processed"] == 100


def finished(house: House, *, video: bytes = b"video") -> str:
    job_id = house.add(video=video)
    assert house.store.claim(0)
    with house.store.frames(job_id) as frames:
        frames.append([frame(0), frame(5)])
    house.store.end(job_id, "completed")
    return job_id


def test_what_changes_meanwhile_leaves_a_copy_that_opens(house: House, tmp_path: Path) -> None:
    """Jobs come, end and go, and the journal is compacted, while copies are made one after the other."""
    is_over = threading.Event()

    def work() -> None:
        while not is_over.is_set():
            job_ids = [finished(house) for _ in range(5)]
            for job_id in job_ids[:-1]:
                house.store.delete(job_id)

    first = finished(house)
    worker = threading.Thread(target=work)
    worker.start()
    try:
        for number in range(12):
            copy = tmp_path / f"copy-{number % 3}"
            back_up(house.folder, copy)
            with closing(JobStore(Path(shutil.copytree(copy, tmp_path / f"opened-{number}")))) as store:
                store.recover()
                listed = [record["job_id"] for record in store.page(None, None, None, 100).records]
                assert first in listed
                for job_id in listed:
                    if store.get(job_id)["status"] == "completed":
                        with store.frames(job_id) as frames:
                            assert len(frames) == 2
    finally:
        is_over.set()
        worker.join()


@pytest.mark.parametrize("damage", [b"", b"damage\n", bytes(100)])
def test_a_damaged_directory_does_not_replace_an_earlier_copy(
    house: House, tmp_path: Path, damage: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bug: the records of the copy were replaced by the damaged ones, and its jobs deleted if there were none."""
    copy = tmp_path / "copy"
    finished(house)
    back_up(house.folder, copy)
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    path = house.folder / "jobs.jsonl"
    path.write_bytes(path.read_bytes() + damage if damage else b"")

    assert main([str(house.folder), str(copy)]) == 2
    assert "python -m jobs.store repair" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before


def test_after_a_check_of_the_copy_the_next_backup_to_it_is_made(house: House, tmp_path: Path) -> None:
    """Bug: the check left a lock file, which the backup took for that of a server."""
    back_up(house.folder, tmp_path / "copy")
    command = [sys.executable, "-m", "jobs.store", "check", str(tmp_path / "copy")]
    assert subprocess.run(command, cwd=ROOT).returncode == 0

    assert back_up(house.folder, tmp_path / "copy").num_jobs == 0


During = Callable[[Callable[[Path], None]], None]


@pytest.fixture
def during(monkeypatch: pytest.MonkeyPatch) -> During:
    """Takes what happens while a copy is made: it is called after each file that is copied, with its path."""
    copy_one = backup._copy

    def set_up(happen: Callable[[Path], None]) -> None:
        def copied(path: Path, target: Path, report: backup.Report) -> None:
            copy_one(path, target, report)
            happen(path)

        monkeypatch.setattr(backup, "_copy", copied)

    return set_up


def test_a_result_in_the_copy_has_its_picture(house: House, tmp_path: Path, during: During) -> None:
    job_id = house.added("processing")
    numbers = itertools.count()

    def describe(_: Path) -> None:
        number = next(numbers)
        house.store.files.put_picture(job_id, number, b"jpeg")
        with house.store.frames(job_id) as frames:
            frames.append([frame(number)])

    describe(tmp_path)
    during(describe)
    back_up(house.folder, tmp_path / "copy")

    with closing(JobStore(tmp_path / "copy")) as store, store.frames(job_id) as frames:
        assert len(frames) > 1
        assert all(store.files.picture(job_id, result["frame_idx"]).exists() for result in frames.results())


def of_the_same_video(house: House, job_id: str) -> str:
    upload = Upload(house.store.files.link_video(job_id), "mp4")
    return house.store.add(house.store.get(job_id)["request"], "ann", upload)


def test_two_jobs_of_one_video_share_it_in_the_copy(house: House, tmp_path: Path) -> None:
    first = finished(house)
    second = of_the_same_video(house, first)
    back_up(house.folder, tmp_path / "copy")

    jobs = tmp_path / "copy" / "jobs"
    assert (jobs / first / "video").samefile(jobs / second / "video")


def test_a_job_keeps_its_video_though_the_other_of_the_same_is_deleted(
    house: House, tmp_path: Path, during: During
) -> None:
    first = finished(house)
    second = of_the_same_video(house, first)

    def delete(path: Path) -> None:
        if path.parent.name == first and path.name == "video":
            house.store.delete(first)

    during(delete)
    report = back_up(house.folder, tmp_path / "copy")

    assert report.num_jobs == 1 and os.listdir(tmp_path / "copy" / "jobs") == [second]
    assert (tmp_path / "copy" / "jobs" / second / "video").read_bytes() == b"video"


def test_a_second_copy_brings_what_is_new_and_drops_what_was_deleted(house: House, tmp_path: Path) -> None:
    kept, deleted = finished(house, video=b"v" * 50_000), finished(house)
    copy = tmp_path / "copy"
    assert back_up(house.folder, copy).num_copied_bytes > 50_000
    house.store.delete(deleted)
    new = finished(house)

    report = back_up(house.folder, copy)

    assert report.num_jobs == 2 and report.num_copied_bytes < 50_000 < report.num_bytes
    assert sorted(os.listdir(copy / "jobs")) == sorted([kept, new])
    assert (copy / MARK).exists()


def test_what_is_no_place_for_a_copy_is_refused(
    house: House, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "letter.txt").write_text("Dear all,")
    used = tmp_path / "used"
    back_up(house.folder, used)
    (used / "lock").touch()

    for folder, copy, words in (
        (other, tmp_path / "copy", "no data directory"),
        (house.folder, house.folder / "copy", "lies in the data directory"),
        (house.folder, other, "holds other things"),
        (house.folder, used, "A server has worked in"),
    ):
        with pytest.raises(NoBackup, match=words):
            back_up(folder, copy)
        assert main([str(folder), str(copy)]) == 2
        assert words in capsys.readouterr().err
