"""The frame results of one job, in that job's own database; and which of these databases are open.

A result's document id is its frame_idx, so a frame has one result. `seq` counts the order of storing from 1: a result
that replaces another (a retried frame) gets a new one, so whoever reads "after seq" sees it again.
Knows nothing of job records. Test: pytest tests/test_frame_store.py
"""

import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jobs.store import JournalDB

# What is told of a job whose database cannot be opened.
FILES_MISSING = "The folder of this job is missing on the server's disk. Delete the job, and submit it again."
RESULTS_DAMAGED = (
    "The stored results of this job are damaged. The server's log says where; its operator can move the damaged lines "
    "aside, with python -m jobs.store repair. For what they held, submit a new job."
)
NUM_KEPT_OPEN = 8  # databases that nobody reads at the moment: pages of one job come one after the other

Result = Mapping[str, Any]  # a frame result of the API, and its seq; for reading only


class FrameStore:
    """An open database of frame results. Many threads may read, one writes."""

    def __init__(self, path: Path) -> None:
        """Raises JournalDamaged, OSError."""
        self._db = JournalDB(path)
        self.is_closed = False
        self._table = self._db.named("frames")
        mark = self._db.named("marks").peek("seq")
        self._first_seq: int = mark["last"] if mark else 0  # of results that were cleared
        self._order = sorted((result["seq"], doc_id) for doc_id, result in self._table.stored().items())
        self.num_failed = self.num_reused = 0
        self._count(self._table.stored().values(), 1)

    def __len__(self) -> int:
        return len(self._table)

    @property
    def last_seq(self) -> int:
        order = self._order
        return order[-1][0] if order else self._first_seq

    def counts(self) -> dict[str, int]:
        """What a record keeps of them."""
        return {
            "num_frames": len(self),
            "num_frames_failed": self.num_failed,
            "num_frames_reused": self.num_reused,
            "last_seq": self.last_seq,
        }

    def append(self, results: Sequence[Result]) -> None:
        """Store results in one change, replacing those of the same frames. Raises OSError, and none is stored then."""
        numbered = {str(r["frame_idx"]): {**r, "seq": seq} for seq, r in enumerate(results, self.last_seq + 1)}
        replaced = [result for doc_id in numbered if (result := self._table.peek(doc_id))]
        self._table.put(numbered)
        self._count(replaced, -1)
        self._count(numbered.values(), 1)
        self._order.extend((result["seq"], doc_id) for doc_id, result in numbered.items())

    def get(self, frame_idx: int) -> Result | None:
        """A frame's result, if it has one."""
        return self._table.peek(str(frame_idx))

    def after(self, seq: int, limit: int) -> list[Result]:
        """The first `limit` results stored after seq, in the order of storing."""
        found: list[Result] = []
        order = self._order  # another thread may clear the store
        for index in range(bisect_right(order, seq, key=lambda entry: entry[0]), len(order)):
            number, doc_id = order[index]
            result = self._table.peek(doc_id)
            if result is not None and result["seq"] == number:  # else it was replaced since
                found.append(result)
                if len(found) == limit:
                    break
        return found

    def results(self) -> list[Result]:
        """All results, by frame_idx."""
        return sorted(self._table.stored().values(), key=lambda result: result["frame_idx"])

    def clear(self) -> None:
        """Remove all results. What is stored next has later seqs: a reader's place stays good."""
        self._first_seq = self.last_seq
        self._db.storage.write({"marks": {"seq": {"last": self._first_seq}}})
        self._order = []
        self.num_failed = self.num_reused = 0

    def close(self) -> None:
        if not self.is_closed:  # a second time would close whatever has the file descriptor by then
            self.is_closed = True
            self._db.close()

    def _count(self, results: Iterable[Result], sign: int) -> None:
        for result in results:
            self.num_failed += sign * (result["status"] == "error")
            self.num_reused += sign * (result.get("reused_from_frame_idx") is not None)


class FrameStores:
    """The databases of all jobs, each opened once, shared by all who use it, and closed some time after the last."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._used: dict[Path, tuple[FrameStore, int]] = {}  # and by how many
        self._idle: OrderedDict[Path, FrameStore] = OrderedDict()

    @contextmanager
    def opened(self, path: Path) -> Iterator[FrameStore]:
        """Raises JournalDamaged, OSError."""
        with self._lock:
            if path in self._used:
                store, num_users = self._used[path]
            else:
                store, num_users = (self._idle.pop(path) if path in self._idle else FrameStore(path)), 0
            self._used[path] = (store, num_users + 1)
        try:
            yield store
        finally:
            with self._lock:
                store, num_users = self._used.pop(path)
                if num_users > 1:
                    self._used[path] = (store, num_users - 1)
                elif path.exists() and not store.is_closed:
                    self._idle[path] = store
                    while len(self._idle) > NUM_KEPT_OPEN:
                        self._idle.popitem(last=False)[1].close()
                else:  # its job was deleted meanwhile
                    store.close()

    def forget(self, path: Path) -> None:
        """Close a database before it is deleted, as soon as nobody uses it."""
        with self._lock:
            if path in self._idle:
                self._idle.pop(path).close()

    def close(self) -> None:
        with self._lock:
            for store in [*self._idle.values(), *(store for store, _ in self._used.values())]:
                store.close()
            self._idle.clear()
