"""The worker with a real store, pool and decoder. How one job goes is in test_job_run.py."""

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from job_bench import Bench, skippable
from local_server import Lab, LocalServer, http
from serving import wait_until
from video_files import write_video

from jobs import worker as worker_module
from jobs.webhooks import WebhookSender
from pipeline.moondream.checkpoint import Checkpoint

SECRET = "whsec_" + "A" * 32


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("videos") / "grey.avi", num_frames=8)


@pytest.fixture
def bench(tmp_path: Path, demo: Checkpoint, lab: Lab) -> Iterator[Bench]:
    bench = Bench(tmp_path, demo, lab)
    yield bench
    bench.close()


def statuses(bench: Bench, *job_ids: str) -> list[str]:
    return [bench.store.get(job_id)["status"] for job_id in job_ids]


class Held:
    """An engine that hangs in a step with this frame until it is let go."""

    def __init__(self, bench: Bench, frame_idx: int) -> None:
        self.is_hanging, self.may_go_on = threading.Event(), threading.Event()
        self._frame_idx, bench.watch.fails = frame_idx, self._hang

    def _hang(self, in_engine: set[int]) -> bool:
        if self._frame_idx in in_engine:
            self.is_hanging.set()
            assert self.may_go_on.wait(60)
        return False


@contextmanager
def running(bench: Bench) -> Iterator[None]:
    """Run the next job in a thread, which has to end with the block."""
    thread = threading.Thread(target=bench.worker.run_next)
    thread.start()
    yield
    thread.join(30)
    assert not thread.is_alive()


# Who is next


def test_jobs_run_oldest_first_and_a_retried_one_behind_the_others(bench: Bench, video: Path) -> None:
    first, second, third = (bench.upload(video, max_frames=1) for _ in range(3))
    bench.store.cancel(first)
    bench.store.retry(first)

    assert [statuses(bench, second, third, first) for _ in range(3) if bench.worker.run_next()] == [
        ["completed", "submitted", "submitted"],
        ["completed", "completed", "submitted"],
        ["completed", "completed", "completed"],
    ]
    assert not bench.worker.run_next()


def test_as_many_jobs_run_at_once_as_may(bench: Bench, video: Path) -> None:
    bench.watch.may_go_on.clear()
    job_ids = [bench.upload(video, max_frames=2) for _ in range(3)]
    bench.worker.start()
    wait_until(lambda: bench.watch.has_begun.is_set() and statuses(bench, *job_ids).count("processing") == 2)

    assert statuses(bench, *job_ids) == ["processing", "processing", "submitted"]
    bench.watch.may_go_on.set()
    wait_until(lambda: statuses(bench, *job_ids) == ["completed"] * 3)


def test_a_job_that_comes_later_is_claimed_at_once(bench: Bench, video: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "CLAIM_S", 3600)
    bench.worker.start()
    job_id = bench.upload(video, max_frames=1)

    wait_until(lambda: statuses(bench, job_id) == ["completed"])


def test_what_fails_unexpectedly_fails_its_job_and_the_next_one_runs(
    bench: Bench, video: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bad, good = bench.upload(video), bench.upload(video, max_frames=1)
    bench.after_frames(1, lambda: 1 / 0)
    record = bench.run(bad)
    bench.run(good)

    assert (record["status"], record["error_code"]) == ("failed", "internal_error")
    assert "ZeroDivisionError" in str(record["error_message"]) and "Traceback" in caplog.text
    assert statuses(bench, good) == ["completed"]


def test_a_change_of_status_is_one_line_of_the_log(bench: Bench, video: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "jobs")
    job_id = bench.upload(video, max_frames=1)
    bench.run(job_id)
    bench.store.files.video(failed := bench.upload(video)).unlink()
    bench.run(failed)

    told = [(line.job_id, line.status) for line in caplog.records if hasattr(line, "seconds")]  # type: ignore[attr-defined]
    assert told == [
        *((job_id, status) for status in ("submitted", "processing", "completed")),
        *((failed, status) for status in ("submitted", "processing", "failed")),
    ]
    assert all(line.levelno == logging.INFO for line in caplog.records)
    assert "Upload it again" in caplog.text


# Cancel


def test_cancel_takes_effect_in_mid_frame_keeps_what_is_there_and_frees_the_slots(bench: Bench, video: Path) -> None:
    held = Held(bench, 4)
    job_id, next_one = bench.upload(video), bench.upload(video, max_frames=1)
    with running(bench):
        assert held.is_hanging.wait(60)
        bench.store.cancel(job_id)
    record = bench.store.get(job_id)

    assert record["status"] == "canceled" and record["canceled_at"] and record["error_code"] is None
    assert [result["frame_idx"] for result in bench.results(job_id)] == list(range(record["num_frames"]))
    assert bench.pool.num_waiting == 0
    held.may_go_on.set()
    wait_until(lambda: bench.pool.num_busy_slots == 0)
    assert bench.run(next_one)["status"] == "completed"
    bench.store.retry(job_id)
    assert bench.run(job_id)["status"] == "completed" and bench.num_described == 9


def test_a_download_can_be_canceled(bench: Bench, server: LocalServer, video: Path) -> None:
    def stall(connection: socket.socket) -> None:
        connection.sendall(http(video.read_bytes())[:-100])
        bench.store.cancel(job_id)
        connection.recv(1)

    server.replies["/video.mp4"] = [stall]
    job_id = bench.submit(bench.serve(server))

    assert bench.run(job_id)["status"] == "canceled"
    assert not list(bench.store.files.of(job_id).glob("video*"))


def test_a_cancel_that_the_server_did_not_live_to_see_holds(bench: Bench, video: Path) -> None:
    held = Held(bench, 4)
    job_id = bench.upload(video)
    with running(bench):
        assert held.is_hanging.wait(60)
        bench.worker.begin_stop(0)
    bench.store.update(job_id, is_cancel_requested=True)
    held.may_go_on.set()
    bench.reopen()

    assert bench.worker.run_next() and statuses(bench, job_id) == ["canceled"]


# Stop


def test_a_stopped_worker_claims_nothing(bench: Bench, video: Path) -> None:
    bench.worker.start()
    bench.worker.stop()
    job_id = bench.upload(video)

    assert not bench.worker.run_next()
    assert statuses(bench, job_id) == ["submitted"]


def test_a_stop_lets_go_of_an_engine_that_hangs_when_its_grace_is_over(bench: Bench, video: Path) -> None:
    """The grace runs from the beginning of the stop."""
    held = Held(bench, 4)
    job_id = bench.upload(video)
    bench.worker.start()
    assert held.is_hanging.wait(60)
    bench.worker.begin_stop(0.2)
    bench.worker.stop(3600)
    record = bench.store.get(job_id)

    assert (record["status"], record["stage"], record["num_frames"]) == ("submitted", None, len(bench.results(job_id)))
    held.may_go_on.set()
    bench.reopen()
    assert bench.run(job_id)["status"] == "completed" and bench.num_described == 8


def test_a_pool_that_is_closed_puts_the_job_back(bench: Bench, video: Path) -> None:
    job_id = bench.upload(video)
    bench.after_frames(1, lambda: bench.pool.close())
    assert bench.worker.run_next()
    assert statuses(bench, job_id) == ["submitted"]
    bench.reopen()

    assert bench.run(job_id)["status"] == "completed"


# What is wrong


def test_a_job_that_does_not_move_is_a_problem_until_it_does(
    bench: Bench, video: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(worker_module, "WATCH_S", 0.01)
    skip, held = skippable(monkeypatch, "jobs.worker"), Held(bench, 4)
    job_id = bench.upload(video)
    bench.worker.start()
    assert held.is_hanging.wait(60)
    assert bench.worker.problems() == []
    skip(10_000)
    (problem,) = wait_until(bench.worker.problems)

    assert problem.startswith(f"{job_id} has not moved for 100")
    wait_until(lambda: f"{job_id} has not moved for 100" in caplog.text)
    skip(-10_000)
    held.may_go_on.set()
    wait_until(lambda: not bench.worker.problems())
    wait_until(lambda: statuses(bench, job_id) == ["completed"])
    assert caplog.text.count("has not moved") == 1


class FullDisk:
    """Takes nothing more of a journal, until there is room."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        self.is_full, self.num_refused, self._name, self._write = False, 0, name, os.write
        monkeypatch.setattr("jobs.journal.os.write", self._write_if_there_is_room)

    def _write_if_there_is_room(self, fd: int, line: bytes) -> int:
        if self.is_full and os.readlink(f"/proc/self/fd/{fd}").endswith(self._name):
            self.num_refused += 1
            return 0
        return self._write(fd, line)


def test_a_job_whose_end_finds_no_room_ends_when_there_is(
    bench: Bench, video: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(worker_module, "STORE_AGAIN_S", 0.01)
    disk = FullDisk(monkeypatch, "jobs.jsonl")
    job_id, next_one = bench.upload(video, max_frames=4), bench.upload(video, max_frames=1)
    bench.after_frames(4, lambda: setattr(disk, "is_full", True))
    with running(bench):
        (problem,) = wait_until(bench.worker.problems)
        assert "The disk of this host is full" in problem
        assert statuses(bench, job_id) == ["processing"] and len(bench.results(job_id)) == 4
        wait_until(lambda: disk.num_refused > 3)
        disk.is_full = False

    assert statuses(bench, job_id) == ["completed"] and bench.worker.problems() == []
    assert [line.levelname for line in caplog.records if "disk" in line.message] == ["ERROR"]
    assert bench.run(next_one)["status"] == "completed"


def test_jobs_wait_while_not_even_their_claim_finds_room(
    bench: Bench, video: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker tried again without a pause."""
    monkeypatch.setattr(worker_module, "STORE_AGAIN_S", 0.05)
    disk = FullDisk(monkeypatch, "jobs.jsonl")
    bench.reopen(max_running_jobs=1)
    job_id = bench.upload(video, max_frames=1)
    disk.is_full, began_s = True, time.monotonic()
    bench.worker.start()
    wait_until(lambda: disk.num_refused > 3)

    assert disk.num_refused <= 2 + (time.monotonic() - began_s) / 0.05
    assert bench.worker.problems() and statuses(bench, job_id) == ["submitted"]
    disk.is_full = False
    wait_until(lambda: statuses(bench, job_id) == ["completed"])
    assert bench.worker.problems() == []


def test_a_disk_that_has_room_again_is_no_problem_though_no_job_comes(
    bench: Bench, video: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an idle server's purge had found was told for ever."""
    monkeypatch.setattr(worker_module, "WATCH_S", 0.01)
    disk = FullDisk(monkeypatch, "jobs.jsonl")
    bench.run(bench.upload(video, max_frames=1))
    bench.store._limits = replace(bench.store._limits, retention_s=-1)
    disk.is_full = True
    bench.worker.start()
    wait_until(lambda: disk.num_refused)
    disk.is_full = False

    wait_until(lambda: not bench.worker.problems())


# Who is told


@pytest.mark.parametrize("status", ["completed", "failed", "canceled"])
def test_a_webhook_tells_how_a_job_ended(bench: Bench, server: LocalServer, video: Path, status: str) -> None:
    bodies: list[bytes] = []

    def take(connection: socket.socket) -> None:
        bodies.append(server.requests[-1].encode("latin-1").partition(b"\r\n\r\n")[2])
        connection.settimeout(1)
        while not bodies[-1].endswith(b"}}"):
            bodies[-1] += connection.recv(65536)
        connection.sendall(http())

    bench.serve(server)
    server.replies["/hook"] = [take]
    job_id = bench.upload(video, webhook_url=f"http://video.example:{server.port}/hook")
    if status == "failed":
        bench.store.files.video(job_id).unlink()
    if status == "canceled":
        bench.after_frames(1, lambda: bench.store.cancel(job_id))
    bench.run(job_id)
    sender = WebhookSender(bench.store, SECRET, bench.lab.rules(server.port), bench.lab.network())

    assert [sender.send_due(time.time()) for _ in range(2)] == [1, 0]
    (event,) = map(json.loads, bodies)
    assert event["type"] == f"job.{status}"
    assert (event["data"]["job_id"], event["data"]["status"]) == (job_id, status)
    assert event["data"]["error_code"] == ("video_not_found" if status == "failed" else None)
