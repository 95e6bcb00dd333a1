"""Threads wake coroutines: those that wait for a subject, at once, and nobody else; and nothing is kept of the gone."""

import asyncio
import threading
import time
from collections.abc import Callable

import pytest

from jobs.changes import Changes

LONG_S = 20.0  # what a test that fails would wait


async def until(is_so: Callable[[], bool]) -> None:
    for _ in range(10_000):
        if is_so():
            return
        await asyncio.sleep(0)
    raise AssertionError("it never came")


def in_thread(function: Callable[[], None]) -> None:
    thread = threading.Thread(target=function)
    thread.start()
    thread.join()


def assert_quick(started_s: float) -> None:
    assert time.monotonic() - started_s < LONG_S / 4


def test_a_thread_wakes_who_waits() -> None:
    changes, started_s = Changes(), time.monotonic()

    async def follow() -> None:
        waiting = asyncio.create_task(changes.wait("job_1", changes.version("job_1"), LONG_S))
        await until(lambda: bool(changes._waiting))
        in_thread(lambda: changes.tell("job_1"))
        await waiting

    asyncio.run(follow())
    assert_quick(started_s)
    assert not changes._waiting


def test_a_change_before_the_wait_is_not_missed() -> None:
    changes, started_s = Changes(), time.monotonic()
    seen = changes.version("job_1")
    changes.tell("job_1")

    asyncio.run(changes.wait("job_1", seen, LONG_S))
    assert_quick(started_s)


@pytest.mark.parametrize("num_tells", [0, 1, 3])
def test_a_job_that_was_deleted_before_the_wait_is_not_missed(num_tells: int) -> None:
    """Bug: a job that had never changed had version 0 before and after it was forgotten, and its follower waited."""
    changes, started_s = Changes(), time.monotonic()
    for _ in range(num_tells):
        changes.tell("job_1")
    seen = changes.version("job_1")
    changes.forget("job_1")

    asyncio.run(changes.wait("job_1", seen, LONG_S))
    assert_quick(started_s)


def test_without_a_change_it_waits_for_the_timeout() -> None:
    changes, started_s = Changes(), time.monotonic()
    changes.tell("job_2")
    asyncio.run(changes.wait("job_1", changes.version("job_1"), 0.05))

    assert time.monotonic() - started_s >= 0.05
    assert not changes._waiting


def test_a_change_wakes_nobody_who_waits_for_another() -> None:
    changes = Changes()

    async def follow() -> None:
        tasks = [asyncio.create_task(changes.wait(f"job_{i}", 0, LONG_S)) for i in range(3)]
        await until(lambda: len(changes._waiting) == 3)
        changes.tell("job_1")
        await tasks[1]
        assert [task.done() for task in tasks] == [False, True, False]
        changes.tell_all()
        await asyncio.gather(*tasks)

    asyncio.run(follow())


def test_one_change_wakes_all_who_wait_for_it_in_all_loops() -> None:
    changes, woken, ready = Changes(), [], threading.Barrier(5)

    async def follow() -> None:
        tasks = [asyncio.create_task(changes.wait("job_1", 0, LONG_S)) for _ in range(50)]
        await asyncio.sleep(0)
        ready.wait(LONG_S)
        await asyncio.gather(*tasks)
        woken.extend(tasks)

    threads = [threading.Thread(target=asyncio.run, args=(follow(),)) for _ in range(4)]
    for thread in threads:
        thread.start()
    ready.wait(LONG_S)
    assert len(changes._waiting["job_1"]) == 200
    started_s = time.monotonic()
    changes.tell("job_1")
    for thread in threads:
        thread.join()

    assert_quick(started_s)
    assert (len(woken), dict(changes._waiting)) == (200, {})


def test_a_follower_that_is_canceled_leaves_nothing_behind() -> None:
    changes = Changes()

    async def follow() -> None:
        gone, stays = (asyncio.create_task(changes.wait("job_1", 0, LONG_S)) for _ in range(2))
        await until(lambda: len(changes._waiting["job_1"]) == 2)
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        assert len(changes._waiting["job_1"]) == 1
        changes.tell("job_1")
        await stays

    asyncio.run(follow())
    assert not changes._waiting


def test_a_waiter_whose_loop_has_ended_harms_nobody() -> None:
    changes, loop = Changes(), asyncio.new_event_loop()
    orphan = changes.wait("job_1", 0, LONG_S)
    task = loop.create_task(orphan)
    loop.run_until_complete(until(lambda: bool(changes._waiting)))
    task.cancel()  # as at the end of asyncio.run, but for the turn of the loop in which the waiter would take notice
    loop.close()

    async def follow() -> None:
        waiting = asyncio.create_task(changes.wait("job_1", 0, LONG_S))
        await until(lambda: len(changes._waiting["job_1"]) == 2)
        changes.tell("job_1")
        await waiting

    started_s = time.monotonic()
    asyncio.run(follow())
    assert_quick(started_s)
    assert not changes._waiting
    with pytest.raises(RuntimeError, match="loop is closed"):
        orphan.throw(asyncio.CancelledError())
    task._log_destroy_pending = False  # type: ignore[attr-defined]


def test_what_is_forgotten_wakes_its_followers_and_leaves_nothing_behind() -> None:
    changes = Changes()

    async def follow() -> None:
        changes.tell("job_1")
        waiting = asyncio.create_task(changes.wait("job_1", changes.version("job_1"), LONG_S))
        await until(lambda: bool(changes._waiting))
        in_thread(lambda: changes.forget("job_1"))
        await waiting

    started_s = time.monotonic()
    asyncio.run(follow())
    assert_quick(started_s)
    assert (changes._versions, dict(changes._waiting)) == ({}, {})


def test_reading_versions_and_waiting_keep_nothing() -> None:
    changes = Changes()
    for i in range(100):
        changes.version(f"job_{i}")
        asyncio.run(changes.wait(f"job_{i}", changes.version(f"job_{i}"), 0.0))
        changes.forget(f"job_{i + 1}")

    assert (changes._versions, dict(changes._waiting)) == ({}, {})


def test_no_change_is_lost_between_many_threads_and_followers() -> None:
    """Each follower leaves when it has seen the last number that the threads wrote; a lost change would strand it."""
    changes, numbers = Changes(), {f"job_{i}": 0 for i in range(4)}

    async def follow(subject: str) -> None:
        while True:
            version = changes.version(subject)
            if numbers[subject] == 300:
                return
            started_s = time.monotonic()
            await changes.wait(subject, version, LONG_S)
            assert_quick(started_s)

    def write(subject: str) -> None:
        for number in range(1, 301):
            numbers[subject] = number
            changes.tell(subject)

    async def main() -> None:
        followers = [asyncio.create_task(follow(subject)) for subject in numbers for _ in range(5)]
        threads = [threading.Thread(target=write, args=(subject,)) for subject in numbers]
        for thread in threads:
            thread.start()
        await asyncio.gather(*followers)
        for thread in threads:
            thread.join()

    asyncio.run(main())
    assert not changes._waiting
