"""The jobs: their states, their order, their pages; always also after reopening.

The store at random and with threads is in test_job_store_walk.py; where there is no room, in test_job_files.py; what it
tells by webhook, in test_views.py."""

import threading
from functools import reduce
from operator import and_, or_
from typing import Any
from uuid import RFC_4122, UUID

import pytest
from job_house import OUTCOMES, STATUSES, House, assert_consistent, claimed, frame, records

from jobs.job_store import JobStore
from jobs.schema import JobStatusName
from jobs.store import DataInUse
from pipeline.errors import IdempotencyMismatch, JobNotFound, QueueFull

# One job


def test_a_job_goes_its_way_and_each_step_is_dated(house: House) -> None:
    job_id = house.add(question="Who?")
    assert house.store.get(job_id)["submitted_at"] == house.now_s == 1001.0
    house.now_s = 1010.0
    record = house.store.claim(0)
    assert record and record["job_id"] == job_id and house.store.live(job_id)
    house.store.update(job_id, stage="describing", num_frames_expected=2)
    house.now_s = 1020.0
    with house.store.frames(job_id) as frames:
        frames.append([frame(0), {**frame(5), "reused_from_frame_idx": 0}, frame(9, "error")])
    house.store.end(job_id, "completed", warnings=["A gap."], timings={"video_download": 1.0})

    for store in house.now_and_later():
        record = store.get(job_id)
        assert (record["status"], record["stage"], record["owner"]) == ("completed", None, "ann")
        assert (record["processing_started_at"], record["completed_at"], record["failed_at"]) == (1010.0, 1020.0, None)
        assert (record["num_frames"], record["num_frames_failed"], record["num_frames_reused"]) == (3, 1, 1)
        assert (record["last_seq"], record["warnings"], record["request"]["question"]) == (3, ["A gap."], "Who?")
        assert store.live(job_id) is None
        assert_consistent(store)


def test_the_id_of_a_job_cannot_be_guessed(house: House) -> None:
    """A random UUID has 122 bits of the system's randomness: none but the six of its version stays the same."""
    ids = [UUID(house.add().removeprefix("job_")) for _ in range(30)]

    assert {(found.version, found.variant) for found in ids} == {(4, RFC_4122)}
    bits = [found.int for found in ids]
    assert (reduce(or_, bits) ^ reduce(and_, bits)).bit_count() == 122


@pytest.mark.parametrize("operation", OUTCOMES)
@pytest.mark.parametrize("status", [*STATUSES, "deleted"])
def test_every_operation_on_every_status(house: House, operation: str, status: Any) -> None:
    outcome = OUTCOMES[operation][[*STATUSES, "deleted"].index(status)]
    job_id = house.added("submitted" if status == "deleted" else status)
    if status == "deleted":
        house.store.delete(job_id)
    before = records(house.store)
    if isinstance(outcome, str):
        getattr(house.store, operation)(job_id)
    else:
        with pytest.raises(outcome):
            getattr(house.store, operation)(job_id)

    for store in house.now_and_later():
        if isinstance(outcome, str):
            assert [record["status"] for record in records(store)] == [outcome] * (outcome != "deleted")
        else:
            assert records(store) == before
        assert_consistent(store)


def test_what_is_returned_is_a_copy(house: House) -> None:
    job_id = house.add(metadata={"list": [1]})
    for record in (house.store.get(job_id), records(house.store)[0], house.store.cancel(job_id)):
        record["request"]["metadata"]["list"].append(2)

    for store in house.now_and_later():
        assert store.get(job_id)["request"]["metadata"] == {"list": [1]}


def test_a_job_that_is_gone_is_gone_for_all(house: House) -> None:
    job_id = house.add()
    with house.store.frames(job_id) as frames:
        frames.append([frame(0)])
    house.store.delete(job_id)
    assert not house.store._frames._idle  # its database is closed

    for store in house.now_and_later():
        for look in (store.get, store.cancel, store.retry, store.delete, store.update):
            with pytest.raises(JobNotFound, match=r"^Job ID not found in store"):
                look(job_id)
        with pytest.raises(JobNotFound), store.frames(job_id):
            pass
        with pytest.raises(JobNotFound):
            store.end(job_id, "completed")
        assert (store.live(job_id), store.files.of(job_id).exists()) == (None, False)
        assert not store.is_cancel_requested(job_id)
        assert_consistent(store)


@pytest.mark.parametrize("ending", ["completed", "failed", "canceled", "submitted"])
def test_a_running_job_whose_cancel_was_acknowledged_ends_canceled(house: House, ending: JobStatusName) -> None:
    """It could still end as completed, if its last frame came in between."""
    job_id = house.added("processing")
    for _ in range(2):
        assert house.store.cancel(job_id)["status"] == "processing"
        assert house.store.is_cancel_requested(job_id)
    house.store.end(job_id, ending, error_code="no_frames" if ending == "failed" else None)

    for store in house.now_and_later():
        assert (store.get(job_id)["status"], store.is_cancel_requested(job_id)) == ("canceled", False)
        assert store.get(job_id)["error_code"] is None


@pytest.mark.parametrize("error_code", ["server_died", "model_changed"])
def test_a_retried_job_goes_on_unless_the_model_has_changed(house: House, error_code: str) -> None:
    house.add()
    job_id = house.run("failed", frame(0), frame(1, "error"), error_code=error_code, error_message="Why", model={})
    house.store.retry(job_id)

    for store in house.now_and_later():
        record, starts_over = store.get(job_id), error_code == "model_changed"
        assert [record[name] for name in ("error_code", "failed_at", "processing_started_at")] == [None] * 3
        assert (record["num_frames"], record["redo_errors_to_seq"]) == (0 if starts_over else 2, 2)
        assert record["starts_over"] == starts_over  # and keeps its results until it does
        assert record["num_frames_failed"] == (0 if starts_over else 1)
        assert record["model"] == (None if starts_over else {})
        with store.frames(job_id) as frames:
            assert (len(frames), frames.num_failed) == (2, 1)
        assert_consistent(store)


def test_a_job_that_starts_over_has_reused_nothing(house: House) -> None:
    """Bug: num_frames_reused of the earlier start stayed in the record."""
    house.add()
    job_id = house.run("failed", {**frame(1), "reused_from_frame_idx": 0}, error_code="model_changed")
    house.store.retry(job_id)

    for store in house.now_and_later():
        assert store.get(job_id)["num_frames_reused"] == 0


def test_a_job_that_is_deleted_before_its_reader_has_begun_is_not_found(house: House) -> None:
    """Bug: whoever was between get and the opening of the frames got a FileNotFoundError, over HTTP a 500."""
    job_id = house.add()
    reading = house.store.frames(job_id)
    house.store.delete(job_id)

    with pytest.raises(JobNotFound), reading:
        pass


# The queue


def test_jobs_are_claimed_in_the_order_of_submission_and_a_retried_one_waits_behind_the_others(house: House) -> None:
    a, b, c, d = (house.add() for _ in range(4))
    house.store.cancel(b)
    house.store.cancel(a)
    house.store.retry(b)
    e = house.add()
    house.store.retry(a)

    for store in house.now_and_later():
        assert [store.index.queue_position(job_id) for job_id in (c, d, b, e, a)] == [0, 1, 2, 3, 4]
        assert [record["job_id"] for record in records(store)] == [e, d, c, b, a]  # which it does not change
    assert claimed(house.store) == [c, d, b, e, a]
    assert house.store.index.queue_position(a) is None


def test_a_restart_puts_running_jobs_back_to_their_place(house: House) -> None:
    job_ids = [house.add() for _ in range(5)]
    for _ in range(3):
        assert house.store.claim(0)
    started_at = house.store.get(job_ids[0])["processing_started_at"]
    with house.store.frames(job_ids[1]) as frames:
        frames.append([frame(0), frame(1, "error")])
    house.store.update(job_ids[1], stage="describing")
    house.store.cancel(job_ids[2])
    house.now_s += 60
    assert house.reopen().recover() == 3

    for store in house.now_and_later():
        statuses = [store.get(job_id)["status"] for job_id in job_ids]
        assert statuses == ["submitted", "submitted", "canceled", "submitted", "submitted"]
        record = store.get(job_ids[1])
        assert [record[name] for name in ("stage", "num_frames", "num_frames_failed", "last_seq")] == [None, 2, 1, 2]
        assert (store.get(job_ids[2])["canceled_at"], store.is_cancel_requested(job_ids[2])) == (house.now_s, False)
        assert_consistent(store)
    assert house.store.recover() == 0
    assert claimed(house.store) == [job_ids[i] for i in (0, 1, 3, 4)]
    assert house.store.get(job_ids[0])["processing_started_at"] == started_at  # it began then


def test_a_claim_ends_when_a_job_comes_when_none_is_wanted_and_in_time(house: House) -> None:
    assert house.store.claim(0.01) is None
    found: list[Any] = []
    is_wanted = True
    claims = [threading.Thread(target=lambda: found.append(house.store.claim(20, lambda: is_wanted))) for _ in "ab"]
    for thread in claims:
        thread.start()
    job_id = house.add()
    while not found:
        house.store.release()
    is_wanted = False
    house.store.release()
    for thread in claims:
        thread.join(5)

    assert [record and record["job_id"] for record in found] == [job_id, None]
    house.add()
    assert house.store.claim(20, lambda: False) is None


# Limits and repeated requests


def test_a_repeated_request_gets_the_job_of_the_first(house: House) -> None:
    job_id = house.add(key="k")
    for store in house.now_and_later():
        assert house.add(key="k") == job_id
        with pytest.raises(IdempotencyMismatch):
            house.add(key="k", question="Another?")
        assert house.add(key=f"k{len(records(store))}") != job_id
    assert house.run("completed") == house.add(key="k") == job_id
    house.store.delete(job_id)
    again = house.add(key="k", question="Another?")

    assert again != job_id
    for _ in house.now_and_later():
        assert house.add(key="k", question="Another?") == again


def test_the_queue_is_full_in_all_and_for_each_owner(house: House) -> None:
    house.reopen(max_queued_jobs=3, max_queued_jobs_per_owner=2)
    failed = house.added("failed")
    job_ids = [house.add(key="k"), house.add()]
    for store in house.now_and_later():
        for ask in (house.add, lambda store=store: store.retry(failed)):
            with pytest.raises(QueueFull, match=r"^2 jobs are waiting, 2 of them yours: no more are accepted now\."):
                ask()
        assert house.add(key="k") == job_ids[0]  # a repeat is answered all the same
    house.add("bob")
    with pytest.raises(QueueFull, match=r"^3 jobs are waiting, none of them yours"):
        house.add("cy")
    assert house.store.claim(0)  # which makes room
    house.store.retry(failed)
    assert_consistent(house.store)


# Pages


def test_pages_go_back_in_time_whatever_is_deleted_meanwhile(house: House) -> None:
    job_ids = [house.added(STATUSES[2 + i % 2], owner="ann" if i % 3 else "bob") for i in range(12)]
    newest = job_ids[::-1]
    for store in house.now_and_later():
        page = store.page(None, None, None, 5)
        assert ([r["job_id"] for r in page.records], page.total_count) == (newest[:5], len(records(store)))
        store.delete(newest.pop(5))  # the first of the next page
        store.delete(newest.pop(4))  # the one that the cursor is of
        more = store.page(None, None, page.next_cursor, 99)
        assert ([r["job_id"] for r in more.records], more.next_cursor) == (newest[4:], None)
        for owner in ("ann", "bob", None, "nobody"):
            for status in (None, *STATUSES):
                meant = [r for r in records(store) if owner in (None, r["owner"]) and status in (None, r["status"])]
                page = store.page(owner, status, None, len(meant) or 1)
                assert (page.records, page.total_count, page.next_cursor) == (meant, len(meant), None)


# A data directory


def test_a_data_directory_has_one_store(house: House) -> None:
    with pytest.raises(DataInUse):
        JobStore(house.folder)
    house.add()
    assert len(records(house.reopen())) == 1
