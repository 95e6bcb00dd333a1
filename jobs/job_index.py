"""What the job store looks up without a walk over all records. Derived from them, in memory only; not locked."""

from collections import Counter

from jobs.record import Record


class JobIndex:
    def __init__(self) -> None:
        self.last_number = 0
        self.queue: dict[str, int] = {}  # waiting jobs: their queue numbers
        self.by_idempotency_key: dict[str, str] = {}
        self.with_webhooks: set[str] = set()
        self._counts: Counter[tuple[str, str]] = Counter()  # by owner and status

    def add(self, record: Record) -> None:
        job_id, status = record["job_id"], record["status"]
        self.last_number = max(self.last_number, record["number"], record["queue_number"])
        self._counts[record["owner"], status] += 1
        if status == "submitted":
            self.queue[job_id] = record["queue_number"]
        if record["idempotency_key"]:
            self.by_idempotency_key[record["idempotency_key"]] = job_id
        if record["webhooks"]:
            self.with_webhooks.add(job_id)

    def remove(self, record: Record) -> None:
        key = (record["owner"], record["status"])
        self._counts[key] -= 1
        if not self._counts[key]:
            del self._counts[key]
        self.queue.pop(record["job_id"], None)
        self.by_idempotency_key.pop(record["idempotency_key"] or "", None)
        self.with_webhooks.discard(record["job_id"])

    def count(self, owner: str | None = None, status: str | None = None) -> int:
        """How many jobs an owner (None: anybody) has in a status (None: any)."""
        counts = self._counts.copy().items()
        return sum(number for (of, has), number in counts if owner in (None, of) and status in (None, has))

    def counts(self) -> Counter[str]:
        """How many jobs are in each status."""
        counts: Counter[str] = Counter()
        for (_, status), number in self._counts.copy().items():
            counts[status] += number
        return counts

    def next_in_queue(self) -> str:
        return min(self.queue, key=self.queue.__getitem__)

    def queue_position(self, job_id: str) -> int | None:
        """How many jobs run before this one; None if it does not wait."""
        queue = self.queue.copy()
        return None if job_id not in queue else sum(number < queue[job_id] for number in queue.values())
