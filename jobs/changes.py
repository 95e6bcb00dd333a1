"""Tells coroutines what threads have done: whoever follows a job waits here, and is woken when the job changes.

A follower that has gone, or is slow, costs its entry in a dictionary. Test: pytest tests/test_changes.py
"""

import asyncio
import contextlib
import threading
from collections import Counter, defaultdict


class Changes:
    """A version of each followed subject (a job's id), and who waits for the next one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._versions: Counter[str] = Counter()
        self._waiting: defaultdict[str, set[tuple[asyncio.AbstractEventLoop, asyncio.Event]]] = defaultdict(set)

    def version(self, subject: str) -> int:
        return self._versions[subject]

    def tell(self, subject: str) -> None:
        """A subject has changed. Callable from any thread."""
        with self._lock:
            self._versions[subject] += 1
            waiting = self._waiting.pop(subject, set())
        for loop, event in waiting:
            with contextlib.suppress(RuntimeError):  # its loop has ended, and the follower with it
                loop.call_soon_threadsafe(event.set)

    def tell_all(self) -> None:
        """Wake whoever waits for anything: the server stops."""
        for subject in list(self._waiting):
            self.tell(subject)

    def forget(self, subject: str) -> None:
        """A subject is gone. Whoever waits for it looks, and finds that."""
        self.tell(subject)
        with self._lock:
            self._versions.pop(subject, None)

    async def wait(self, subject: str, seen_version: int, timeout_s: float) -> None:
        """Return when a subject is past the version seen, or after the timeout."""
        waiter = (asyncio.get_running_loop(), asyncio.Event())
        with self._lock:
            if self._versions[subject] != seen_version:
                return
            self._waiting[subject].add(waiter)
        try:
            await asyncio.wait_for(waiter[1].wait(), timeout_s)
        except TimeoutError:
            pass
        finally:
            with self._lock:
                waiters = self._waiting.get(subject)
                if waiters is not None:
                    waiters.discard(waiter)
                    if not waiters:
                        del self._waiting[subject]
