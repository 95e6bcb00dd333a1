"""Engines that raise, cannot be replaced, or hang: no frame is lost, and one that kills engines ends as an error."""

import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest
from pool_watch import QUERY, Watch, alone_with_an_engine, describe, frames, instance_threads, patience, told
from serving import wait_until

from pipeline import pool as pool_module
from pipeline.describe import LOOKAHEAD
from pipeline.errors import OutOfMemory
from pipeline.moondream.checkpoint import Checkpoint
from pipeline.moondream.engine import Engine
from pipeline.moondream.prompts import Query
from pipeline.pool import PROOF_IDX, Pool
from pipeline.results import FrameResult
from pipeline.sampling import Frame


@pytest.fixture
def watch(demo: Checkpoint) -> Watch:
    return Watch(demo)


@pytest.fixture
def pool(watch: Watch) -> Iterator[Pool]:
    with closing(Pool(watch.make_engine)) as pool:
        yield pool
        watch.may_go_on.set()


def test_a_failed_engine_is_gone_before_another_is_made(watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two caches may not fit the device."""
    monkeypatch.setattr(pool_module.logger, "disabled", True)  # pytest keeps the records, and they hold the engine
    old_ones: list[Engine | None] = []

    def make_engine() -> Engine:
        old_ones.extend(engine() for engine in watch.engines)
        return watch.make_engine()

    watch.fails = lambda in_engine: len(watch.engines) == 1
    with closing(Pool(make_engine)) as pool:
        assert len(describe(pool, frames(2))) == 2

    assert old_ones == [None]


@pytest.mark.parametrize("num_instances", [1, 2])
def test_a_frame_that_always_fails_is_an_error_and_the_others_succeed(watch: Watch, num_instances: int) -> None:
    watch.fails = lambda in_engine: 3 in in_engine
    with closing(Pool(watch.make_engine, num_instances)) as pool:
        results = describe(pool, frames(9))

    expected = alone_with_an_engine(watch.checkpoint, frames(9))
    assert told(results) == [*expected[:3], (3, ""), *expected[4:]]
    assert [result.frame_idx for result in results if result.status == "error"] == [3]
    assert results[3].error_message == (
        "The model fails on this frame, also when it is alone (RuntimeError: CUDA error: an illegal memory access). "
        "Leave the frame out, or look at this host's log."
    )


def test_a_frame_is_not_blamed_for_a_device_that_breaks_under_all_instances(
    watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It failed alone in each of two engines, both of which had answered others before."""
    monkeypatch.setattr(pool_module, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(pool_module, "MAX_PAUSE_S", 0.001)
    num_left = 6  # failures until the device is mended

    def fails(in_engine: set[int]) -> bool:
        nonlocal num_left
        is_broken = 0 < num_left < 6 or (num_left == 6 and 3 in in_engine)
        num_left -= is_broken
        return is_broken

    watch.fails = fails
    with closing(Pool(watch.make_engine, 2)) as pool:
        results = describe(pool, frames(9))

    assert num_left == 0
    assert told(results) == alone_with_an_engine(watch.checkpoint, frames(9))


def test_a_job_all_of_whose_frames_fail_does_not_take_the_instance_out(pool: Pool, watch: Watch) -> None:
    """Others would wait through its pauses."""
    watch.fails = lambda in_engine: PROOF_IDX not in in_engine

    results = describe(pool, frames(5))

    assert [result.status for result in results] == ["error"] * 5
    assert pool._instances[0]._pause_s == pool_module.FIRST_PAUSE_S


def test_a_frame_whose_submission_fails_in_an_unknown_way_is_tried_again_too(pool: Pool, watch: Watch) -> None:
    broken = Frame(0, 0, "no array")  # type: ignore[arg-type]

    (bad, good) = describe(pool, [broken, frames(2)[1]])

    assert bad.status == "error" and good.status == "success"
    assert len(watch.engines) == 3


def test_an_engine_that_cannot_be_replaced_is_a_problem_until_it_can(
    watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_module, "FIRST_PAUSE_S", 0.001)
    seen: list[list[str]] = []

    def make_engine() -> Engine:
        if watch.engines:
            seen.append(pool.problems())
        if len(seen) == 1:
            raise OutOfMemory("No room.")
        return watch.make_engine()

    watch.fails = lambda in_engine: len(watch.engines) == 1
    with closing(Pool(make_engine)) as pool:
        results = describe(pool, frames(3))
        assert pool.problems() == []

    assert [result.status for result in results] == ["success"] * 3
    assert [problem for (problem,) in seen] == [
        f"Instance 1 has no engine ({why}). It keeps trying to make one: see the log."
        for why in ("RuntimeError: CUDA error: an illegal memory access", "OutOfMemory: No room.")
    ]


@pytest.fixture
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "FIRST_PAUSE_S", 0.1)
    monkeypatch.setattr(pool_module, "MAX_PAUSE_S", 0.3)


@pytest.mark.usefixtures("_short_pauses")
def test_an_instance_that_keeps_failing_is_taken_out_and_the_other_does_its_frames(
    watch: Watch, demo: Checkpoint
) -> None:
    """Until its engine answers again. No frame pays for it."""
    sick = Watch(demo)
    sick.fails = lambda in_engine: True
    with closing(Pool([sick.make_engine, watch.make_engine])) as pool:
        results: list[FrameResult] = []
        while len(sick.engines) == 1:  # until it has got any
            results += describe(pool, frames(9))
        warning = wait_until(lambda: "".join(w for w in pool.warnings() if "taken out" in w))
        assert pool.problems() == [] and pool.num_working == 1
        assert re.fullmatch(
            r"Instance 1 is taken out after \d+ failures in a row \(RuntimeError: CUDA error: an illegal memory "
            r"access\)\. It is tried again every 0\.3 s: see the log\. The others go on\.",
            warning,
        )
        assert told(results) == len(results) // 9 * alone_with_an_engine(demo, frames(9))
        assert {result.status for result in results} == {"success"}
        assert len(sick.submitted) <= LOOKAHEAD * sick.num_slots + len(sick.engines)  # one batch, then pictures of ours

        sick.fails = lambda in_engine: False
        wait_until(lambda: pool.num_working == 2)
        assert pool.warnings() == []


@pytest.mark.usefixtures("_short_pauses")
def test_while_all_instances_are_out_jobs_wait(watch: Watch) -> None:
    is_sick = threading.Event()
    is_sick.set()
    watch.fails = lambda in_engine: is_sick.is_set()
    with closing(Pool(watch.make_engine, 2)) as pool, ThreadPoolExecutor() as threads:
        job = threads.submit(describe, pool, frames(9))
        wait_until(lambda: " ".join(pool.problems()).count("is taken out after") == 2)
        assert pool.warnings() == [] and not job.done()
        is_sick.clear()
        results = job.result(60)

    assert told(results) == alone_with_an_engine(watch.checkpoint, frames(9))


def test_closing_interrupts_the_pause_between_two_attempts(watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "FIRST_PAUSE_S", 3600)
    has_failed = threading.Event()

    def make_engine() -> Engine:
        if watch.engines:
            has_failed.set()
            raise OutOfMemory("No room.")
        return watch.make_engine()

    watch.fails = lambda in_engine: True
    pool = Pool(make_engine)
    pool.lane().submit(0, frames(1)[0].image, [QUERY])
    assert has_failed.wait(60)
    pool.close()

    assert instance_threads() == []


def test_a_step_that_takes_too_long_is_a_problem(watch: Watch) -> None:
    with closing(Pool(watch.make_engine, batch_deadline_s=0)) as pool, pool.lane(patience()) as lane:
        assert pool.longest_step_s() == 0 and pool.problems() == []
        watch.may_go_on.clear()
        lane.submit(0, frames(1)[0].image, [Query(max_tokens=1)])
        assert watch.has_begun.wait(60)

        assert pool.longest_step_s() > 0 and pool.num_busy_slots == 1
        (problem,) = pool.problems()
        assert problem == "Instance 1 has worked on one batch for 0 s; 0 s is the most (setting batch_deadline_s)."
        watch.may_go_on.set()
        lane.step()
        assert pool.longest_step_s() == 0 and pool.problems() == []
