"""Faults of the engine, the decoder and the network. Run: python -m tests.faults"""

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from faults import FAULTS, LONG, Outcome, Scene, answered, fault
from local_server import LocalServer
from local_server import http as reply
from process_watch import held
from serving import SAMPLE, wait_until

__all__ = ["FAULTS"]
LOCAL = {"allow_private_urls": "127.0.0.1", "max_running_jobs": 2}
NUM_DEAF, NUM_DEAF_TO_VIDEO = 100, 20
NUM_HOOKED = 20
FREE_BYTES = 30_000_000
FREE_BOX = FREE_BYTES.to_bytes(4, "big") + b"free" + bytes(FREE_BYTES - 8)  # players skip it


@contextmanager
def web(host: str = "127.0.0.1") -> Iterator[LocalServer]:
    server = LocalServer(host)
    try:
        yield server
    finally:
        server.stop()


@fault
def out_of_memory_in_the_engine(folder: Path) -> Outcome:
    """As CUDA raises it, at every step for 3 s, while a job runs."""
    scene = Scene(folder)
    with scene.going() as http:
        job_id = scene.running(http)
        scene.may_end[job_id] = {"failed"}
        scene.switch("oom")
        shown = scene.ended(http, job_id)
        assert shown["error_code"] == "too_many_failures", shown
        ready = http.get("/api/ready")
        scene.switch("oom", None)
        assert http.post(f"/api/jobs/{job_id}/retry").status_code == 200
        scene.may_end[job_id] = {"completed"}
        scene.audit(http)
    return Outcome(
        f"The job fails: {shown['error_code']}: {shown['error_message']} /api/ready says {answered(ready)}.",
        "Use fewer SLOTS or INSTANCES, or free memory. Retry the job: what failed is described again.",
    )


@fault
def decoder_child_killed(folder: Path) -> Outcome:
    """As the kernel does when memory is short: SIGKILL, in the middle of a video."""
    scene = Scene(folder)
    with scene.going() as http:
        job_id = scene.submit(http, may_end=("failed",), **LONG)
        process = scene.server.process
        assert process
        wait_until(lambda: scene.read(http, job_id) > 3, pause_s=0.01)
        for pid in decoders(process.pid):
            os.kill(pid, signal.SIGKILL)
        shown = scene.ended(http, job_id)
        assert shown["error_code"] == "decoder_stopped", shown
        assert 0 < shown["frames_processed"] < 300, shown
        assert http.post(f"/api/jobs/{job_id}/retry").status_code == 200
        scene.may_end[job_id] = {"completed"}
        assert scene.ended(http, job_id)["frames_processed"] == 300
        scene.audit(http)
    return Outcome(
        f"The job fails: {shown['error_code']}: {shown['error_message']} {shown['frames_processed']} frames are kept.",
        "Retry the job: it goes on after what it has.",
    )


def decoders(pid: int) -> list[int]:
    children = [path.read_text().split() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    return [int(child) for of_thread in children for child in of_thread]


@fault
def webhook_receiver_hangs(folder: Path) -> Outcome:
    """It takes connections and never answers; another one answers."""
    with web("127.0.0.2") as good, web() as bad:  # a host is sent one webhook at a time
        scene = Scene(folder, {"allow_private_urls": "127.0.0.1,127.0.0.2"})
        hanging, may_answer = threading.Event(), threading.Event()

        def hang(connection: socket.socket) -> None:
            hanging.set()
            if may_answer.wait(60):
                connection.sendall(reply())

        bad.replies["/hook"] = [hang]
        good.replies["/hook"] = [reply()]
        with scene.going() as http:
            url = f"http://127.0.0.1:{bad.port}/hook"
            for _ in range(NUM_HOOKED):
                scene.submit(http, max_frames=1, webhook_url=url)
            hanging.wait(60)
            scene.submit(http, max_frames=1, webhook_url=f"http://127.0.0.2:{good.port}/hook")
            scene.audit(http)
            wait_until(lambda: good.requests, 30)
            started_s = time.monotonic()
            assert scene.server.stop() == 0
            stop_s = time.monotonic() - started_s
        before = hook_ids(bad)
        may_answer.set()
        bad.replies["/hook"] = [reply()]
        with scene.server.start(), scene.client() as http:
            wait_until(lambda: len(hook_ids(bad)) == NUM_HOOKED, 180, 0.2)
            scene.audit(http)
        assert before <= hook_ids(bad)
    return Outcome(
        f"Nothing: jobs are completed, other receivers get theirs meanwhile, the server stops within {stop_s:.1f} s.",
        f"Nothing to do: all {NUM_HOOKED} are delivered when it answers, each with the id of its first try.",
    )


def hook_ids(receiver: LocalServer) -> set[str]:
    heads = [line.partition(":") for request in receiver.requests for line in request.splitlines()]
    return {value.strip() for name, _, value in heads if name.lower() == "webhook-id"}


@fault
def readers_stop_reading(folder: Path) -> Outcome:
    """100 of the events of a job with 300 frames, 20 of a large video; then a good one. With the page: the other way
    in which the server is started."""
    scene = Scene(folder, {"page": True})
    with scene.going() as http:
        large = scene.submit(http, more=FREE_BOX, max_frames=1)
        scene.ended(http, large)
        process = scene.server.process
        assert process
        job_id = scene.submit(http, **LONG)
        host, _, port = scene.server.url.removeprefix("http://").partition(":")
        before = held(process.pid)
        paths = [f"/api/jobs/{job_id}/events"] * NUM_DEAF + [f"/api/jobs/{large}/video"] * NUM_DEAF_TO_VIDEO
        started_s = time.monotonic()
        deaf = [deaf_reader(host, int(port), path) for path in paths]
        try:
            with http.stream("GET", f"/api/jobs/{job_id}/events") as answer:
                seqs = [int(line[4:]) for line in answer.iter_lines() if line.startswith("id: ")]
            assert seqs == list(range(1, 301)), seqs
            during = held(process.pid)
            assert during.num_files > before.num_files + NUM_DEAF_TO_VIDEO, (before, during)
            wait_until(lambda: held(process.pid).num_files < before.num_files + NUM_DEAF_TO_VIDEO, 150, 0.5)
            let_go_s = time.monotonic() - started_s
        finally:
            for each in deaf:
                each.close()
        scene.audit(http)
    grown = (during.rss_bytes - before.rss_bytes) / 1e6
    assert grown < 60, f"memory grew by {grown:.0f} MB"
    return Outcome(
        f"Nothing: another reader gets every event in order; the server's memory grows by {max(0.0, grown):.0f} MB.",
        f"Nothing to do: each waits with what the system's buffers hold, and all are let go after {let_go_s:.0f} s.",
    )


def deaf_reader(host: str, port: int, path: str) -> socket.socket:
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
    connection.connect((host, port))
    connection.sendall(f"GET {path} HTTP/1.1\r\nHost: {host}:{port}\r\n\r\n".encode())
    return connection


@fault
def dns_fails(folder: Path) -> Outcome:
    """No name can be resolved, while one job runs and another is to be downloaded."""
    with web() as server:
        scene = Scene(folder, LOCAL)
        server.replies["/v.mp4"] = [reply(SAMPLE.read_bytes())]
        with scene.going() as http:
            scene.running(http)
            scene.switch("dns")
            failing = scene.submit_url(http, "https://video.example/v.mp4", ("failed",))
            shown = scene.ended(http, failing)
            assert shown["error_code"] == "download_failed", shown
            other = scene.submit_url(http, f"http://127.0.0.1:{server.port}/v.mp4", max_frames=2)
            scene.ended(http, other)
            scene.switch("dns", None)
            scene.audit(http)
    took_s = shown["failed_at"] - shown["processing_started_at"]
    return Outcome(
        f"After {took_s:.0f} s the job fails: {shown['error_code']}: {shown['error_message']} Other jobs go on.",
        "Retry the job when names resolve.",
    )


@fault
def downloads_stall(folder: Path) -> Outcome:
    """At 99%: one comes back when asked again, the other never does. Meanwhile another job waits for its turn."""
    with web() as server:
        video = SAMPLE.read_bytes()
        scene = Scene(folder, LOCAL)

        def stall(connection: socket.socket) -> None:
            head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(video)}\r\n\r\n".encode()
            connection.sendall(head + video[: len(video) * 99 // 100])
            server.is_stopped.wait(100)

        server.replies |= {"/once.mp4": [stall, reply(video)], "/never.mp4": [stall]}
        with scene.going() as http:
            once, never = (
                scene.submit_url(http, f"http://127.0.0.1:{server.port}/{name}.mp4", may_end, max_frames=3)
                for name, may_end in (("once", ("completed",)), ("never", ("failed",)))
            )
            other = scene.submit(http, max_frames=2)
            came_back = scene.ended(http, once, 200)
            shown = scene.ended(http, never, 200)
            waited = scene.ended(http, other, 200)
            assert shown["error_code"] == "download_failed", shown
            scene.audit(http)
    times: list[Any] = [each["completed_at"] - each["submitted_at"] for each in (came_back, waited)]
    gave_up_s = shown["failed_at"] - shown["submitted_at"]
    return Outcome(
        f"The one that comes back is completed after {times[0]:.0f} s; the other fails after {gave_up_s:.0f} s: "
        f"{shown['error_code']}: {shown['error_message']} A job behind the two was done after {times[1]:.0f} s.",
        "Retry the job, or send the file.",
    )
