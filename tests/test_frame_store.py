"""The frame results of a job, and which databases are open: also with threads, after reopening and deletion."""

import os
import random
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs import frame_store
from jobs.frame_store import NUM_KEPT_OPEN, FrameStore, FrameStores
from jobs.journal import JournalDamaged


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "frames.jsonl"


@pytest.fixture
def stores() -> Iterator[FrameStores]:
    stores = FrameStores()
    yield stores
    stores.close()


def result(frame_idx: int, status: str = "success", **fields: Any) -> dict[str, Any]:
    return {"frame_idx": frame_idx, "status": status, "description": f"frame {frame_idx}", **fields}


def now_and_later(store: FrameStore, path: Path) -> Iterator[FrameStore]:
    """The store, and then what it is after closing and reopening."""
    yield store
    store.close()
    later = FrameStore(path)
    yield later
    later.close()


def ids(results: list[Any]) -> list[int]:
    return [result["frame_idx"] for result in results]


# One job's results


def test_results_come_back_in_the_order_of_storing_and_by_frame(path: Path) -> None:
    first = FrameStore(path)
    first.append([result(20), result(10, "error", error_message="no")])
    first.append([result(30, reused_from_frame_idx=20)])

    for store in now_and_later(first, path):
        assert [(r["seq"], r["frame_idx"]) for r in store.after(0, 99)] == [(1, 20), (2, 10), (3, 30)]
        assert ids(store.results()) == [10, 20, 30]
        assert (len(store), store.last_seq, store.num_failed, store.num_reused) == (3, 3, 1, 1)


def test_an_empty_store_has_nothing(path: Path) -> None:
    for store in now_and_later(FrameStore(path), path):
        assert (len(store), store.last_seq, store.num_failed, store.num_reused) == (0, 0, 0, 0)
        assert (store.after(0, 9), store.results()) == ([], [])


def test_a_reader_pages_through_what_came_after(path: Path) -> None:
    first = FrameStore(path)
    first.append([result(i) for i in range(10)])

    for store in now_and_later(first, path):
        assert ids(store.after(0, 4)) == [0, 1, 2, 3]
        assert ids(store.after(4, 4)) == [4, 5, 6, 7]
        assert ids(store.after(8, 4)) == [8, 9]
        assert store.after(10, 4) == store.after(1 << 53, 4) == []


def test_a_replaced_result_gets_a_new_seq_and_is_seen_again(path: Path) -> None:
    first = FrameStore(path)
    first.append([result(0), result(1, "error"), result(2)])
    first.append([result(1, description="at last")])

    for store in now_and_later(first, path):
        assert [(r["seq"], r["frame_idx"]) for r in store.after(0, 99)] == [(1, 0), (3, 2), (4, 1)]
        assert [r["description"] for r in store.after(3, 99)] == ["at last"]
        assert ids(store.after(1, 1)) == [2]
        assert (len(store), store.last_seq, store.num_failed) == (3, 4, 0)


def test_a_retry_may_fail_where_the_first_try_did_not(path: Path) -> None:
    first = FrameStore(path)
    first.append([result(0, "error"), result(1, reused_from_frame_idx=0)])
    first.append([result(0, "error"), result(1, "error")])

    for store in now_and_later(first, path):
        assert (store.num_failed, store.num_reused) == (2, 0)


def test_a_cleared_store_is_empty_and_counts_on(path: Path) -> None:
    """It began again at 1: who had read up to 2 missed what came then."""
    first = FrameStore(path)
    first.append([result(0, "error"), result(1, reused_from_frame_idx=0)])
    first.clear()

    for store in now_and_later(first, path):
        assert (len(store), store.last_seq, store.num_failed, store.num_reused, store.after(0, 9)) == (0, 2, 0, 0, [])


def test_what_is_stored_after_a_clearing_is_new_to_every_reader(path: Path) -> None:
    first = FrameStore(path)
    first.append([result(0), result(1)])
    first.clear()
    first.close()
    second = FrameStore(path)
    second.append([result(5)])

    for store in now_and_later(second, path):
        assert [(r["seq"], r["frame_idx"]) for r in store.after(2, 9)] == [(3, 5)]


def test_random_changes_do_what_a_dictionary_does(path: Path) -> None:
    rng, store = random.Random(3), FrameStore(path)
    model: dict[int, dict[str, Any]] = {}
    seq = cleared = 0
    for step in range(400):
        batch = [
            result(idx, rng.choice(["success", "error"]), reused_from_frame_idx=rng.choice([None, 0]))
            for idx in rng.sample(range(60), rng.randrange(5))
        ]
        store.append(batch)
        for each in batch:
            seq += 1
            model[each["frame_idx"]] = {**each, "seq": seq}
        if step % 150 == 149:
            store.clear()
            model.clear()
            cleared = seq
        elif step % 20 == 19:
            store.close()
            store = FrameStore(path)
        since, limit = rng.randrange(seq + 2), rng.randrange(1, 20)
        newer = sorted((r for r in model.values() if r["seq"] > since), key=lambda r: r["seq"])
        assert store.after(since, limit) == newer[:limit]
        assert store.results() == [model[idx] for idx in sorted(model)]
        assert store.num_failed == sum(r["status"] == "error" for r in model.values())
        assert store.num_reused == sum(r["reused_from_frame_idx"] is not None for r in model.values())
        seq = store.last_seq  # after reopening, that of the last result that was not replaced
        assert seq == max((r["seq"] for r in model.values()), default=cleared)
    store.close()


def test_a_full_disk_refuses_a_batch_whole(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = FrameStore(path)
    first.append([result(0, "error")])
    with monkeypatch.context() as patch:
        patch.setattr("jobs.journal.os.write", lambda fd, line: 3)  # a full disk takes three bytes
        with pytest.raises(OSError, match="No space left"):
            first.append([result(0), result(1, "error")])

    assert [(r["seq"], r["status"]) for r in first.after(0, 9)] == [(1, "error")]
    assert (first.last_seq, first.num_failed) == (1, 1)
    first.append([result(0), result(1)])
    for store in now_and_later(first, path):
        assert [(r["seq"], r["frame_idx"]) for r in store.after(0, 9)] == [(2, 0), (3, 1)]


def test_a_reader_misses_nothing_while_another_thread_writes(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.journal._sync", lambda fd: None)
    store, seen, seq = FrameStore(path), [], 0

    def write() -> None:
        for i in range(0, 600, 3):
            store.append([result(i), result(i + 1, "error"), result(i + 2)])

    writer = threading.Thread(target=write)
    writer.start()
    while seq < 600:
        for found in store.after(seq, 7):
            seen.append(found["frame_idx"])
            seq = found["seq"]
        stored = ids(store.results())
        assert stored == list(range(len(stored)))
    writer.join()
    store.close()

    assert seen == list(range(600))


def test_a_reader_goes_on_while_the_store_is_cleared(path: Path) -> None:
    """Bug: a retry with another model cleared the list that a reader was walking over: IndexError."""
    store = FrameStore(path)
    store.append([result(i) for i in range(4)])

    peek = store._table.peek

    def peek_and_clear(doc_id: str) -> Any:
        found = peek(doc_id)
        if len(store):
            store.clear()
        return found

    store._table.peek = peek_and_clear  # type: ignore[method-assign]

    assert ids(store.after(0, 9)) == [0]
    store.close()


# Which are open


def test_nested_users_share_one_store(path: Path, stores: FrameStores) -> None:
    """Bug: an empty FrameStore is falsy (it has a length), and was opened a second time."""
    with stores.opened(path) as outer:
        assert not len(outer)
        with stores.opened(path) as inner:
            assert inner is outer
            inner.append([result(0)])
        with stores.opened(path) as again:
            assert again is outer
        outer.append([result(1)])  # the inner ones have not closed it

    with stores.opened(path) as later:
        assert (later is outer, ids(later.results())) == (True, [0, 1])


def test_an_idle_store_is_kept_even_if_it_is_empty(path: Path, stores: FrameStores) -> None:
    with stores.opened(path) as first:
        pass
    with stores.opened(path) as second:
        assert second is first


def test_users_of_many_threads_share_one_store(path: Path, stores: FrameStores) -> None:
    inside, seen = threading.Barrier(8), []

    def use() -> None:
        with stores.opened(path) as store:
            inside.wait(10)
            seen.append(store)

    threads = [threading.Thread(target=use) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert (len(seen), len({id(store) for store in seen})) == (8, 1)
    assert (stores._used, list(stores._idle)) == ({}, [path])


def test_of_the_idle_the_longest_unused_are_closed(tmp_path: Path, stores: FrameStores) -> None:
    paths = [tmp_path / f"{i}.jsonl" for i in range(NUM_KEPT_OPEN + 3)]
    for path in paths[:NUM_KEPT_OPEN]:
        with stores.opened(path) as store:
            store.append([result(0)])
    with stores.opened(paths[0]) as kept:  # which makes it the last used
        pass
    num_open = len(os.listdir("/dev/fd"))
    for path in paths[NUM_KEPT_OPEN:]:
        with stores.opened(path):
            pass

    assert list(stores._idle) == [*paths[4:NUM_KEPT_OPEN], paths[0], *paths[NUM_KEPT_OPEN:]]
    assert len(os.listdir("/dev/fd")) == num_open
    with stores.opened(paths[0]) as again, stores.opened(paths[1]) as reopened:
        assert (again is kept, ids(reopened.results())) == (True, [0])


def test_any_number_may_be_used_at_once(tmp_path: Path, stores: FrameStores, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frame_store, "NUM_KEPT_OPEN", 1)
    with stores.opened(tmp_path / "a") as a, stores.opened(tmp_path / "b") as b, stores.opened(tmp_path / "c") as c:
        for store in (a, b, c):
            store.append([result(0)])

    assert len(stores._idle) == 1


def test_an_idle_store_is_closed_before_its_job_is_deleted(path: Path, stores: FrameStores) -> None:
    with stores.opened(path) as store:
        store.append([result(0)])
    stores.forget(path)
    path.unlink()
    stores.forget(path)  # again, and of what was never open, is harmless

    with pytest.raises(OSError, match="Bad file descriptor"):
        store.append([result(1)])
    with stores.opened(path) as other:
        assert len(other) == 0


def test_a_store_that_is_deleted_while_it_is_used_serves_its_users_and_is_closed(
    tmp_path: Path, stores: FrameStores
) -> None:
    path = tmp_path / "job" / "frames.jsonl"
    path.parent.mkdir()
    num_open = len(os.listdir("/dev/fd"))
    with stores.opened(path) as store:
        store.append([result(0)])
        stores.forget(path)
        shutil.rmtree(path.parent)
        with stores.opened(path) as again:
            assert again is store
        assert ids(store.results()) == [0]

    assert (stores._used, stores._idle, len(os.listdir("/dev/fd"))) == ({}, {}, num_open)
    with pytest.raises(FileNotFoundError), stores.opened(path):
        pass
    assert not path.parent.exists()


def test_a_damaged_store_is_named_each_time_and_others_are_not_affected(path: Path, stores: FrameStores) -> None:
    with stores.opened(path) as store:
        store.append([result(0)])
        store.append([result(1)])
    stores.forget(path)
    path.write_bytes(path.read_bytes().replace(b"frame 0", b"frame 7"))

    for _ in range(2):
        with pytest.raises(JournalDamaged, match="line 1"), stores.opened(path):
            pass
    with stores.opened(path.with_name("other")) as other:
        other.append([result(0)])


def test_closing_closes_all_once_whoever_still_uses_them(tmp_path: Path) -> None:
    """Bug: one that was used while all were closed became idle, and was closed again: by then, its file descriptor may
    have been somebody else's."""
    stores, paths = FrameStores(), [tmp_path / f"{i}" for i in range(NUM_KEPT_OPEN + 2)]
    with stores.opened(tmp_path / "used") as used:
        stores.close()
        with pytest.raises(OSError, match="Bad file descriptor"):
            used.append([result(0)])
    with stores.opened(tmp_path / "used") as again:
        again.append([result(0)])
    stores.forget(tmp_path / "used")
    stranger = os.open(tmp_path / "stranger", os.O_RDWR | os.O_CREAT)  # gets the descriptor that became free
    for path in paths:
        with stores.opened(path):
            pass
    stores.close()

    os.close(stranger)
