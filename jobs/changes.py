"""Tells coroutines what threads have done: whoever follows a job waits here, and is woken when the job changes.

A follower that has gone, or is slow, costs its entry in a dictionary. Test: pytest tests/test_changes.py
"""

import asyncio
import contextlib
import threading
from collections import defaultdict
from collections.abc import Iterable

Waiter = tuple[asyncio.AbstractEventLoop, asyncio.Event]


class Changes:
    """The version of each subject (a job's id) that was told of and not forgotten, and who waits for the next one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._versions: dict[str, int] = {}
        self._num_forgotten = 0
        self._is_over = False
        self._waiting: defaultdict[str, set[Waiter]] = defaultdict(set)

    def version(self, subject: str) -> int:
        # What is unknown has another version after each forgetting: it may be what is forgotten since.
        return self._versions.get(subject, -self._num_forgotten)

    def tell(self, subject: str) -> None:
        """A subject has changed. Callable from any thread."""
        with self._lock:
            self._versions[subject] = self._versions.get(subject, 0) + 1
            waiting = self._waiting.pop(subject, set())
        _wake(waiting)

    def tell_all(self) -> None:
        """Wake whoever waits, and let nobody wait from now on: the server stops."""
        with self._lock:
            self._is_over = True
            subjects = list(self._waiting)
        for subject in subjects:
            self.tell(subject)

    def forget(self, subject: str) -> None:
        """A subject is gone. Whoever waits for it looks, and finds that."""
        with self._lock:
            self._versions.pop(subject, None)
            self._num_forgotten += 1
            waiting = self._waiting.pop(subject, set())
        _wake(waiting)

    async def wait(self, subject: str, seen_version: int, timeout_s: float) -> None:
        """Return when a subject is past the version seen, or after the timeout."""
        waiter = (asyncio.get_running_loop(), asyncio.Event())
        with self._lock:
            if self._is_over or self.version(subject) != seen_version:
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


def _wake(waiting: Iterable[Waiter]) -> None:
    for loop, event in waiting:
        with contextlib.suppress(RuntimeError):  # its loop has ended, and the follower with it
            loop.call_soon_threadsafe(event.set)
