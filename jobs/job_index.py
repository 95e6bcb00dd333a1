"""What the job store looks up without a walk over all records. Derived from them, in memory only.

Written under the store's lock; read without, so what a change does not touch stays in place while it is made.
"""

from bisect import bisect_left, insort
from collections import Counter, defaultdict

import orjson

from jobs.record import Record

FOLDER_BYTES = 8192
Group = tuple[str | None, str | None]  # the jobs of an owner (None: of all) in a status (None: in any)


class JobIndex:
    def __init__(self) -> None:
        self.last_number = 0
        self.queue: dict[str, int] = {}  # waiting jobs: their queue numbers
        self.by_idempotency_key: dict[str, str] = {}
        self.with_webhooks: set[str] = set()
        self.record_bytes = 0  # about what records and their folders take
        self._ids: dict[int, str] = {}  # by the jobs' numbers
        self._numbers: defaultdict[Group, list[int]] = defaultdict(list)  # sorted

    def add(self, record: Record) -> None:
        self._ids[record["number"]] = record["job_id"]
        self.record_bytes += _num_bytes(record)
        for group in _groups(record):
            insort(self._numbers[group], record["number"])
        self._add_state(record)

    def remove(self, record: Record) -> None:
        for group in _groups(record):
            self._take_out(group, record["number"])
        del self._ids[record["number"]]
        self.record_bytes -= _num_bytes(record)
        self._remove_state(record)

    def replace(self, before: Record, record: Record) -> None:
        """A record has changed, but for its number and owner."""
        for group in _groups(before) - _groups(record):
            self._take_out(group, record["number"])
        for group in _groups(record) - _groups(before):
            insort(self._numbers[group], record["number"])
        self._remove_state(before)
        self._add_state(record)

    def count(self, owner: str | None = None, status: str | None = None) -> int:
        return len(self._numbers.get((owner, status), ()))

    def newest(self, owner: str | None, status: str | None, before: int | None, limit: int) -> list[str]:
        """The ids of the last `limit` jobs of a group with numbers below `before`, newest first."""
        numbers = self._numbers.get((owner, status), [])
        end = len(numbers) if before is None else bisect_left(numbers, before)
        found = [self._ids.get(number) for number in reversed(numbers[max(0, end - limit) : end])]
        return [job_id for job_id in found if job_id is not None]

    def counts(self) -> Counter[str]:
        """How many jobs are in each status."""
        groups = self._numbers.copy().items()
        return Counter({status: len(numbers) for (owner, status), numbers in groups if owner is None and status})

    def next_in_queue(self) -> str:
        return min(self.queue, key=self.queue.__getitem__)

    def queue_position(self, job_id: str) -> int | None:
        """How many jobs run before this one; None if it does not wait."""
        queue = self.queue.copy()
        return None if job_id not in queue else sum(number < queue[job_id] for number in queue.values())

    def _take_out(self, group: Group, number: int) -> None:
        numbers = self._numbers[group]
        del numbers[bisect_left(numbers, number)]
        if not numbers:
            del self._numbers[group]

    def _add_state(self, record: Record) -> None:
        job_id = record["job_id"]
        self.last_number = max(self.last_number, record["number"], record["queue_number"])
        if record["status"] == "submitted":
            self.queue[job_id] = record["queue_number"]
        if record["idempotency_key"]:
            self.by_idempotency_key[record["idempotency_key"]] = job_id
        if record["webhooks"]:
            self.with_webhooks.add(job_id)

    def _remove_state(self, record: Record) -> None:
        self.queue.pop(record["job_id"], None)
        self.by_idempotency_key.pop(record["idempotency_key"] or "", None)
        self.with_webhooks.discard(record["job_id"])


def _num_bytes(record: Record) -> int:
    """Of the part that callers choose, which a change never touches, and of two folders."""
    return FOLDER_BYTES + 2 * len(orjson.dumps(record["request"]))


def _groups(record: Record) -> set[Group]:
    return {(owner, status) for owner in (record["owner"], None) for status in (record["status"], None)}
