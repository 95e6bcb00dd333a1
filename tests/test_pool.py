"""The pool with real engines: the demo checkpoint, or tiny_checkpoint where answers must vary in kind."""

import ctypes
import re
import subprocess
import sys
import threading
import time
from collections.abc import Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
import torch
from pool_watch import QUERY, Watch, alone_with_an_engine, describe, frames, instance_threads, patience, told
from tasks import MIX

from pipeline.demo import SAMPLE_VIDEO
from pipeline.describe import LOOKAHEAD, describe_batches, describe_frames
from pipeline.errors import Canceled, OutOfMemory, QuestionTooLong
from pipeline.frames import sample_frames
from pipeline.moondream.answer import Completed
from pipeline.moondream.checkpoint import Checkpoint
from pipeline.moondream.engine import Engine
from pipeline.moondream.prompts import Query, Sampling
from pipeline.pool import Lane, Pool, PoolClosed
from pipeline.results import RunStats
from pipeline.sampling import Frame
from pipeline.similarity import Gate

ROOT = Path(__file__).parent.parent


@pytest.fixture
def watch(demo: Checkpoint) -> Watch:
    return Watch(demo)


@pytest.fixture
def pool(watch: Watch) -> Iterator[Pool]:
    with closing(Pool(watch.make_engine)) as pool:
        yield pool
        watch.may_go_on.set()


# Answers


@pytest.fixture(scope="module")
def sampled() -> list[Frame]:
    """Two frames of each second of the sample, most of which look like the one before."""
    return list(sample_frames(SAMPLE_VIDEO, 2))


def described(sampled: Sequence[Frame], engine: Engine | Lane) -> list[tuple[object, ...]]:
    results = describe_frames(Gate().sift(sampled), engine, QUERY, RunStats())
    return [(r.frame_idx, r.timestamp_ms, r.description, r.status, r.reused_from_frame_idx) for r in results]


@pytest.mark.parametrize(("num_instances", "num_slots"), [(1, 1), (1, 8), (2, 4), (3, 2)])
def test_instances_and_slots_change_no_answer(
    demo: Checkpoint, sampled: list[Frame], num_instances: int, num_slots: int
) -> None:
    with closing(Pool(lambda: Engine(demo, num_slots), num_instances)) as pool, pool.lane(patience()) as lane:
        results = described(sampled, lane)

    assert results == described(sampled, Engine(demo, 1))
    assert [result[0] for result in results] == [frame.frame_idx for frame in sampled]
    assert len({result[2] for result in results}) > 5 and {result[3] for result in results} == {"success"}
    assert 20 < sum(result[4] is not None for result in results) < 50
    assert pool.num_slots == num_instances * num_slots and pool.num_tokens > 0


def test_two_jobs_at_once_get_their_own_answers(demo: Checkpoint) -> None:
    """Under the same keys, from two threads."""
    jobs = [frames(9, seed=1), frames(12, seed=2)]
    with closing(Pool(lambda: Engine(demo, 2), 2)) as pool, ThreadPoolExecutor() as threads:
        results = list(threads.map(lambda job: told(describe(pool, job)), jobs))

    assert results == [alone_with_an_engine(demo, job) for job in jobs]


def test_instances_that_share_weights_do_not_disturb_each_other(tiny_checkpoint: Checkpoint) -> None:
    tasks = [*MIX, Query("What is it?", max_tokens=12, sampling=Sampling(temperature=1, top_p=0.9))]
    images = [frame.image for frame in frames(12)]

    def answers(engine: Engine | Lane) -> dict[Hashable, list[object]]:
        for index, image in enumerate(images):
            engine.submit(index, image, tasks, index)
        completed: list[Completed] = []
        while engine.num_in_flight:
            completed += engine.step()
        return {
            c.key: [(a.answer_ids, a.reasoning_ids, len(a.boxes), len(a.points)) for a in c.answers] for c in completed
        }

    with closing(Pool(lambda: Engine(tiny_checkpoint, 2), 3)) as pool:
        assert answers(pool.lane(patience())) == answers(Engine(tiny_checkpoint, 2))


def test_a_backlog_does_not_starve_another_job(pool: Pool, watch: Watch) -> None:
    watch.may_go_on.clear()
    with pool.lane(patience()) as long, pool.lane(patience()) as short:
        for frame in frames(20):
            long.submit(frame.frame_idx, frame.image, [QUERY], frame.frame_idx)
        short.submit(0, frames(1)[0].image, [QUERY], 99)
        assert pool.num_waiting >= 21 - LOOKAHEAD * watch.num_slots
        watch.may_go_on.set()
        (done,) = short.step()

    assert done.key == 0
    assert watch.submitted.index(99) <= LOOKAHEAD * watch.num_slots + 2  # the long job's turns come in between


def test_while_a_newcomers_first_frame_is_answered_no_other_begins(demo: Checkpoint) -> None:
    """It waited until others had been encoded and prefilled, many times as long as its own answer takes."""
    watch = Watch(demo, num_slots=4)
    watch.is_slow_to_begin = True
    with closing(Pool(watch.make_engine)) as pool, ThreadPoolExecutor() as threads:
        watch.may_go_on.clear()
        other = threads.submit(describe, pool, frames(12))
        assert watch.has_begun.wait(60)
        with pool.lane(patience()) as newcomer, pool.lane(patience()) as another:
            for index in (98, 99):
                newcomer.submit(index, frames(1)[0].image, [QUERY], index)
            another.submit(100, frames(1)[0].image, [QUERY], 100)
            watch.may_go_on.set()
            done = [*newcomer.step(), *newcomer.step(), *another.step()]
        assert len(other.result()) == 12

    assert [completed.key for completed in done] == [98, 99, 100]
    with_both = [step for step in watch.steps if {98, 100} <= step]  # the first of another newcomer begins beside it
    assert with_both and all(step <= with_both[0] for step in with_both)
    assert any(99 in step and len(step) > 2 for step in watch.steps)  # only the first is urgent


def test_answers_do_not_wait_for_a_slow_decoder(demo: Checkpoint) -> None:
    pulled: list[int] = []
    with closing(Pool(lambda: Engine(demo, 4))) as pool, pool.lane(patience()) as lane:

        def slow_frames() -> Iterator[Frame]:
            for frame in frames(8):
                if frame.frame_idx == 1:
                    while not lane.has_completed:
                        time.sleep(0.001)
                pulled.append(frame.frame_idx)
                yield frame

        batches = describe_batches(slow_frames(), lane, QUERY, RunStats())
        assert [result.frame_idx for result in next(batches)] == [0]
        assert pulled == [0, 1]
        batches.close()


def test_a_frame_to_be_alone_shares_the_pool_with_no_other(watch: Watch) -> None:
    with closing(Pool(watch.make_engine, 2)) as pool, ThreadPoolExecutor() as threads:
        other = threads.submit(describe, pool, [Frame(100 + f.frame_idx, 0, f.image) for f in frames(12)])
        results = describe(pool, frames(6), is_alone=lambda frame_idx: frame_idx in (0, 3))
        assert len(other.result()) == 12

    assert told(results) == alone_with_an_engine(watch.checkpoint, frames(6))
    for alone in (0, 3):
        assert {frozenset(step) for step in watch.steps if alone in step} == {frozenset({alone})}
    assert any(len(step) > 1 for step in watch.steps)


# What may happen in mid-job: test_pool_failures.py tells more


def disturbed(watch: Watch) -> list[str]:
    """Describe frames with one instance, the first engine of which fails -> what the pool says until it has another."""
    seen: list[str] = []

    def make_engine() -> Engine:
        if watch.engines:
            seen.extend(pool.problems())
        return watch.make_engine()

    with closing(Pool(make_engine)) as pool:
        results = describe(pool, frames(9))
        assert pool.problems() == pool.warnings() == []

    assert told(results) == alone_with_an_engine(watch.checkpoint, frames(9))
    assert {result.status for result in results} == {"success"}
    assert len(watch.engines) == 2
    return seen


def test_an_instances_thread_is_killed_in_mid_job_and_nothing_is_lost(watch: Watch) -> None:
    """It ended in silence, and the job waited for ever."""

    def kill(in_engine: set[int]) -> bool:
        if len(in_engine) == 2 and len(watch.engines) == 1:
            thread = ctypes.c_ulong(threading.get_ident())
            ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, ctypes.py_object(SystemExit))
        return False

    watch.fails = kill

    assert disturbed(watch) == ["Instance 1 has no engine (SystemExit). It keeps trying to make one: see the log."]


def test_a_device_error_in_mid_job_loses_nothing(watch: Watch, caplog: pytest.LogCaptureFixture) -> None:
    watch.fails = lambda in_engine: len(in_engine) == 2 and len(watch.engines) == 1

    (problem,) = disturbed(watch)
    assert problem.startswith("Instance 1 has no engine (RuntimeError: CUDA error: an illegal memory access). It keeps")
    assert re.search("Instance 1 failed with 2 frames in its engine", caplog.text)


def test_running_out_of_memory_in_mid_job_loses_nothing(watch: Watch) -> None:
    """Where the engine cannot help itself by halving its batch."""
    watch.failure = lambda: torch.OutOfMemoryError("CUDA out of memory.")
    watch.fails = lambda in_engine: len(in_engine) == 2 and len(watch.engines) == 1

    (problem,) = disturbed(watch)
    assert problem.startswith("Instance 1 has no engine (OutOfMemoryError: CUDA out of memory.). It keeps trying")


# Jobs that end early


def test_a_check_that_raises_ends_the_job_and_frees_its_slots(pool: Pool, watch: Watch) -> None:
    watch.may_go_on.clear()
    num_checks = 0

    def check() -> None:
        nonlocal num_checks
        num_checks += 1
        if num_checks == 3:
            raise Canceled("The job was canceled.")

    with pytest.raises(Canceled), pool.lane(check) as canceled:
        list(describe_frames(frames(9), canceled, QUERY, RunStats()))
    assert pool.num_waiting == 0 and canceled.num_in_flight == 0
    watch.may_go_on.set()
    results = describe(pool, frames(5, seed=3))

    assert told(results) == alone_with_an_engine(watch.checkpoint, frames(5, seed=3))
    assert not watch.in_flight and not canceled.has_completed
    assert pool.num_busy_slots == 0 and pool.problems() == []


def test_a_question_that_no_frame_can_take_is_the_jobs_error_alone(pool: Pool, watch: Watch) -> None:
    with pytest.raises(QuestionTooLong), pool.lane(patience()) as lane:
        list(describe_frames(frames(5), lane, Query("why? " * 400), RunStats()))

    assert len(describe(pool, frames(3))) == 3
    assert len(watch.engines) == 1
    assert watch.num_prepared == len(watch.submitted) > 0  # by the jobs' threads


# Beginning and end


def test_what_keeps_an_engine_from_being_made_is_the_constructors_error(watch: Watch) -> None:
    lock = threading.Lock()

    def make_engine() -> Engine:
        with lock:
            if watch.engines:
                raise OutOfMemory("No room for a second.")
            return watch.make_engine()

    with pytest.raises(OutOfMemory, match="a second"):
        Pool(make_engine, 2)
    assert instance_threads() == []


def test_closing_ends_the_threads_and_the_lanes(pool: Pool) -> None:
    lane = pool.lane(patience())
    assert len(instance_threads()) == 1
    pool.close()

    assert instance_threads() == []
    with pytest.raises(PoolClosed):
        lane.submit(0, frames(1)[0].image, [QUERY])
    with pytest.raises(PoolClosed):
        pool.lane()


def test_closing_leaves_a_stuck_instance_behind(pool: Pool, watch: Watch, caplog: pytest.LogCaptureFixture) -> None:
    watch.may_go_on.clear()
    lane = pool.lane(patience())
    lane.submit(0, frames(1)[0].image, [QUERY])
    assert watch.has_begun.wait(60)
    pool.close(timeout_s=0.01)

    with pytest.raises(PoolClosed):
        lane.step()
    assert "Instance 1 does not end" in caplog.text


def test_torch_is_loaded_only_when_an_engine_is() -> None:
    code = "import sys, pipeline.pool, pipeline.describe; print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)

    assert run.stdout.strip() == "False"
