"""What came of an attack, and how a module reports it."""

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Outcome:
    """Whether the server held, and the measured figures in a few words: "bob's upload removed 0 of alice's 5 jobs"."""

    is_held: bool
    figures: str


def report(point: str, title: str, attack: Callable[[], Outcome]) -> int:
    """Run one attack, print its line, and return the exit code of the program: 0 if the server held."""
    started_s = time.monotonic()
    outcome = attack()
    verdict = "held" if outcome.is_held else "BROKEN"
    print(f"{verdict}: {point} {title}: {outcome.figures} ({time.monotonic() - started_s:.0f} s)", flush=True)
    return 0 if outcome.is_held else 1
