"""The files of jobs: where they are, how many bytes they take, and what the job store does where there is no room."""

import errno
import os
import resource
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from job_house import HOOK, House, assert_consistent, frame, incoming, records

from jobs import store as databases
from jobs.job_files import RESERVE_BYTES, JobFiles, storing
from jobs.record import CROWDED_SHARE, FINISHED
from jobs.schema import JobStatusName
from pipeline.errors import JobNotFound, StorageFull


@pytest.fixture
def files(tmp_path: Path) -> JobFiles:
    return JobFiles(tmp_path / "data")


def test_everything_of_a_job_is_in_its_folder(files: JobFiles, tmp_path: Path) -> None:
    folder = tmp_path / "data" / "jobs" / "job_1"

    assert files.of("job_1") == folder
    assert (files.video("job_1"), files.frames("job_1")) == (folder / "video", folder / "frames.jsonl")
    assert files.picture("job_1", 7) == folder / "frames" / "7.jpg"
    assert not folder.exists()


def test_a_new_job_has_a_folder_and_may_have_a_video(files: JobFiles) -> None:
    files.make("job_1", None)
    files.make("job_2", incoming(files, b"video"))

    assert (files.video("job_1").exists(), files.video("job_2").read_bytes()) == (False, b"video")
    assert files.total_bytes == 5
    assert list(files.incoming.iterdir()) == []
    with pytest.raises(FileExistsError):
        files.make("job_1", None)


def test_a_start_removes_uploads_that_never_arrived_and_nothing_else(files: JobFiles) -> None:
    files.make("job_1", incoming(files, b"video"))
    incoming(files, b"vid")
    later = JobFiles(files.folder)

    assert list(later.incoming.iterdir()) == []
    assert later.video("job_1").read_bytes() == b"video"
    assert later.total_bytes == 0  # until somebody says what there is
    assert (later.count_again("job_1"), later.total_bytes) == (5, 5)


def test_a_picture_is_kept_once_and_counted(files: JobFiles) -> None:
    files.make("job_1", None)
    files.put_picture("job_1", 3, b"jpeg")
    files.put_picture("job_1", 3, b"another")  # an earlier start kept it: nothing is done twice

    assert files.picture("job_1", 3).read_bytes() == b"jpeg"
    assert files.total_bytes == 4


@pytest.mark.parametrize("failing", ["jobs.job_files.os.replace", "pathlib.Path.write_bytes"])
def test_a_picture_is_whole_or_not_there(files: JobFiles, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    def fail(*args: object) -> None:
        Path(files.of("job_1"), "frames", "3.part").touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    files.make("job_1", None)
    with monkeypatch.context() as patch:
        patch.setattr(failing, fail)
        with pytest.raises(OSError, match="No space left"):
            files.put_picture("job_1", 3, b"jpeg")

    assert list((files.of("job_1") / "frames").iterdir()) == []
    assert files.total_bytes == 0
    files.put_picture("job_1", 3, b"jpeg")
    assert files.picture("job_1", 3).read_bytes() == b"jpeg"


def test_a_picture_that_a_kill_broke_off_is_written_anew(files: JobFiles) -> None:
    files.make("job_1", None)
    part = files.picture("job_1", 3).with_suffix(".part")
    part.write_bytes(b"jp")
    files.put_picture("job_1", 3, b"jpeg")

    assert files.picture("job_1", 3).read_bytes() == b"jpeg"
    assert not part.exists()


def test_bytes_are_counted_without_a_walk_and_corrected_by_one(files: JobFiles) -> None:
    files.make("job_1", incoming(files, b"video"))
    files.put_picture("job_1", 0, b"jpeg")
    files.make("job_2", None)
    files.count("job_2", 100)
    files.frames("job_1").write_bytes(b"results")
    assert files.total_bytes == 5 + 4 + 100

    assert (files.count_again("job_1"), files.total_bytes) == (16, 116)
    assert (files.count_again("job_2"), files.total_bytes) == (0, 16)
    assert (files.count_again("nobody"), files.total_bytes) == (0, 16)
    files.remember("job_2", 50)
    files.remember("job_2", 50)
    assert files.total_bytes == 66


def test_a_removed_job_leaves_no_file_and_no_bytes(files: JobFiles) -> None:
    files.make("job_1", incoming(files, b"video"))
    files.make("job_2", incoming(files, b"other"))
    files.remove("job_1")
    files.remove("job_1")
    files.remove("nobody")

    assert (files.of("job_1").exists(), files.of("job_2").exists(), files.total_bytes) == (False, True, 5)


def test_counting_in_many_threads_loses_nothing(files: JobFiles) -> None:
    def work(worker: int) -> None:
        files.make(f"job_{worker}", None)
        for i in range(50):
            files.count(f"job_{worker}", 10)
            files.count("shared", 1)
            files.remember(f"job_{worker}", i)
        if worker % 2:
            files.remove(f"job_{worker}")

    threads = [threading.Thread(target=work, args=(worker,)) for worker in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert files.total_bytes == 4 * 49 + 8 * 50


def test_free_bytes_are_those_of_the_disk(files: JobFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 58, 42))

    assert files.free_bytes == 42


# What goes wrong


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_no_room_is_called_a_full_disk(number: int) -> None:
    full = r"^The disk of this host is full\. Nothing was lost\. Make room"
    with pytest.raises(StorageFull, match=full) as caught, storing():
        raise OSError(number, os.strerror(number))
    assert isinstance(caught.value.__cause__, OSError)


def test_other_troubles_are_named() -> None:
    with pytest.raises(StorageFull, match=r"^This host cannot store: Input/output error\. "), storing():
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    with pytest.raises(StorageFull, match=r"^This host cannot store: the cause\. "), storing():
        raise shutil.Error("the cause")  # an OSError without a number


def test_what_is_not_about_the_disk_passes() -> None:
    with pytest.raises(JobNotFound), storing():
        raise JobNotFound("no")
    with pytest.raises(StorageFull, match=r"^once$"), storing(), storing():
        raise StorageFull("once")


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageFull, match="Not a directory"):
        JobFiles(tmp_path / "file")


# Room, as the store sees to it


def test_nothing_is_accepted_where_the_disk_is_nearly_full(house: House) -> None:
    failed = house.added("failed")
    store = house.reopen(min_free_bytes=1 << 62)
    before = records(store)
    for ask in (house.add, lambda: house.add(video=b"video"), lambda: store.retry(failed), store.check_space):
        with pytest.raises(StorageFull, match=r"^The disk of this host is full: nothing more is accepted\."):
            ask()

    assert (store.files.incoming / "upload").exists()  # it is still the caller's
    for store in house.now_and_later():
        assert records(store) == before
        assert_consistent(store)


def test_where_too_much_is_kept_finished_jobs_make_room_and_unfinished_do_not(house: House) -> None:
    store = house.reopen(retention_bytes=100_000)
    done, a, b = (house.add(video=b"x" * 30_000) for _ in range(3))
    with pytest.raises(StorageFull, match=r"keeps 100,000 bytes at most .* unfinished jobs fill them"):
        house.add()
    house.run("completed", frame(0))
    assert store.files.total_bytes > 90_000 and store.kept_bytes > store.files.total_bytes + 3 * 8192
    new = house.add()

    for store in house.now_and_later():
        store.recover()
        assert [record["job_id"] for record in records(store)] == [new, b, a]
        assert (store.files.of(done).exists(), store.files.total_bytes) == (False, 60_000)


def test_finished_jobs_make_room_before_the_limit_is_reached(house: House) -> None:
    """Bug: of two callers who had both found room for one, the second was refused, though finished jobs could go."""
    done = house.added("completed", video=b"x" * 50_000)
    store = house.reopen(retention_bytes=round(house.store.kept_bytes / 0.97))
    store.recover()
    assert CROWDED_SHARE < store.kept_bytes / house.limits.retention_bytes < 1
    house.add()
    assert not store.files.of(done).exists()


def test_purging_deletes_finished_jobs_that_are_too_old_and_the_oldest_if_they_are_too_large(house: House) -> None:
    old, large, small = (
        house.added(status, video=b"x" * n) for status, n in zip(FINISHED, (1, 12_000, 10), strict=True)
    )
    waiting = house.add()
    limit = round((house.store.kept_bytes + 1000) / CROWDED_SHARE)
    house.reopen(retention_s=100, retention_bytes=limit).recover()
    assert house.store.purge() == []
    house.reopen(retention_s=103).recover()
    house.store.files.count(waiting, 15_000)  # for which the old one, with its record, is not enough
    house.now_s = (house.store.get(old)["completed_at"] or 0.0) + 103

    with house.store.frames(large) as frames:
        frames.append([frame(7)])
        assert house.store.purge() == [old, large]
        assert [result["frame_idx"] for result in frames.results()] == [7]  # who reads may end that
    for store in house.now_and_later():
        assert {record["job_id"] for record in records(store)} == {small, waiting}
        assert_consistent(store)


CANCELED_WAITING = "canceled while it waits"
CANCELED_BY_RESTART = "canceled by a restart"


@pytest.mark.parametrize("case", [*FINISHED, "submitted", "processing", CANCELED_WAITING, CANCELED_BY_RESTART])
def test_after_a_restart_the_bytes_of_jobs_are_those_on_the_disk(house: House, case: str) -> None:
    """Bug: a job that did not go through the worker's hands at its end was counted with the bytes it had had before."""
    job_id = house.add(video=b"x" * 1000)
    if case in FINISHED:
        house.run(case, frame(0), frame(1))  # type: ignore[arg-type]
    elif case != "submitted" and case != "canceled while it waits":
        assert house.store.claim(0)
        house.store.files.put_picture(job_id, 0, b"jpeg")
    if case.startswith("canceled "):
        house.store.cancel(job_id)

    for store in house.now_and_later():
        store.recover()
        on_disk = sum(path.stat().st_size for path in store.files.of(job_id).rglob("*") if path.is_file())
        assert store.files.total_bytes == on_disk >= 1000


def test_a_restart_removes_what_belongs_to_no_job(house: House) -> None:
    job_id = house.add(video=b"video")
    house.upload(b"never acknowledged")
    house.store.files.make("job_2", None)

    house.store.files.of("job_2").rename(house.folder / "jobs" / "job_2.new")

    for store in house.now_and_later():
        store.recover()
        assert [path.name for path in (house.folder / "jobs").iterdir()] == [job_id]
        assert store.files.video(job_id).read_bytes() == b"video"
    assert list(house.store.files.incoming.iterdir()) == []


# A full disk, as the store meets it


def full(*args: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# By name: the status of a job, and what is done to it while nothing can be written.
WRITES: dict[str, tuple[JobStatusName, Callable[[House, str], Any]]] = {
    "add": ("submitted", lambda house, _: house.add(key="k")),
    "add_upload": ("submitted", lambda house, _: house.add(video=b"video")),
    "cancel": ("submitted", lambda house, job_id: house.store.cancel(job_id)),
    "cancel_running": ("processing", lambda house, job_id: house.store.cancel(job_id)),
    "retry": ("failed", lambda house, job_id: house.store.retry(job_id)),
    "delete": ("failed", lambda house, job_id: house.store.delete(job_id)),
    "claim": ("submitted", lambda house, _: house.store.claim(0)),
    "update": ("processing", lambda house, job_id: house.store.update(job_id, stage="describing")),
    "end": ("processing", lambda house, job_id: house.store.end(job_id, "completed")),
    "recover": ("processing", lambda house, _: house.store.recover()),
    "webhook_tried": (
        "failed",
        lambda house, _: house.store.webhook_tried(house.store.outgoing()[0], next_try_at=None, outcome=""),
    ),
}


@pytest.mark.parametrize("name", WRITES)
def test_on_a_full_disk_nothing_changes_and_later_all_goes_on(
    house: House, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    status, write = WRITES[name]
    job_id = house.added(status, webhook_url=HOOK)
    before, is_live = records(house.store), house.store.live(job_id) is not None
    with monkeypatch.context() as patch:
        patch.setattr("jobs.journal.os.write", full)
        with pytest.raises(StorageFull, match=r"^The disk of this host is full\. Nothing was lost\."):
            write(house, job_id)

    for store in house.now_and_later() if name != "end" else [house.store]:
        assert records(store) == before
        assert_consistent(store)
    assert (house.store.live(job_id) is not None) == (is_live and name == "end")
    write(house, job_id)
    for store in house.now_and_later():
        assert records(store) != before
        assert_consistent(store)


def test_a_job_can_be_deleted_on_a_full_disk(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: the line that removes a record takes room, too: deleting, which every refusal advises, was refused."""
    job_id, reserve, write = house.added("failed"), house.folder / "reserve", os.write
    with monkeypatch.context() as patch:
        patch.setattr("jobs.journal.os.write", lambda fd, line: full() if reserve.exists() else write(fd, line))
        house.store.delete(job_id)
    assert reserve.stat().st_size == RESERVE_BYTES

    for store in house.now_and_later():
        assert records(store) == []
        assert_consistent(store)


def test_a_disk_that_is_really_full_takes_nothing_and_loses_nothing(house: House) -> None:
    """A limit of the file size stands for the disk; it is part of a record that does not fit."""
    job_ids, before = [], resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(StorageFull, match="The disk of this host is full"):
            while len(job_ids) < 100:
                job_ids.append(house.add())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert len(job_ids) > 5

    for store in house.now_and_later():
        assert_consistent(store)
        job_ids.append(house.add())
        assert [record["job_id"] for record in records(store)] == job_ids[::-1]


def test_a_compaction_that_finds_no_room_is_no_failure_of_the_change(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: the change was in the journal and shown when the compaction failed, and was then reported as refused: the
    job was queued, unknown to the indexes, and its folder gone."""
    house.add()
    monkeypatch.setattr(databases, "COMPACT_EXTRA_LINES", -9)
    replace = os.replace
    monkeypatch.setattr("os.replace", lambda old, new: full() if new.suffix == ".jsonl" else replace(old, new))
    job_id = house.add()
    monkeypatch.undo()

    for store in house.now_and_later():
        assert records(store)[0]["job_id"] == job_id
        assert_consistent(store)
