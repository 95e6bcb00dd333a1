"""check and repair of a data directory; and what a server says of a damaged one, when it starts."""

import os
import resource
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from job_house import House, frame, records

from jobs.job_store import JobStore
from jobs.journal import DataUnusable, JournalDamaged
from jobs.mend import RecordsLost
from jobs.store import Document, JournalDB, owning

ROOT = Path(__file__).parent.parent


def run(action: str, folder: Path) -> tuple[int, str]:
    """-> exit code, and what was printed"""
    command = [sys.executable, "-m", "jobs.store", action, str(folder)]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return process.returncode, process.stdout + process.stderr


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data directory with two jobs, each with a video; the first has results."""
    house = House(tmp_path / "data")
    house.added("completed", video=b"video")
    house.add(video=b"another")
    house.store.close()
    return house.folder


def job_ids(folder: Path) -> list[str]:
    store = JobStore(folder)
    store.recover()
    try:
        return [record["job_id"] for record in reversed(records(store))]
    finally:
        store.close()


def test_check_names_a_damaged_line_and_repair_moves_it_aside(tmp_path: Path) -> None:
    folder = tmp_path / "jobs" / "job_1"
    folder.mkdir(parents=True)
    for path in (tmp_path / "jobs.jsonl", folder / "frames.jsonl"):
        db = JournalDB(path)
        for number in ("1", "2", "3"):
            db.named("jobs").insert(Document({"n": int(number)}, f"job_{number}"))
        db.close()
    damaged = folder / "frames.jsonl"
    damaged.write_bytes(damaged.read_bytes().replace(b'"n":2', b'"n":7'))

    assert run("check", tmp_path) == (1, f"{damaged}: damaged in line 2\n2 databases, 1 of them damaged.\n")
    code, said = run("repair", tmp_path)
    assert code == 0 and f"{damaged}: damaged in line 2: moved into a file beside it" in said
    assert run("check", tmp_path) == (0, "2 databases, 0 of them damaged.\n")
    db = JournalDB(damaged)
    assert [document.doc_id for document in db.named("jobs").all()] == ["job_1", "job_3"]
    db.close()
    assert run("check", folder / "x") == (2, f"There are no databases in {folder / 'x'}.\n")


def test_repair_keeps_the_video_of_a_job_whose_record_it_moves_aside(folder: Path) -> None:
    """Bug: the next start deleted the folder, as if the upload had never been acknowledged."""
    path = folder / "jobs.jsonl"
    first, second = job_ids(folder)
    path.write_bytes(path.read_bytes()[:-2] + b"X\n")
    before = path.read_bytes()

    with pytest.raises(JournalDamaged, match=r"python -m jobs\.store repair"):
        JobStore(folder)
    code, said = run("check", folder)
    assert code == 1 and "damaged in line" in said and f"no record of {second}" in said
    assert path.read_bytes() == before
    code, said = run("repair", folder)
    assert (code, (folder / "orphans" / second / "video").read_bytes()) == (0, b"another")
    assert f"{second}: moved to {folder / 'orphans' / second}" in said
    assert run("check", folder)[0] == 0
    assert job_ids(folder) == [first]


def lose(path: Path) -> None:
    path.unlink()


def empty(path: Path) -> None:
    path.write_bytes(b"")


def tear(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:30])


@pytest.mark.parametrize("damage", [lose, empty, tear])
def test_no_records_beside_folders_of_jobs_is_damage(folder: Path, damage: Callable[[Path], None]) -> None:
    """Bug: the server started with no jobs, and deleted all videos."""
    ids = job_ids(folder)
    damage(folder / "jobs.jsonl")
    before = sorted(folder.rglob("*"))

    with pytest.raises(RecordsLost, match=r"the folders of 2 jobs\. Nothing was changed\. .* repair"):
        JobStore(folder)
    assert sorted(folder.rglob("*")) == before
    code, said = run("check", folder)
    assert code == 1 and all(job_id in said for job_id in ids) and "1 of them damaged" in said
    assert run("repair", folder)[0] == 0
    assert job_ids(folder) == []
    assert {(folder / "orphans" / job_id / "video").read_bytes() for job_id in ids} == {b"video", b"another"}
    assert run("check", folder)[0] == 0


def test_a_job_that_was_never_acknowledged_does_not_keep_a_server_from_starting(folder: Path) -> None:
    """A server that is killed over its first submit leaves an empty jobs.jsonl and a folder on its way in."""
    for name in job_ids(folder):
        (folder / "jobs" / name).rename(folder / "jobs" / f"{name}.new")
    empty(folder / "jobs.jsonl")

    assert job_ids(folder) == []
    assert list((folder / "jobs").iterdir()) == [] and not (folder / "orphans").exists()


def test_zeros_over_all_records_are_damage_and_repair_keeps_the_videos(folder: Path) -> None:
    path = folder / "jobs.jsonl"
    path.write_bytes(bytes(path.stat().st_size))

    with pytest.raises(JournalDamaged, match="line 1, at byte 0"):
        JobStore(folder)
    assert run("check", folder)[0] == 1
    assert run("repair", folder)[0] == 0
    assert job_ids(folder) == []
    assert len(list(folder.glob("orphans/*/video"))) == 2


def test_zeros_over_the_results_of_a_job_are_damage(tmp_path: Path) -> None:
    house = House(tmp_path / "data")
    job_id = house.add(video=b"video")
    house.run("completed", frame(0), frame(1))
    house.store.close()
    path = house.folder / "jobs" / job_id / "frames.jsonl"
    path.write_bytes(path.read_bytes()[:-30] + bytes(30))

    code, said = run("check", house.folder)
    assert (code, f"{path}: damaged in line 1" in said) == (1, True)


def test_a_job_alone_is_not_mended_under_a_server(folder: Path) -> None:
    """Bug: the log tells to repair the folder of a job, which nobody owned."""
    job_folder = next((folder / "jobs").iterdir())
    JournalDB(job_folder / "frames.jsonl").close()
    assert run("check", job_folder) == (0, "1 databases, 0 of them damaged.\n")

    with owning(folder):
        code, said = run("repair", job_folder)
    assert (code, "Another process uses the data directory" in said) == (2, True)


@pytest.mark.parametrize("name", ["lock", "jobs.jsonl", "version"])
def test_a_folder_in_the_place_of_a_file_is_named(folder: Path, name: str) -> None:
    """Bug: "This host cannot store: Is a directory. Make room, for example by deleting old jobs", or a traceback."""
    (folder / name).rename(folder / "aside")
    (folder / name).mkdir()

    with pytest.raises(DataUnusable, match=rf"{name}( cannot be used: Is a directory\. Move it away|.*\. Restore)"):
        JobStore(folder)


def test_repair_on_a_full_disk_says_so_and_changes_nothing(folder: Path) -> None:
    path = folder / "jobs.jsonl"
    path.write_bytes(path.read_bytes() * 100 + b"damage\n")
    before = path.read_bytes()

    def fill() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    command = [sys.executable, "-m", "jobs.store", "repair", str(folder)]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, preexec_fn=fill)
    assert (process.returncode, "error: The disk of this host is full" in process.stderr) == (2, True)
    assert "Traceback" not in process.stderr
    assert path.read_bytes() == before


def test_what_repair_makes_is_for_the_owner_alone(folder: Path) -> None:
    shutil.rmtree(folder / "jobs" / job_ids(folder)[0] / "frames")
    empty(folder / "jobs.jsonl")
    before = os.umask(0o022)
    try:
        assert run("repair", folder)[0] == 0
    finally:
        os.umask(before)

    assert stat.S_IMODE((folder / "orphans").stat().st_mode) == 0o700
