"""A data directory of an older server becomes one of this; one of a newer server is left alone."""

import shutil
from contextlib import closing
from pathlib import Path

import pytest

from jobs import data_version
from jobs.data_version import VERSION, DataTooNew, upgrade
from jobs.job_store import JobStore
from jobs.journal import JournalDamaged
from jobs.mend import RecordsLost
from jobs.record import Record, new_record
from jobs.store import JournalDB

OLD = Path(__file__).parent / "data" / "store-v0"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(OLD, tmp_path / "data"))


def records(folder: Path) -> dict[str, Record]:
    with closing(JournalDB(folder / "jobs.jsonl")) as db:
        return dict(db.named("jobs").stored())  # type: ignore[arg-type]


def test_an_old_directory_opens_whole(folder: Path) -> None:
    old = records(folder)
    with closing(JobStore(folder)) as store:
        store.recover()
        for job_id in old:
            record = store.get(job_id)
            assert record.keys() == new_record("", 0, "", {}, 0).keys()
            assert (record["status"], record["request"]["source_job_id"], record["starts_over"]) == (
                "completed",
                None,
                False,
            )
            with store.frames(job_id) as frames:
                assert [bool(result["description"]) for result in frames.results()] == [True] * record["num_frames"]

    assert (folder / "version").read_text() == f"{VERSION}\n"
    assert (folder / "before-1" / "jobs.jsonl").read_bytes() == (OLD / "jobs.jsonl").read_bytes()


def test_a_server_that_is_killed_over_it_does_it_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException):
        pass

    def die(*_: object) -> None:
        raise Killed

    for name in ("_complete_records", "write_private"):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            if name == "write_private":
                patch.setattr(data_version, name, die)
            else:
                patch.setattr(data_version, "STEPS", (die,))
            upgrade(folder)
        assert not (folder / "version").exists()
    upgrade(folder)

    assert all("starts_over" in record for record in records(folder).values())
    assert (folder / "before-1" / "jobs.jsonl").read_bytes() == (OLD / "jobs.jsonl").read_bytes()


def test_damage_of_an_old_directory_is_named_before_anything_is_changed(folder: Path) -> None:
    path = folder / "jobs.jsonl"
    path.write_bytes(path.read_bytes()[:-2] + b"X\n")

    with pytest.raises(JournalDamaged, match=r"python -m jobs\.store repair"):
        JobStore(folder)
    assert not (folder / "version").exists() and not (folder / "before-1").exists()


def test_an_old_directory_without_records_is_no_new_one(folder: Path) -> None:
    """Bug: it was made one of this version, and all its videos were deleted."""
    (folder / "jobs.jsonl").unlink()

    with pytest.raises(RecordsLost, match=r"jobs\.jsonl is missing"):
        JobStore(folder)
    assert not (folder / "version").exists()


def test_a_new_directory_is_of_this_version(tmp_path: Path) -> None:
    upgrade(tmp_path)

    assert (tmp_path / "version").read_text() == f"{VERSION}\n"
    assert not (tmp_path / "before-1").exists()


def test_a_directory_of_a_newer_server_is_left_alone(folder: Path) -> None:
    (folder / "version").write_text(f"{VERSION + 1}\n")

    with pytest.raises(DataTooNew, match="Start the newer server"):
        JobStore(folder)
    assert (folder / "jobs.jsonl").read_bytes() == (OLD / "jobs.jsonl").read_bytes()


def test_a_version_that_is_no_number_is_an_error_that_says_what_to_do(folder: Path) -> None:
    (folder / "version").write_bytes(b"\xff one\n")

    with pytest.raises(DataTooNew, match=rf"not the number of a version\. .* write {VERSION} into that file"):
        JobStore(folder)
    assert (folder / "jobs.jsonl").read_bytes() == (OLD / "jobs.jsonl").read_bytes()
