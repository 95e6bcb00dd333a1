"""Images and questions that the tests of the engine share."""

from collections.abc import Hashable

import numpy as np

from pipeline.moondream.answer import Completed
from pipeline.moondream.engine import Engine
from pipeline.moondream.prompts import Query, Task

RNG = np.random.default_rng(0)
SIZES = [(100, 100), (200, 150), (120, 300), (300, 200), (90, 400), (112, 112), (60, 50), (170, 170)]
IMAGES = [RNG.integers(0, 256, (*size, 3), dtype=np.uint8) for size in SIZES]  # six of one crop, two of more


def finish(engine: Engine) -> dict[Hashable, Completed]:
    """Step until nothing is in flight."""
    completed: dict[Hashable, Completed] = {}
    while engine.num_in_flight:
        for done in engine.step():
            assert done.key not in completed
            completed[done.key] = done
    return completed


def answers_of(num_tokens: int) -> list[Task]:
    """One question whose answer, by endless_checkpoint, has that many tokens."""
    return [Query("?", max_tokens=num_tokens)]
