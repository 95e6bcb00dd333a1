"""Whether the system's clock goes as it did when the server started, so that ages can be believed.

A clock that is set a year forward makes every job too old. Measured against a clock that nobody can set, and that goes
on while the machine sleeps (Linux; elsewhere a sleep counts as a jump). Test: pytest tests/test_clock.py
"""

import logging
import time
from collections.abc import Callable

MAX_DRIFT_S = 3600.0  # what time servers correct step by step stays far below

logger = logging.getLogger(__name__)


def steady_s() -> float:
    """Seconds since some moment, by a clock that nobody can set."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


class ClockWatch:
    def __init__(
        self, clock: Callable[[], float] = lambda: time.time(), steady: Callable[[], float] = steady_s
    ) -> None:
        """clock tells Unix seconds."""
        self._clock, self._steady, self._was_set = clock, steady, False
        self._offset_s = clock() - steady()

    def is_steady(self) -> bool:
        """False while the clock is off by more than MAX_DRIFT_S from where it would be; the log is told once."""
        drift_s = self._clock() - self._steady() - self._offset_s
        was_set, self._was_set = self._was_set, abs(drift_s) > MAX_DRIFT_S
        if self._was_set and not was_set:
            logger.warning(
                "The system's clock was set by %+.0f s: the server deletes nothing by age until that is undone, or the "
                "server is started again",
                drift_s,
            )
        return not self._was_set
