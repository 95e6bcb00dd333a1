"""The job store at random, against a plain dictionary, and with many threads."""

import random
import threading
from typing import Any

import pytest
from job_house import HOOK, OUTCOMES, STATUSES, House, assert_consistent, claimed, frame, records

from jobs.record import FINISHED
from pipeline.errors import IdempotencyMismatch, JobError, JobFinished, QueueFull


class Walk:
    """What a plain dictionary says that the store must do."""

    def __init__(self, house: House, rng: random.Random) -> None:
        self.house, self.rng = house, rng
        self.jobs: dict[str, dict[str, Any]] = {}  # by id, in the order of submission
        self.gone = "job_0"  # the last one that was deleted
        self.turn = 0

    def step(self) -> None:
        job_id = self.rng.choice([*self.jobs, self.gone])
        names = ("add", "add", "claim", "end", "cancel", "retry", "delete", "purge", "hook", "reopen")
        name = self.rng.choices(names, (3, 3, 5, 5, 2, 3, 1, 1, 3, 0.2))[0]
        if name in OUTCOMES:
            self.change(name, job_id)
        else:
            getattr(self, name)()
        self.house.now_s += 1

    def set(self, job_id: str, status: str) -> None:
        job, self.turn = self.jobs[job_id], self.turn + 1
        if status == "submitted" and job["status"] in FINISHED:
            job["turn"] = self.turn
        if status in FINISHED and job["status"] not in FINISHED:
            job.update(ended_at=self.house.now_s, num_hooks=job["num_hooks"] + job["has_hook"])
        job.update(status=status, is_canceling=False)

    def num_waiting(self, owner: str | None = None) -> int:
        return sum(j["status"] == "submitted" and owner in (None, j["owner"]) for j in self.jobs.values())

    def is_full(self, owner: str) -> bool:
        return self.num_waiting() >= 12 or self.num_waiting(owner) >= 6

    def add(self) -> None:
        owner, key = self.rng.choice("abc"), self.rng.choice([None, "k", "l", "m"])
        asked: dict[str, Any] = {"webhook_url": HOOK} if self.rng.random() < 0.5 else {}
        known = next((i for i, job in self.jobs.items() if key and job["key"] == key), None)
        try:
            job_id = self.house.add(owner, key=key, **asked)
        except QueueFull:
            assert not known and self.is_full(owner)
        except IdempotencyMismatch:
            assert known and self.jobs[known]["has_hook"] != bool(asked)
        else:
            assert job_id == known or not (known or self.is_full(owner))
            fresh = {"owner": owner, "key": key, "num_hooks": 0, "frames": set(), "status": "submitted"}
            self.jobs.setdefault(job_id, {**fresh, "has_hook": bool(asked), "turn": self.turn, "is_canceling": False})
            self.turn += 1

    def claim(self) -> None:
        waiting = [i for i, job in self.jobs.items() if job["status"] == "submitted"]
        record = self.house.store.claim(0)
        assert (record and record["job_id"]) == min(waiting, key=lambda i: self.jobs[i]["turn"], default=None)
        if record:
            self.jobs[record["job_id"]]["status"] = "processing"

    def end(self) -> None:
        running = [i for i, job in self.jobs.items() if job["status"] == "processing"]
        if running:
            job_id, status = self.rng.choice(running), self.rng.choice((*FINISHED, "submitted"))
            frame_idx = self.rng.randrange(5)
            with self.house.store.frames(job_id) as frames:
                frames.append([frame(frame_idx)])
            self.jobs[job_id]["frames"].add(frame_idx)
            self.house.store.end(job_id, status)
            is_canceled = self.jobs[job_id]["is_canceling"]
            self.set(job_id, "canceled" if is_canceled else status)

    def change(self, name: str, job_id: str) -> None:
        status = self.jobs[job_id]["status"] if job_id in self.jobs else "deleted"
        outcome = OUTCOMES[name][[*STATUSES, "deleted"].index(status)]
        if name == "retry" and outcome == "submitted" and self.is_full(self.jobs[job_id]["owner"]):
            outcome = QueueFull
        try:
            getattr(self.house.store, name)(job_id)
        except JobError as error:
            assert type(error) is outcome
        else:
            self.forget(job_id) if outcome == "deleted" else self.set(job_id, str(outcome))
            if outcome == "processing":
                self.jobs[job_id]["is_canceling"] = True

    def forget(self, job_id: str) -> None:
        del self.jobs[job_id]
        self.gone = job_id

    def purge(self) -> None:
        is_old = {
            i: job["status"] in FINISHED and job["ended_at"] <= self.house.now_s - 150 for i, job in self.jobs.items()
        }
        assert set(self.house.store.purge()) == {job_id for job_id in is_old if is_old[job_id]}
        for job_id in [job_id for job_id in is_old if is_old[job_id]]:
            self.forget(job_id)

    def hook(self) -> None:
        if outgoing := self.house.store.outgoing():
            item, is_done = self.rng.choice(outgoing), self.rng.random() < 0.7
            self.house.store.webhook_tried(item, next_try_at=None if is_done else 1.0, outcome="")
            self.jobs[item.job_id]["num_hooks"] -= is_done

    def reopen(self) -> None:
        self.house.reopen()
        running = [i for i, job in self.jobs.items() if job["status"] == "processing"]
        assert self.house.store.recover() == len(running)
        for job_id in running:
            self.set(job_id, "canceled" if self.jobs[job_id]["is_canceling"] else "submitted")

    def compare(self) -> None:
        store = self.house.store
        assert_consistent(store)
        assert [r["job_id"] for r in records(store)] == [*self.jobs][::-1]
        outgoing = [item.job_id for item in store.outgoing()]
        for record, job in zip(records(store), reversed(self.jobs.values()), strict=True):
            assert (record["status"], record["owner"]) == (job["status"], job["owner"])
            assert record["is_cancel_requested"] == job["is_canceling"]
            assert outgoing.count(record["job_id"]) == len(record["webhooks"]) == job["num_hooks"]
            with store.frames(record["job_id"]) as frames:
                assert {result["frame_idx"] for result in frames.results()} == job["frames"]
            assert record["status"] == "processing" or record["num_frames"] == len(job["frames"])
        for owner in (None, *"abc"):
            assert store.page(owner, "submitted", None, 1).total_count == self.num_waiting(owner)


@pytest.mark.parametrize("seed", range(2))
def test_random_operations_do_what_a_dictionary_says(house: House, quick: None, seed: int) -> None:
    house.reopen(max_queued_jobs=12, max_queued_jobs_per_owner=6, retention_s=150)
    walk = Walk(house, random.Random(seed))
    for step in range(1500):
        walk.step()
        if step % 30 == 0:
            walk.compare()
    for _ in house.now_and_later():
        walk.compare()


def test_threads_lose_and_double_nothing(house: House, quick: None) -> None:
    house.reopen(max_queued_jobs=1000, max_queued_jobs_per_owner=1000)
    added: list[str] = []
    runs: list[str] = []
    stopped: list[str] = []

    def work(seed: int) -> None:
        rng, store, own = random.Random(seed), house.store, []
        for _ in range(25):
            own.append(house.add(rng.choice("ab")))
            added.append(own[-1])
            if record := store.claim(0):
                runs.append(record["job_id"])
                store.update(record["job_id"], stage="describing")
                store.end(record["job_id"], "completed")
            try:
                job_id = rng.choice(own)
                record = store.cancel(job_id)
                if record["status"] == "canceled" and record["processing_started_at"] is None:
                    stopped.append(job_id)
            except JobFinished:
                pass
            assert min(store.index.counts().values()) > 0
            store.page("a", "completed", None, 5)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    runs += claimed(house.store)

    assert len(added) == len(set(added)) == 200
    assert len(runs) == len(set(runs))  # each was claimed once
    assert set(runs).isdisjoint(stopped)
    for store in house.now_and_later():
        assert {record["job_id"] for record in records(store)} == set(added) == set(runs) | set(stopped)
        assert_consistent(store)
