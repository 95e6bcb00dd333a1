"""The pool on a Ray cluster of two nodes on this machine, whose actors and nodes die in mid-job.

Each test prints how many frames were asked for, answered, answered twice and failed.
"""

import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from pool_watch import QUERY, frames, patience, told
from serving import SAMPLE, ServerProcess, wait_until

from pipeline.cluster import Cluster
from pipeline.cluster_host import EngineHost, Report, Wanted
from pipeline.demo import SAMPLE_VIDEO
from pipeline.describe import describe_frames
from pipeline.frames import sample_frames
from pipeline.moondream.checkpoint import Checkpoint
from pipeline.moondream.engine import Engine
from pipeline.pool import Pool
from pipeline.results import FrameResult, RunStats
from pipeline.sampling import Frame

ray: Any = import_module("ray")  # which is no package but this folder, for who checks types without it
Nodes: Any = import_module("ray.cluster_utils").Cluster

pytestmark = pytest.mark.filterwarnings("default")  # of ray and of what it starts
WANTED = Wanted("demo", device="cpu", slots=4)
PATIENCE_S = 240


class SlowHost(EngineHost):
    """An instance that takes its time, so that there is a mid-job; frame 13 of a poisoned job kills it."""

    def run(self, sent: Any, canceled: Any) -> Report:
        time.sleep(0.05)
        if any(frame.frame_idx == 1_000_013 for frame in sent):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().run(sent, canceled)


ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # nodes do not find it


@pytest.fixture
def nodes() -> Iterator[Any]:
    """A head that takes no instances, and two nodes with room for two each."""
    started = Nodes(initialize_head=True, head_node_args={"num_cpus": 0, "num_gpus": 0})
    started.two = [started.add_node(num_cpus=2, num_gpus=2) for _ in range(2)]
    yield started
    ray.shutdown()
    started.shutdown()


def connect(nodes: Any, **options: Any) -> Cluster:
    return Cluster(WANTED, nodes.address, **{"gpus_per_instance": 1, "deadline_s": 5, "host": SlowHost, **options})


def pool_of(cluster: Cluster, num_instances: int) -> Pool:
    return Pool(cluster.make_engine, num_instances, num_needed=1, on_close=cluster.close)


def describe(
    pool: Pool, of: list[Frame], after: int = 0, disturb: Callable[[], None] = lambda: None
) -> list[FrameResult]:
    """Describe frames; when there are so many results, something happens."""
    results: list[FrameResult] = []
    with pool.lane(patience(PATIENCE_S)) as lane:
        for result in describe_frames(of, lane, QUERY, RunStats()):
            results.append(result)
            if len(results) == after:
                disturb()
    counts = Counter(result.frame_idx for result in results)
    failed = sum(result.status == "error" for result in results)
    twice = sum(count > 1 for count in counts.values())
    print(f"\nasked {len(of)}, answered {len(results) - failed}, twice {twice}, failed {failed}")
    assert [result.frame_idx for result in results] == [frame.frame_idx for frame in of] and not twice
    return results


def actor_pids() -> list[int]:
    """Of the processes of actors on all nodes: they are on this machine."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if path.read_bytes().startswith(b"ray::SlowHost") or path.read_bytes().startswith(b"ray::EngineHost"):
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def expected(demo: Checkpoint, of: list[Frame]) -> list[tuple[int, str]]:
    return told(list(describe_frames(of, Engine(demo, 4), QUERY, RunStats())))


def test_results_are_those_of_the_local_pool(nodes: Any, demo: Checkpoint) -> None:
    sampled = list(sample_frames(SAMPLE_VIDEO, 2))

    def full(results: list[FrameResult]) -> list[tuple[Any, ...]]:
        return [(r.frame_idx, r.timestamp_ms, r.description, r.status) for r in results]

    with closing(Pool(lambda: Engine(demo, 4), 2)) as local:
        here = full(describe(local, sampled))
    with closing(pool_of(connect(nodes, host=EngineHost), 4)) as pool:
        wait_until(lambda: pool.num_working == 4)
        there = full(describe(pool, sampled))

    assert there == here


def test_two_actors_are_killed(nodes: Any, demo: Checkpoint) -> None:
    def kill() -> None:
        for pid in actor_pids()[:2]:
            os.kill(pid, signal.SIGKILL)

    with closing(pool_of(connect(nodes), 4)) as pool:
        wait_until(lambda: pool.num_working == 4)
        results = describe(pool, frames(200), 60, kill)
        wait_until(lambda: pool.num_working == 4)

    assert told(results) == expected(demo, frames(200))


def test_a_node_goes_and_another_joins(nodes: Any, demo: Checkpoint) -> None:
    """More instances are wanted than there are places."""

    def change() -> None:
        nodes.remove_node(nodes.two[0], allow_graceful=False)
        nodes.add_node(num_cpus=2, num_gpus=4)

    with closing(pool_of(connect(nodes), 6)) as pool:
        wait_until(lambda: pool.num_working == 4)
        results = describe(pool, frames(300), 60, change)
        wait_until(lambda: pool.num_working == 6)

    assert told(results) == expected(demo, frames(300))


def test_a_node_is_frozen(nodes: Any, demo: Checkpoint) -> None:
    frozen: list[int] = []

    def freeze() -> None:
        raylet = nodes.two[0].all_processes["raylet"][0].process.pid
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                parent = int(path.read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            if parent == raylet:
                frozen.append(int(path.parent.name))
        frozen.append(raylet)
        for pid in frozen:
            os.kill(pid, signal.SIGSTOP)

    try:
        with closing(pool_of(connect(nodes, deadline_s=3), 4)) as pool:
            wait_until(lambda: pool.num_working == 4)
            results = describe(pool, frames(200), 60, freeze)
    finally:
        for pid in frozen:
            os.kill(pid, signal.SIGCONT)

    assert told(results) == expected(demo, frames(200))


def test_a_poisonous_frame_fails_alone(nodes: Any, demo: Checkpoint) -> None:
    with closing(pool_of(connect(nodes), 2)) as pool:
        poisoned = [
            Frame(1_000_013 if frame.frame_idx == 13 else frame.frame_idx, frame.timestamp_ms, frame.image)
            for frame in frames(40)
        ]
        results = describe(pool, poisoned)

    good = expected(demo, frames(40))
    assert [(r.frame_idx, r.description) for r in results] == [*good[:13], (1_000_013, ""), *good[14:]]


def test_the_app_is_killed_and_goes_on(nodes: Any, tmp_path: Path, demo: Checkpoint) -> None:
    environment = {"RAY_ADDRESS": nodes.address}
    settings: dict[str, Any] = {"pool": "ray", "instances": 2, "slots": 2}
    server = ServerProcess(tmp_path / "data", environment=environment, **settings)
    with server.start(is_ready=False):
        with server.client() as http:
            wait_until(lambda: http.get("/api/ready").status_code == 200, PATIENCE_S)  # processes start slowly
            form = {"target_fps": 25, "reuse_similar": 0}
            job_id = http.post("/api/upload", files={"file": ("v.mp4", SAMPLE.read_bytes())}, data=form).json()[
                "job_id"
            ]
            wait_until(lambda: http.get(f"/api/status/{job_id}").json()["frames_processed"] > 40)
        server.kill()
        wait_until(lambda: not actor_pids(), 20)
        server.start(is_ready=False)
        with server.client() as http:
            wait_until(lambda: http.get(f"/api/status/{job_id}").json()["status"] == "completed", 240)
            results = http.get(f"/api/status/{job_id}").json()["results_payload"]["frame_results"]
        assert server.stop() == 0
    assert "SIGTERM received" not in server.log.read_text(encoding="utf-8"), "Ray's handler came first"

    seqs = [result["seq"] for result in results]
    failed = sum(result["status"] == "error" for result in results)
    print(f"\nasked 600, answered {len(results) - failed}, twice {len(seqs) - len(set(seqs))}, failed {failed}")
    assert len(results) == 600 == len(set(seqs)) and not failed
