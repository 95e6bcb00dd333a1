"""Engines that are elsewhere, without the network between: RemoteEngine and EngineHost, as a pool uses them.

With Ray, actors and nodes that die: tests/ray.
"""

import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path

import pytest
from pool_watch import QUERY, alone_with_an_engine, describe, frames, patience, told
from serving import wait_until

from pipeline.cluster import Cluster, EngineLost, RemoteEngine, _is_here
from pipeline.cluster_host import EngineHost, Report, Sent, Wanted, encode_jpeg
from pipeline.describe import describe_frames
from pipeline.errors import InvalidOption, QuestionTooLong, WeightsNotFound
from pipeline.moondream.checkpoint import Checkpoint
from pipeline.moondream.prompts import Query
from pipeline.nodes import RATE_S, Node, NodeTally, Place
from pipeline.pool import MAX_TRIES, Pool
from pipeline.results import RunStats

WANTED = Wanted("demo", device="cpu", slots=2)


class Elsewhere:
    """Makes engines whose frames cross a border as bytes. `dies` sees the frames of a call."""

    def __init__(self) -> None:
        self.calls: list[list[int]] = []  # the frames that were sent together
        self.dies: Callable[[set[int]], bool] = lambda in_engine: False
        self.num_engines = 0
        self.may_load = threading.Event()
        self.may_load.set()

    def make_engine(self, is_jpeg: bool = False) -> RemoteEngine:
        assert self.may_load.wait(60)
        self.num_engines += 1
        host, inside = EngineHost(), set[int]()
        loaded = host.load(WANTED)

        def run(sent: Sequence[Sent], canceled: Sequence[int]) -> Report:
            self.calls.append([frame.frame_idx for frame in sent])
            inside.update(self.calls[-1])
            if self.dies(inside):
                raise EngineLost("The node is gone.")
            report = pickle.loads(pickle.dumps(host.run(pickle.loads(pickle.dumps(sent)), canceled)))
            if report.completed:
                inside.clear()
            return report

        return RemoteEngine(loaded, run, Place("gpu-1", 0.5), encode_jpeg if is_jpeg else None)


@pytest.fixture
def node() -> Elsewhere:
    return Elsewhere()


@pytest.fixture
def pool(node: Elsewhere) -> Iterator[Pool]:
    with closing(Pool(node.make_engine, 2)) as pool:
        yield pool


def test_answers_are_those_of_an_engine_here(pool: Pool, demo: Checkpoint) -> None:
    results = describe(pool, frames(9))

    assert told(results) == alone_with_an_engine(demo, frames(9))
    assert pool.num_slots == 4 and pool.num_tokens > 0
    assert pool.nodes() == {"gpu-1": Node(num_instances=2, num_gpus=1, num_frames=9, frames_per_second=9 / RATE_S)}


def test_a_node_that_has_gone_keeps_its_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counters never go back; the rate is of the last seconds."""
    now_s = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now_s)
    tally = NodeTally()
    for node in ("b", "a", "b"):
        tally.count(node)
    assert tally.nodes([Place("a", 1)]) == {"a": Node(1, 1, 1, 1 / RATE_S), "b": Node(0, 0, 2, 2 / RATE_S)}

    now_s += RATE_S + 1
    assert tally.nodes([]) == {"a": Node(0, 0, 1, 0), "b": Node(0, 0, 2, 0)}


def test_jpeg_frames_are_answered(node: Elsewhere) -> None:
    with closing(Pool(lambda: node.make_engine(is_jpeg=True))) as pool:
        assert {result.status for result in describe(pool, frames(3))} == {"success"}


def test_a_question_that_no_frame_can_take_is_the_jobs_error(pool: Pool) -> None:
    with pytest.raises(QuestionTooLong), pool.lane(patience()) as lane:
        list(describe_frames(frames(5), lane, Query("why? " * 400), RunStats()))

    assert len(describe(pool, frames(3))) == 3


def test_a_canceled_frame_leaves_its_engine(pool: Pool) -> None:
    with pool.lane(patience()) as lane:
        for frame in frames(6):
            lane.submit(frame.frame_idx, frame.image, [QUERY], frame.frame_idx)
    wait_until(lambda: pool.num_busy_slots == 0)

    assert len(describe(pool, frames(3))) == 3


def test_a_lost_engine_loses_nothing(node: Elsewhere, demo: Checkpoint) -> None:
    node.dies = lambda in_engine: node.num_engines == 2 and len(in_engine) > 1
    with closing(Pool(node.make_engine, 2)) as pool:
        results = describe(pool, frames(20))
        wait_until(lambda: pool.num_working == 2)

    assert told(results) == alone_with_an_engine(demo, frames(20))
    assert {result.status for result in results} == {"success"}


def test_a_poisonous_frame_fails_alone_after_its_tries(node: Elsewhere, demo: Checkpoint) -> None:
    node.dies = lambda in_engine: 3 in in_engine
    with closing(Pool(node.make_engine, 2)) as pool:
        results = describe(pool, frames(9))

    expected = alone_with_an_engine(demo, frames(9))
    assert told(results) == [*expected[:3], (3, ""), *expected[4:]]
    assert sum(3 in call for call in node.calls) == MAX_TRIES
    assert results[3].error_message and "EngineLost: The node is gone." in results[3].error_message


def test_engines_may_come_late(node: Elsewhere, demo: Checkpoint) -> None:
    """And take part in a job that runs."""
    others = Elsewhere()
    others.may_load.clear()
    with closing(Pool([node.make_engine, others.make_engine], num_needed=1)) as pool:
        assert (pool.num_working, pool.num_slots, pool.problems(), pool.warnings()) == (1, 2, [], [])
        with pool.lane(patience()) as lane:
            results = []
            for result in describe_frames(frames(30), lane, QUERY, RunStats()):
                results.append(result)
                if len(results) == 3:
                    others.may_load.set()
                    wait_until(lambda: pool.num_working == 2)
        assert pool.num_slots == 4 and sum(map(len, others.calls)) > 0

    assert told(results) == alone_with_an_engine(demo, frames(30))


def test_what_the_first_cannot_load_is_the_pools_error() -> None:
    def make_engine() -> RemoteEngine:
        raise WeightsNotFound("No such model.")

    with pytest.raises(WeightsNotFound):
        Pool(make_engine, 3, num_needed=1)


def test_an_urgent_frame_that_is_canceled_keeps_nothing_from_beginning() -> None:
    """The pool would wait for another newcomer for ever: an engine without frames is not asked again."""

    def run(sent: Sequence[Sent], canceled: Sequence[int]) -> Report:
        return Report([], 1, is_for_urgent_only=sent[0].is_urgent)

    engine = RemoteEngine(EngineHost().load(WANTED), run, Place("gpu-1", 0.0))
    engine.submit("urgent", frames(1)[0].image, [QUERY], is_urgent=True)
    engine.step()
    assert engine.is_for_urgent_only

    engine.cancel("urgent")

    assert not engine.is_for_urgent_only


@pytest.mark.parametrize(
    ("address", "is_here"),
    [
        ("local", True),
        ("127.0.0.1:6379", True),
        ("ray://localhost:10001", True),
        ("[::1]:6379", True),
        ("10.0.0.5:6379", False),
        ("ray://head.example:10001", False),
        ("auto", False),
    ],
)
def test_only_this_machine_needs_no_token(address: str, is_here: bool) -> None:
    assert _is_here(address) == is_here


def test_without_ray_it_is_said_what_to_install() -> None:
    code = "import sys; sys.modules['ray'] = None; from pipeline.cluster import *; Cluster(Wanted('demo'), 'local')"
    run = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent, capture_output=True, text=True)

    assert "pip install -r requirements-ray.txt" in run.stderr


def test_a_cluster_elsewhere_without_a_token_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", object())  # never asked
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)

    with pytest.raises(InvalidOption, match="RAY_AUTH_MODE=token"):
        Cluster(WANTED, "10.0.0.5:6379")


# What Ray does: an action of C's, behind Python's back. Here, to ignore the signal.
KEEPS = """
import ctypes, os, signal, sys
from pipeline.cluster import _sigterm_kept
signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
with _sigterm_kept():
    libc = ctypes.CDLL(None)
    libc.signal.argtypes = ctypes.c_int, ctypes.c_void_p
    libc.signal(signal.SIGTERM, signal.SIG_IGN)
    os.kill(os.getpid(), signal.SIGTERM)
    print("ignored", flush=True)
os.kill(os.getpid(), signal.SIGTERM)
print("not ended", flush=True)
"""


def test_what_a_process_does_on_sigterm_is_put_back_after_a_library_changed_it() -> None:
    done = subprocess.run([sys.executable, "-c", KEEPS], capture_output=True, text=True, timeout=60)

    assert (done.returncode, done.stdout, done.stderr) == (7, "ignored\n", "")
