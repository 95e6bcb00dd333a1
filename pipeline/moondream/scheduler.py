"""Which sequence sits in which slot of the KV cache: first come, first served, but urgent ones before the others, and
a freed slot is refilled at once.

No torch: the scheduler moves names, the engine moves tensors. Sequences of one image share the keys and values of its
prefix (bos and image): the first one computes it, the others copy it from a slot that holds it, or find it in their
own. As sequences are admitted in order, an image's prefix is overwritten while one of its sequences waits only by an
urgent image; then that sequence computes it again.
"""

from collections import deque
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Generic, Literal, TypeVar

DEFAULT_SLOTS, MAX_SLOTS = 8, 1024
MAX_INSTANCES = 64

Item = TypeVar("Item")  # a sequence; the scheduler only compares it by identity


@dataclass(frozen=True)
class Admission(Generic[Item]):
    """A sequence that got a slot. `prefix` says where the keys and values of its image come from: "new" to be computed,
    "kept" in the slot already, "copy" from `source_slot`."""

    slot: int
    item: Item
    image: Hashable
    prefix: Literal["new", "kept", "copy"]
    source_slot: int | None = None


class Scheduler(Generic[Item]):
    def __init__(self, num_slots: int) -> None:
        assert num_slots >= 1
        self.busy: dict[int, Item] = {}
        self._num_slots = num_slots
        self._urgent: deque[tuple[Hashable, Item]] = deque()  # they go before those that wait otherwise
        self._waiting: deque[tuple[Hashable, Item]] = deque()
        self._prefix_of: dict[int, Hashable] = {}  # slot -> the image whose prefix it holds

    @property
    def num_waiting(self) -> int:
        return len(self._urgent) + len(self._waiting)

    @property
    def num_active_slots(self) -> int:
        """The slots [0, n) that a decode step must cover to reach every busy one."""
        return max(self.busy, default=-1) + 1

    def add(self, image: Hashable, items: Iterable[Item], *, is_urgent: bool = False) -> None:
        """Queue the sequences of one image."""
        (self._urgent if is_urgent else self._waiting).extend((image, item) for item in items)

    def next_images(self, limit: int) -> list[Hashable]:
        """The first `limit` images that wait, in order: those worth encoding together."""
        images: dict[Hashable, None] = {}
        for image, _ in chain(self._urgent, self._waiting):
            if image not in images and len(images) == limit:
                break
            images[image] = None
        return list(images)

    def admit(self, *, only_urgent: bool = False) -> list[Admission[Item]]:
        """Fill the free slots, lowest first, but a slot that holds the image's prefix before all."""
        admissions = []
        while len(self.busy) < self._num_slots:
            line = self._urgent if self._urgent or only_urgent else self._waiting
            if not line:
                break
            image, item = line.popleft()
            admission = self._place(image, item)
            self.busy[admission.slot] = item
            self._prefix_of[admission.slot] = image
            admissions.append(admission)
        return admissions

    def finish(self, slots: Sequence[int]) -> None:
        """Free slots. Their prefixes stay until another image's is written."""
        for slot in slots:
            del self.busy[slot]

    def drop(self, image: Hashable) -> list[Item]:
        """Forget an image, wherever its sequences are, and return them."""
        dropped = [item for owner, item in chain(self._urgent, self._waiting) if owner == image]
        self._urgent, self._waiting = (
            deque((owner, item) for owner, item in line if owner != image) for line in (self._urgent, self._waiting)
        )
        held = [slot for slot, owner in self._prefix_of.items() if owner == image]
        for slot in held:
            del self._prefix_of[slot]
            if slot in self.busy:
                dropped.append(self.busy.pop(slot))
        return dropped

    def _place(self, image: Hashable, item: Item) -> Admission[Item]:
        free = [slot for slot in range(self._num_slots) if slot not in self.busy]
        holders = [slot for slot, owner in self._prefix_of.items() if owner == image]
        kept = next((slot for slot in free if slot in holders), None)
        if kept is not None:
            return Admission(kept, item, image, "kept")
        if holders:
            return Admission(free[0], item, image, "copy", source_slot=holders[0])
        return Admission(free[0], item, image, "new")
