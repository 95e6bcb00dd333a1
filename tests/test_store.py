"""TinyDB on journals: the same as TinyDB, also with threads, after reopening and on a full disk."""

import errno
import json
import os
import random
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from tinydb import TinyDB, where
from tinydb.storages import MemoryStorage
from tinydb.table import Table

from jobs import store
from jobs.store import DataInUse, Document, JournalDB, owning

ROOT = Path(__file__).parent.parent


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "jobs.jsonl"


def reopened(db: JournalDB, path: Path) -> JournalDB:
    db.close()
    return JournalDB(path)


def test_documents_are_the_same_after_reopening(path: Path) -> None:
    db = JournalDB(path)
    jobs = db.named("jobs")
    jobs.insert(Document({"status": "submitted", "text": "é\n"}, "job_1"))
    jobs.insert_multiple([Document({"status": "submitted"}, f"job_{i}") for i in range(2, 5)])
    jobs.change("job_2", {"status": "processing"})
    jobs.discard("job_3")
    before = jobs.all()
    db = reopened(db, path)

    assert db.named("jobs").all() == before
    assert [document.doc_id for document in before] == ["job_1", "job_2", "job_4"]
    assert db.named("jobs").fetch("job_2") == {"status": "processing"}
    db.close()


class StringTable(Table):
    document_id_class = str  # type: ignore[assignment]
    document_class = Document


def test_random_operations_do_what_tinydb_does(path: Path) -> None:
    rng, ours, theirs = random.Random(1), JournalDB(path), TinyDB(storage=MemoryStorage)

    def both(name: str, *args: Any, **options: Any) -> None:
        answers = []
        for table in (ours.named("t"), StringTable(theirs.storage, "t")):
            try:
                answers.append(getattr(table, name)(*args, **options))
            except (ValueError, KeyError) as error:
                answers.append(type(error))
        assert answers[0] == answers[1], (name, args, options)

    for _ in range(600):
        doc_id, number = str(rng.randrange(40)), rng.randrange(5)
        operation = rng.randrange(9)
        if operation == 0:
            both("insert", Document({"n": number, "list": [number]}, doc_id))
        elif operation == 1:
            both("insert_multiple", [Document({"n": number}, str(rng.randrange(60))) for _ in range(3)])
        elif operation == 2:
            both("update", {"n": number}, doc_ids=[doc_id])
        elif operation == 3:
            both("update", {"m": number}, where("n") == number)
        elif operation == 4:
            both("remove", doc_ids=[doc_id])
        elif operation == 5:
            both("remove", (where("n") == number) & (where("m") == number))
        elif operation == 6:
            both("upsert", Document({"n": number, "x": 1}, doc_id))
        elif operation == 7:
            both("count", where("n") == number)
        else:
            both("get", doc_id=doc_id)
        both("all")
    ours = reopened(ours, path)
    both("all")
    assert ours.named("t").fetch("nobody") is None
    ours.close()


def test_what_is_read_is_a_copy(path: Path) -> None:
    db = JournalDB(path)
    jobs, given = db.named("jobs"), {"list": [1]}
    jobs.insert(Document(given, "a"))
    given["list"].append(2)
    fetched = jobs.fetch("a")
    assert fetched
    for document in (fetched, jobs.all()[0], jobs.search(where("list").exists())[0]):
        document["list"].append(3)

    assert jobs.fetch("a") == {"list": [1]}
    db.close()


def test_threads_lose_nothing_and_ids_stay_single(path: Path) -> None:
    db = JournalDB(path, is_synced=False)
    jobs, num_refused, is_over = db.named("jobs"), [], threading.Event()
    jobs.insert(Document({f"count_{worker}": 0 for worker in range(6)}, "counts"))

    def write(worker: int) -> None:
        for i in range(50):
            jobs.insert(Document({"worker": worker}, f"{worker}-{i}"))
            jobs.change("counts", {f"count_{worker}": i + 1})
            try:
                jobs.insert(Document({}, f"shared-{i}"))
            except ValueError:
                num_refused.append(i)

    def look() -> None:
        while not is_over.is_set():
            assert all("worker" in job for job in jobs.search(where("worker").exists()))
            jobs.all()

    threads = [threading.Thread(target=write, args=(worker,)) for worker in range(6)]
    reader = threading.Thread(target=look)
    for thread in [*threads, reader]:
        thread.start()
    for thread in threads:
        thread.join()
    is_over.set()
    reader.join()
    db = reopened(db, path)

    assert len(db.named("jobs")) == 1 + 6 * 50 + 50
    assert len(num_refused) == 5 * 50
    assert db.named("jobs").fetch("counts") == {f"count_{worker}": 50 for worker in range(6)}
    db.close()


def test_the_file_is_compacted_when_most_of_it_is_old(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "COMPACT_EXTRA_LINES", 20)
    db = JournalDB(path, is_synced=False)
    jobs = db.named("jobs")
    jobs.insert_multiple([Document({"n": 0}, str(i)) for i in range(5)])
    for n in range(200):
        jobs.change(str(n % 5), {"n": n})
        assert path.read_bytes().count(b"\n") <= 2 * 5 + 20
    before = jobs.all()
    db = reopened(db, path)

    assert db.named("jobs").all() == before
    db.close()


def test_an_update_that_changes_nothing_writes_nothing(path: Path) -> None:
    db = JournalDB(path)
    db.named("jobs").insert(Document({"n": 1}, "a"))
    before = path.read_bytes()
    db.named("jobs").change("a", {"n": 1})
    db.named("jobs").discard("nobody")
    with pytest.raises(KeyError):
        db.named("jobs").change("nobody", {"n": 1})
    db.named("jobs").remove(where("n") == 2)

    assert path.read_bytes() == before
    db.close()


def test_a_write_that_fails_changes_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    db = JournalDB(path)
    jobs = db.named("jobs")
    jobs.insert(Document({"n": 1}, "a"))
    with monkeypatch.context() as patch:
        patch.setattr("jobs.journal.os.write", lambda fd, line: 3)  # a full disk takes three bytes
        with pytest.raises(OSError, match="No space left"):
            jobs.change("a", {"n": 2})
    assert jobs.fetch("a") == {"n": 1}
    jobs.change("a", {"n": 3})
    db = reopened(db, path)

    assert db.named("jobs").fetch("a") == {"n": 3}
    db.close()


def test_documents_without_an_id_are_refused(path: Path) -> None:
    db = JournalDB(path)
    with pytest.raises(ValueError, match=r"insert a jobs\.store\.Document"):
        db.named("jobs").insert({"n": 1})
    db.close()


def test_tables_can_be_dropped(path: Path) -> None:
    db = JournalDB(path)
    db.named("a").insert(Document({"n": 1}, "1"))
    db.named("b").insert(Document({"n": 1}, "1"))
    db.drop_table("a")
    db = reopened(db, path)

    assert (len(db.named("a")), len(db.named("b"))) == (0, 1)
    db.drop_tables()
    assert len(db.named("b")) == 0
    db.close()


def test_stock_tinydb_can_take_the_data_over(path: Path, tmp_path: Path) -> None:
    db = JournalDB(path)
    db.named("jobs").insert(Document({"n": 1}, "1"))
    stock = TinyDB(tmp_path / "stock.json")
    stock.storage.write(db.storage.read() or {})

    assert json.loads((tmp_path / "stock.json").read_text()) == {"jobs": {"1": {"n": 1}}}
    stock.close()
    db.close()


# A data directory


def test_a_data_directory_has_one_owner(tmp_path: Path) -> None:
    with owning(tmp_path / "data"):
        with pytest.raises(DataInUse, match="Another process uses the data directory"), owning(tmp_path / "data"):
            pass
        command = [sys.executable, "-m", "jobs.store", "check", str(tmp_path / "data")]
        (tmp_path / "data" / "jobs.jsonl").write_bytes(b"")
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert (run.returncode, "Stop it first" in run.stderr) == (2, True)
    with owning(tmp_path / "data"):
        pass


def test_a_removed_lock_lets_no_second_process_in(tmp_path: Path) -> None:
    """Bug: where somebody had deleted the file, a second server started on the same data."""
    with owning(tmp_path):
        (tmp_path / "lock").unlink()
        for is_server in (True, False):
            with pytest.raises(DataInUse), owning(tmp_path, is_server=is_server):
                pass
    with owning(tmp_path):
        pass


def test_an_older_server_locks_the_file_alone_and_is_respected(tmp_path: Path) -> None:
    with FileLock(tmp_path / "lock"):
        for is_server in (True, False):
            with pytest.raises(DataInUse), owning(tmp_path, is_server=is_server):
                pass


def test_who_looks_leaves_no_lock_file(tmp_path: Path) -> None:
    """Bug: after a check of a backup, the next backup to the same place was refused, since a server had worked there;
    and where root had made the file, the server's user could not lock it."""
    with owning(tmp_path, is_server=False), pytest.raises(DataInUse), owning(tmp_path):
        pass

    assert list(tmp_path.iterdir()) == []


def test_a_file_system_that_cannot_lock_folders_has_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> bool:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    monkeypatch.setattr("jobs.store.lock_descriptor", refuse)
    with owning(tmp_path), pytest.raises(DataInUse), owning(tmp_path):
        pass
