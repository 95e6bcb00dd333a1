"""Answers that were given before, on disk: the same picture, asked the same thing of the same model, answers at once.

A cache may be lost, so nothing waits for the disk, and a damaged file is thrown away. What has not been used for
longest makes room. An answer is there for its owner alone: how fast answers come tells nobody what others have asked.
It is forgotten with the job that it was given in. Test: pytest tests/test_answer_cache.py
"""

import hashlib
import logging
import sqlite3
import threading
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.moondream.prompts import Caption, Query
from pipeline.results import ModelName

SCHEMA = """
PRAGMA auto_vacuum = FULL;
PRAGMA journal_mode = WAL;
PRAGMA synchronous = OFF;
CREATE TABLE IF NOT EXISTS answers (
    key BLOB PRIMARY KEY, text TEXT NOT NULL, job_id TEXT NOT NULL, used_at REAL NOT NULL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS by_job ON answers (job_id);
CREATE INDEX IF NOT EXISTS by_use ON answers (used_at);
"""
PUT_PER_LOOK = 1000  # answers that are put in between two looks at the size
SHARE_REMOVED = 0.1  # at a time, when it is full

logger = logging.getLogger(__name__)


def answer_key(image: NDArray[np.uint8], task: Query | Caption, model: ModelName, owner: str) -> bytes:
    """What an answer depends on, and whose it is. The image is RGB uint8 (H, W, 3), C-contiguous."""
    digest = hashlib.blake2b(digest_size=24)
    digest.update(repr((owner, task, model.id, model.revision, model.dtype, image.shape)).encode(errors="replace"))
    digest.update(image.data)
    return digest.digest()


class AnswerCache:
    """Used from many threads. What goes wrong with it is in the log, and no answer is found."""

    def __init__(self, path: Path, max_bytes: int) -> None:
        self._path, self._max_bytes = path, max_bytes
        self._lock = threading.Lock()
        self._num_put = 0
        self._db: sqlite3.Connection | None = None
        try:
            self._db = self._open()
        except sqlite3.Error as error:
            logger.warning("The cache of answers starts anew: %s", error)
            try:
                self._remove()
                self._db = self._open()
            except (OSError, sqlite3.Error) as error:
                what = "There is no cache of answers, as %s cannot be used: %s. To have one, move it away and restart."
                logger.warning(what, path, error)

    def get(self, key: bytes) -> str | None:
        found = self._do("UPDATE answers SET used_at = ? WHERE key = ? RETURNING text", time.time(), key)
        return found[0][0] if found else None

    def put(self, key: bytes, text: str, job_id: str) -> None:
        self._do("INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?)", key, text, job_id, time.time())
        self._num_put += 1
        if self._num_put % PUT_PER_LOOK == 0:
            self.shrink()

    def forget(self, job_id: str) -> None:
        self._do("DELETE FROM answers WHERE job_id = ?", job_id)

    def shrink(self) -> None:
        """Remove what was not used for longest while too much is kept."""
        while self.num_bytes > self._max_bytes:
            ((count,),) = self._do("SELECT count(*) FROM answers") or [(0,)]
            if not count:
                return
            oldest = "SELECT key FROM answers ORDER BY used_at LIMIT ?"
            self._do(f"DELETE FROM answers WHERE key IN ({oldest})", max(1, int(count * SHARE_REMOVED)))

    @property
    def num_bytes(self) -> int:
        found = self._do("SELECT page_count * page_size FROM pragma_page_count(), pragma_page_size()")
        return found[0][0] if found else 0

    def close(self) -> None:
        with self._lock:
            if self._db:
                self._db.close()
                self._db = None

    def _open(self) -> sqlite3.Connection:
        db = sqlite3.connect(self._path, check_same_thread=False, isolation_level=None)
        try:
            db.executescript(SCHEMA)
            if db.execute("PRAGMA quick_check").fetchone() != ("ok",):
                raise sqlite3.DatabaseError("it is damaged")
            db.execute("SELECT key, text, job_id, used_at FROM answers LIMIT 0")  # or it is another program's
        except sqlite3.Error:
            db.close()
            raise
        return db

    def _remove(self) -> None:
        for suffix in ("", "-wal", "-shm"):
            self._path.with_name(self._path.name + suffix).unlink(missing_ok=True)

    def _do(self, statement: str, *values: object) -> list[tuple]:
        with self._lock:
            if self._db is None:
                return []
            try:
                return self._db.execute(statement, values).fetchall()
            except sqlite3.Error as error:
                logger.warning("The cache of answers: %s", error)
                return []
