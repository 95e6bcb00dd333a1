"""Ages are believed only while the clock goes as it did."""

import logging
from itertools import pairwise

import pytest

from jobs.clock import ClockWatch, steady_s


class Clocks:
    now_s, steady_s = 1_000_000.0, 50.0

    def watch(self) -> ClockWatch:
        return ClockWatch(lambda: self.now_s, lambda: self.steady_s)


def test_a_clock_that_goes_is_steady_also_when_it_is_corrected_a_little() -> None:
    clocks = Clocks()
    watch = clocks.watch()
    clocks.now_s += 86_400 + 30
    clocks.steady_s += 86_400

    assert watch.is_steady()


@pytest.mark.parametrize("jump_s", [365 * 86_400.0, -86_400.0])
def test_a_clock_that_was_set_is_not_and_the_log_is_told_once(jump_s: float, caplog: pytest.LogCaptureFixture) -> None:
    clocks = Clocks()
    watch = clocks.watch()
    clocks.now_s += jump_s
    with caplog.at_level(logging.WARNING):
        assert not watch.is_steady() and not watch.is_steady()

    (told,) = caplog.messages
    assert "deletes nothing by age" in told
    clocks.now_s -= jump_s
    assert watch.is_steady()


def test_the_steady_clock_goes_forward() -> None:
    assert all(earlier <= later for earlier, later in pairwise(steady_s() for _ in range(100)))
