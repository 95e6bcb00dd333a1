"""Folders of jobs that a killed server, a repair or an operator left: none with files in it is deleted at a start."""

import shutil
from pathlib import Path

import pytest
from job_house import House, incoming, records

from jobs.job_files import JobFiles
from jobs.record import FINISHED
from pipeline.errors import JobNotFound, ResultsDamaged


@pytest.fixture
def files(tmp_path: Path) -> JobFiles:
    return JobFiles(tmp_path / "data")


class Killed(BaseException):
    pass


def die() -> None:
    raise Killed


def test_a_start_finishes_what_a_killed_server_began_and_deletes_no_files(
    files: JobFiles, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Bug: an acknowledged upload whose record was lost was taken for one that was never acknowledged, and deleted."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "film").write_bytes(b"mine")
    for name in ("job_1", "job_2", "job_3", "job_4", "job_5"):
        files.make(name, incoming(files, b"video"))
    for name in ("job_6", "job_7"):
        with pytest.raises(Killed):
            files.make(name, incoming(files, b"video"), die)
    files.make("job_8", None)
    (files.of("job_8") / "video.part").write_bytes(b"half a download")
    (files.folder / "orphans" / "job_3").mkdir(parents=True)  # of an earlier repair
    (files.folder / "jobs" / "link").symlink_to(outside)
    (files.folder / "jobs" / "note.txt").write_bytes(b"a file is no job's folder")
    files.frames("job_3").write_bytes(b"results")
    for name in ("job_4", "job_5"):
        files.hide(name)

    assert files.tidy(known={"job_1", "job_5", "job_7", "job_9"}) == {"job_9"}

    folders = {path.name for path in (files.folder / "jobs").iterdir() if path.is_dir() and not path.is_symlink()}
    # Lost their records: 2, 3, 8; removed: 4; not removed yet: 5; never acknowledged: 6; killed after that: 7; lost: 9.
    assert folders == {"job_1", "job_5", "job_7"}
    assert files.video("job_7").read_bytes() == b"video"
    orphans = files.folder / "orphans"
    assert sorted(path.name for path in orphans.iterdir()) == ["job_2", "job_3", "job_3-2"]
    assert (orphans / "job_2" / "video").read_bytes() == b"video"
    assert (orphans / "job_3-2" / "frames.jsonl").read_bytes() == b"results"
    assert "3 folders in" in caplog.text and "The folder of job_9 is missing" in caplog.text
    assert (outside / "film").read_bytes() == b"mine"  # nothing is followed
    assert (files.folder / "jobs" / "note.txt").exists()


def test_a_folder_that_somebody_has_removed_counts_as_removed(files: JobFiles) -> None:
    """Bug: hide() raised, so that every delete, and every submit while too much was kept, was answered 507."""
    files.make("job_1", incoming(files, b"video"))
    shutil.rmtree(files.of("job_1"))
    files.hide("job_1")
    files.show("job_1")
    files.remove("job_1")

    assert (files.total_bytes, list((files.folder / "jobs").iterdir())) == (0, [])


# As the job store meets them


@pytest.mark.parametrize("status", ["submitted", *FINISHED])
def test_a_job_whose_folder_is_missing_can_be_read_and_deleted(house: House, status: str) -> None:
    """Bug: a delete was answered 507, with the advice to delete jobs."""
    job_id = house.added(status, video=b"video")  # type: ignore[arg-type]
    shutil.rmtree(house.store.files.of(job_id))
    store = house.reopen()

    assert store.get(job_id)["status"] == status
    missing = pytest.raises(ResultsDamaged, match=r"folder of this job is missing .* Delete the job")
    with missing, store.frames(job_id):
        pass
    store.delete(job_id)
    for store in house.now_and_later():
        assert records(store) == []
        with pytest.raises(JobNotFound):
            store.get(job_id)


def test_where_too_much_is_kept_a_job_without_a_folder_makes_room_too(house: House) -> None:
    """Bug: the purge, and with it every submit, was answered 507 for ever."""
    lost, kept = house.added("completed", video=b"x" * 50_000), house.added("completed", video=b"x" * 10)
    store = house.reopen(retention_bytes=round(house.store.kept_bytes / 0.97))
    store.recover()
    shutil.rmtree(store.files.of(lost))
    new = house.add()

    for store in house.now_and_later():
        store.recover()
        assert {record["job_id"] for record in records(store)} == {kept, new}


def test_bytes_of_a_missing_folder_do_not_count_after_a_restart(house: House) -> None:
    job_id = house.added("completed", video=b"x" * 50_000)
    shutil.rmtree(house.store.files.of(job_id))
    store = house.reopen()
    store.recover()

    assert store.files.total_bytes == 0


def test_a_job_whose_folder_disappears_while_it_runs_comes_to_an_end(house: House) -> None:
    """Bug: the worker could not store the end, and the job stayed `processing` until the next start."""
    job_id = house.added("processing", video=b"video")
    shutil.rmtree(house.store.files.of(job_id))
    house.store.end(job_id, "failed", error_code="storage_full", error_message="gone")

    for store in house.now_and_later():
        assert store.get(job_id)["status"] == "failed"


def test_a_record_that_cannot_be_stored_leaves_no_folder(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the folder cannot get its name after the record is stored."""
    for failing in ("jobs.journal.os.write", "jobs.job_files.JobFiles.count"):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(failing, lambda *_: die())
            house.add(video=b"video")
        assert list((house.folder / "jobs").iterdir()) == []
    for store in house.now_and_later():
        assert records(store) == []
