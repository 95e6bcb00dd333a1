"""The databases of a data directory: TinyDB on journals, safe with threads and against kill -9 and full disks.

TinyDB's own JSONStorage rewrites the whole file in place: a kill in between loses all of it, and each update costs as
much as the history is long. Here a change is one appended line (journal.py), written and synced before anybody sees it;
reads are copies of what is in memory and need no lock. Document ids are strings. This is the only file that imports
tinydb; it uses TinyDB's documented ways of extension: Storage, Table and TinyDB subclasses.

Look at, or mend, a data directory: python -m jobs.store check|repair DIR, which is jobs/mend.py.
Test: pytest tests/test_store.py
"""

import copy
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout, lock_descriptor
from tinydb import TinyDB
from tinydb.storages import Storage
from tinydb.table import Document as TinyDocument
from tinydb.table import Table

from jobs.journal import Change, DataUnusable, Journal

COMPACT_EXTRA_LINES = 1000  # compacting costs as much as the live documents: wait for more garbage than that


class Document(TinyDocument):
    """A document with its id. It is a copy: changing it changes nothing stored.

    Insert only this class: TinyDB takes the id from no other."""

    def __init__(self, value: Mapping[str, Any], doc_id: str) -> None:
        super().__init__(copy.deepcopy(dict(value)), doc_id)  # type: ignore[arg-type]


class JournalStorage(Storage):
    """All tables in memory, each change in the journal."""

    def __init__(self, path: Path, *, is_synced: bool = True) -> None:
        self.lock = threading.RLock()  # of writers
        self._journal = Journal(path, is_synced=is_synced)
        self._tables: dict[str, dict[str, Mapping[str, Any]]] = {}
        try:
            for change in self._journal.read():
                self._show(change)
        except BaseException:
            self._journal.close()
            raise

    def read(self) -> dict[str, dict[str, Mapping[str, Any]]]:
        return self._tables

    def commit(self, change: Change) -> None:
        """Make a change last, then show it. Raises OSError, and nothing has changed then."""
        with self.lock:
            self._journal.append(change)
            self._show(change)
            if self._journal.num_lines > 2 * sum(map(len, self._tables.values())) + COMPACT_EXTRA_LINES:
                with suppress(OSError):  # there is no room for it now; the change itself is made
                    self._journal.rewrite(self._live())

    def write(self, data: dict[str, dict[str, Any]]) -> None:
        """Replace everything: what TinyDB does to drop tables."""
        with self.lock:
            self._journal.rewrite(Change(table, documents) for table, documents in data.items() if documents)
            self._tables = {table: dict(documents) for table, documents in data.items()}

    def close(self) -> None:
        with self.lock:
            self._journal.close()

    def _live(self) -> Iterator[Change]:
        for table, documents in self._tables.items():
            for doc_id, document in documents.items():
                yield Change(table, {doc_id: document})

    def _show(self, change: Change) -> None:
        table = self._tables.setdefault(change.table, {})
        for doc_id, document in change.documents.items():
            if document is None:
                table.pop(doc_id, None)
            else:
                table[doc_id] = document  # in its old place, if it was there: the order is that of insertion


class Edits(MutableMapping[str, Any]):
    """A table as an update sees it: what it touches is copied, what it changes is kept apart."""

    def __init__(self, live: Mapping[str, Mapping[str, Any]]) -> None:
        self._live = live
        self._touched: dict[str, Any] = {}  # None: removed

    def __getitem__(self, doc_id: str) -> Any:
        if doc_id not in self._touched:
            self._touched[doc_id] = copy.deepcopy(self._live[doc_id])
        if self._touched[doc_id] is None:
            raise KeyError(doc_id)
        return self._touched[doc_id]

    def __setitem__(self, doc_id: str, document: Any) -> None:
        self._touched[doc_id] = document

    def __delitem__(self, doc_id: str) -> None:
        self[doc_id]  # a KeyError for what is not there
        self._touched[doc_id] = None

    def __contains__(self, doc_id: object) -> bool:
        return self._touched[doc_id] is not None if doc_id in self._touched else doc_id in self._live  # type: ignore[index]

    def __iter__(self) -> Iterator[str]:
        yield from (doc_id for doc_id in self._live if doc_id in self)
        yield from (doc_id for doc_id in self._touched if doc_id not in self._live and doc_id in self)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def changed(self) -> dict[str, Any]:
        return {
            doc_id: copy.deepcopy(document)
            for doc_id, document in self._touched.items()
            if document != self._live.get(doc_id)
        }


class NoCache(dict[Any, Any]):
    """A query cache that keeps nothing: TinyDB's breaks with threads, and can keep what a write has outdated."""

    def __init__(self, capacity: int = 0) -> None:
        super().__init__()

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    set = __setitem__


class JournalTable(Table):
    """A table whose changes are one line of the journal each.

    fetch, change and discard are TinyDB's get, update and remove by id: typed for ids that are strings, and without a
    look at the other documents."""

    document_class = Document
    document_id_class = str  # type: ignore[assignment]
    query_cache_class = NoCache  # type: ignore[assignment]

    def __len__(self) -> int:
        return len(self._journal_storage.read().get(self.name, {}))

    def fetch(self, doc_id: str) -> Document | None:
        document = self.peek(doc_id)
        return None if document is None else Document(document, doc_id)

    def peek(self, doc_id: str) -> Mapping[str, Any] | None:
        """The document itself: for reading only, and without the cost of a copy."""
        return self._journal_storage.read().get(self.name, {}).get(doc_id)

    def change(self, doc_id: str, fields: Mapping[str, Any]) -> None:
        """Set these fields. Raises KeyError if there is no such document."""
        self._update_table(lambda table: table[doc_id].update(fields))

    def put(self, documents: Mapping[str, Mapping[str, Any]]) -> None:
        """Insert or replace documents, all of them in one change."""
        self._update_table(lambda table: table.update(documents))

    def discard(self, doc_id: str) -> None:
        """Remove a document, if it is there."""
        self._update_table(lambda table: table.pop(doc_id, None))

    def stored(self) -> Mapping[str, Mapping[str, Any]]:
        """The documents themselves, in the order of insertion: for reading only, in a map that is a copy."""
        return self._read_table()

    def _read_table(self) -> dict[str, Any]:
        # A copy of the map, made in one step of the interpreter, so that a reader needs no lock.
        return self._journal_storage.read().get(self.name, {}).copy()

    def _update_table(self, updater: Callable[[Any], None]) -> None:
        """The one way of every insert, update and remove."""
        storage = self._journal_storage
        with storage.lock:
            edits = Edits(storage.read().get(self.name, {}))
            updater(edits)
            changed = edits.changed()
            if changed:
                storage.commit(Change(self.name, changed))

    def _get_next_id(self) -> int:
        raise ValueError("Documents here have ids of their own: insert a jobs.store.Document.")

    @property
    def _journal_storage(self) -> JournalStorage:
        assert isinstance(self._storage, JournalStorage)
        return self._storage


class JournalDB(TinyDB):
    """TinyDB over one journal file. Raises JournalDamaged when it is opened, OSError when a write finds no room."""

    default_storage_class = JournalStorage
    table_class = JournalTable

    def __init__(self, path: Path, *, is_synced: bool = True) -> None:
        super().__init__(path, is_synced=is_synced)

    def named(self, name: str) -> JournalTable:
        table = self.table(name)
        assert isinstance(table, JournalTable)
        return table


class DataInUse(DataUnusable):
    """Another process owns the data directory."""


@contextmanager
def owning(folder: Path, *, is_server: bool = True) -> Iterator[None]:
    """Own a data directory, which one process at a time may; the system takes it back when that ends, however it ends.

    Two locks have to be free. One is on the file `lock`, which older servers know and every system has. It is no lock
    any more once somebody deletes the file, so the other is on the folder itself. is_server=False leaves no such file.
    Raises DataInUse, OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "lock"
    with ExitStack() as exits:
        is_free = _lock_folder(folder, exits)
        if is_free and (is_server or path.exists() or os.name != "posix"):
            lock = FileLock(path, timeout=0)
            try:
                exits.enter_context(lock)
            except Timeout:
                is_free = False
        if not is_free:
            raise DataInUse(
                f"Another process uses the data directory {folder}. Stop it first, or give this one a directory of "
                "its own."
            )
        yield


def _lock_folder(folder: Path, exits: ExitStack) -> bool:
    """Lock the folder itself until `exits` closes -> whether it was free."""
    if os.name != "posix":
        return True  # elsewhere a folder cannot be opened
    descriptor = os.open(folder, os.O_RDONLY)
    exits.callback(os.close, descriptor)
    with suppress(OSError):  # a network file system may lock files only
        return lock_descriptor(descriptor, blocking=False)
    return True


if __name__ == "__main__":
    from jobs.mend import main  # which imports this file: the command has this file's name

    sys.exit(main())
