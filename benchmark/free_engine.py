"""An engine that costs nothing: what is left is the work around the model. For benchmark/cluster.py.

Test: pytest tests/test_benchmark_cluster.py
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np

from pipeline.cluster_host import EngineHost, Loaded, Wanted
from pipeline.moondream.answer import Answer, Completed
from pipeline.moondream.prompts import Task
from pipeline.results import ModelName

NUM_SLOTS = 8
MODEL = ModelName("free", None, "none", "none")
TEXT = "A sentence of the length that answers have, about people who cross a street, and the light on the houses."


class FreeEngine:
    """Used like an Engine; all frames have the same answer."""

    num_slots, place, is_for_urgent_only = NUM_SLOTS, None, False
    prepare: Callable[[np.ndarray], Any] | None = None

    def __init__(self) -> None:
        self._in_flight: dict[Hashable, None] = {}

    @property
    def num_in_flight(self) -> int:
        return len(self._in_flight)

    @property
    def num_wanted(self) -> int:
        return self.num_slots - self.num_in_flight

    def submit(
        self, key: Hashable, image: np.ndarray, tasks: Sequence[Task], frame_idx: int = 0, *, is_urgent: bool = False
    ) -> None:
        assert image.ndim == 3 and tasks
        self._in_flight[key] = None

    def cancel(self, key: Hashable) -> None:
        self._in_flight.pop(key, None)

    def step(self) -> list[Completed]:
        done, self._in_flight = list(self._in_flight), {}
        return [Completed(key, (Answer(TEXT, "length", 24, 0.0, 0.0, 0.0, ()),)) for key in done]


class FreeHost(EngineHost):
    """The same in an actor, behind all that lies between."""

    def load(self, wanted: Wanted) -> Loaded:
        self._engine = FreeEngine()
        return Loaded(MODEL, NUM_SLOTS, 2048)

    def positions_needed(self, task: Task) -> int:
        return 0
