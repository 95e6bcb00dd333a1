"""Where the engines of a pool are that are elsewhere, and how many frames each node describes.

Test: pytest tests/test_cluster.py
"""

import threading
import time
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass

RATE_S = 10.0  # that frames per second are counted over


@dataclass(frozen=True)
class Place:
    """Of one engine."""

    node: str
    num_gpus: float  # a part of one, where several engines share it


@dataclass(frozen=True)
class Node:
    """What works on a node now, and the frames it has described: in all, and per second over the last RATE_S."""

    num_instances: int
    num_gpus: float
    num_frames: int
    frames_per_second: float


class NodeTally:
    """Frames described, by node. May be used from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_frames: Counter[str] = Counter()
        self._recent: deque[tuple[float, str]] = deque()

    def count(self, node: str) -> None:
        with self._lock:
            self._num_frames[node] += 1
            self._recent.append((time.monotonic(), node))
            self._forget()

    def nodes(self, working: Iterable[Place]) -> dict[str, Node]:
        """By name, in its order. working: the places of all engines that work."""
        instances: Counter[str] = Counter()
        gpus: dict[str, float] = {}
        for place in working:
            instances[place.node] += 1
            gpus[place.node] = gpus.get(place.node, 0.0) + place.num_gpus
        with self._lock:
            self._forget()
            frames, recent = self._num_frames.copy(), Counter(node for _, node in self._recent)
        return {
            node: Node(instances[node], round(gpus.get(node, 0.0), 3), frames[node], recent[node] / RATE_S)
            for node in sorted({*frames, *instances})
        }

    def _forget(self) -> None:
        while self._recent and self._recent[0][0] < time.monotonic() - RATE_S:
            self._recent.popleft()
