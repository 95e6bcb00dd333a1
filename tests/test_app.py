"""`python app.py` as its supervisor and its log see it. One job goes through all the ways in which a server can end."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from local_server import LocalServer, http
from serving import ROOT, ServerProcess, wait_until
from starlette.types import Receive, Scope, Send
from video_files import write_video

from app import let_go_of_stuck
from jobs.store import Document, JournalDB, owning

NUM_FRAMES = 50  # of the job: some seconds
SECRET = "hush-hush"
UNFINISHED = (
    b"POST /api/upload HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: multipart/form-data; boundary=b\r\n"
    b"Content-Length: 999\r\n\r\n--b"
)


class Reader:
    """Follows a job in a thread, as a page would."""

    def __init__(self, client: httpx.Client, job_id: str) -> None:
        self.seqs: list[int] = []
        self._client, self._job_id = client, job_id
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()
        wait_until(lambda: self.seqs)

    def has_ended(self) -> bool:
        self._thread.join(10)
        return not self._thread.is_alive()

    def _read(self) -> None:
        try:
            with self._client.stream("GET", f"/api/jobs/{self._job_id}/events") as answer:
                self.seqs += (int(line[4:]) for line in answer.iter_lines() if line.startswith("id: "))
        except httpx.HTTPError:
            pass


@dataclass
class Story:
    """What was seen of a job and its servers."""

    codes: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)  # that the ends took
    have_readers_ended: list[bool] = field(default_factory=list)
    num_frames: list[int] = field(default_factory=list)  # stored at these ends
    num_downloads: int = 0
    job_id: str = ""
    result: dict[str, Any] = field(default_factory=dict)
    undisturbed: dict[str, Any] = field(default_factory=dict)
    log: list[dict[str, Any]] = field(default_factory=list)


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    """The first server is killed in the download; the second gets two signals, the third one; the fourth finishes."""
    story, web, folder = Story(), LocalServer(), tmp_path_factory.mktemp("app")
    video = http(write_video(folder / "grey.avi", num_frames=NUM_FRAMES).read_bytes())
    settings: dict[str, Any] = {"allow_private_urls": "127.0.0.1", "log_format": "json", "slots": 2}
    with ExitStack() as stack:
        server = stack.enter_context(ServerProcess(folder / "data", **settings))
        stack.callback(web.stop)

        def die(connection: socket.socket) -> None:
            connection.sendall(video[:-1000])
            wait_until(lambda: list(server.settings["data_dir"].glob("jobs/*/video.part")))
            server.kill()

        web.replies["/video.mp4"] = [die, video]
        url = f"http://127.0.0.1:{web.port}/video.mp4?token={SECRET}"
        asked = {"video_url": url, "target_fps": 25, "reuse_similar": 0}
        with server.start(is_ready=False).client() as client:
            story.job_id = client.post("/api/submit", json=asked).json()["job_id"]
            assert server.process
            story.codes.append(server.process.wait(60))
        for num_signals in (2, 1):
            end_in_mid_job(server.start(), story, num_signals)
        with server.start().client() as client:
            story.result = finished(client, story.job_id)
            story.num_downloads = len(web.requests)
            story.undisturbed = finished(client, client.post("/api/submit", json=asked).json()["job_id"])
            missing = {"video_url": url.replace("video", "missing")}
            assert finished(client, client.post("/api/submit", json=missing).json()["job_id"])["status"] == "failed"
        story.codes.append(server.stop())
        story.log = [json.loads(line) for line in server.log.read_text(encoding="utf-8").splitlines()]
        yield story


def end_in_mid_job(server: ServerProcess, story: Story, num_signals: int) -> None:
    """With somebody who follows the job, and if there are to be two signals, with an upload that holds up the end."""
    assert server.process
    address = ("127.0.0.1", httpx.URL(server.url).port or 0)
    with server.client() as client, socket.create_connection(address) as upload:
        frames = [frame["seq"] for frame in client.get(f"/api/jobs/{story.job_id}/frames?limit=1000").json()["frames"]]
        reader = Reader(client, story.job_id)
        wait_until(lambda: len(reader.seqs) >= len(frames) + 5)
        if num_signals == 2:
            upload.sendall(UNFINISHED)
        started_s = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        if num_signals == 2:
            wait_until(lambda: "Stopping" in server.log.read_text().rpartition("Started server process")[2])
            server.process.send_signal(signal.SIGTERM)
        story.codes.append(server.process.wait(60))
        story.seconds.append(time.monotonic() - started_s)
        story.have_readers_ended.append(reader.has_ended())
        story.num_frames.append(len(reader.seqs))


def finished(client: httpx.Client, job_id: str) -> dict[str, Any]:
    def ended() -> dict[str, Any] | None:
        status = client.get(f"/api/status/{job_id}").json()
        return status if status["status"] in ("completed", "failed") else None

    return wait_until(ended, 120)


def told(status: dict[str, Any]) -> list[tuple[int, int, str, str]]:
    results = status["results_payload"]["frame_results"]
    return [(r["frame_idx"], r["timestamp_ms"], r["status"], r["description"]) for r in results]


def test_a_job_whose_servers_end_in_every_way_is_as_an_undisturbed_one(story: Story) -> None:
    assert story.result["status"] == "completed"
    assert told(story.result) == told(story.undisturbed) and len(told(story.result)) == NUM_FRAMES
    assert sorted(r["seq"] for r in story.result["results_payload"]["frame_results"]) == list(range(1, NUM_FRAMES + 1))


def test_a_cut_download_begins_again_and_a_complete_one_is_used_by_every_later_server(story: Story) -> None:
    assert story.num_downloads == 2


def test_a_signal_is_an_ordinary_end_and_a_second_one_ends_at_once(story: Story) -> None:
    """The first was told as a death by SIGTERM, and the second was ignored."""
    assert story.codes == [-signal.SIGKILL, 128 + signal.SIGTERM, 0, 0]
    assert max(story.seconds) < 12


def test_whoever_follows_a_job_is_let_go(story: Story) -> None:
    """An event stream held up the end until it was cut off."""
    assert story.have_readers_ended == [True, True]
    assert "Cancel" not in "".join(line["message"] for line in story.log)


def test_frames_in_flight_at_a_signal_are_stored_and_not_described_again(story: Story) -> None:
    assert 0 < story.num_frames[0] < story.num_frames[1] < NUM_FRAMES


def test_each_change_of_status_is_one_line_of_the_json_log(story: Story) -> None:
    lines = [line for line in story.log if line.get("job_id") == story.job_id]

    assert [line["status"] for line in lines] == [
        *("submitted", "processing"),
        *("submitted", "processing"),  # after the kill
        *("submitted", "processing", "submitted"),  # after the two signals, until the one
        *("processing", "completed"),
    ]
    assert {line["levelname"] for line in lines} == {"INFO"} and all(line["seconds"] >= 0 for line in lines)


def test_the_log_has_no_query_of_a_url(story: Story) -> None:
    text = json.dumps(story.log)

    assert SECRET not in text
    assert "127.0.0.1" in text and "it answered 404" in text


# What cannot be


def refused(*arguments: str, **environment: str) -> str:
    """-> what a server that ends with exit code 2 says"""
    command = [sys.executable, "app.py", "--model=demo", "--port=0", *arguments]
    run = subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)
    assert run.returncode == 2 and run.stdout == ""
    (said,) = run.stderr.splitlines()
    return said


def test_a_signal_that_the_system_hands_to_another_thread_ends_the_server() -> None:
    program = """
import signal, threading, time
from app import listen_to_signals, wait_for
signals = listen_to_signals()
threading.Timer(0.5, lambda: signal.pthread_kill(threading.get_ident(), signal.SIGTERM)).start()
wait_for(signals)
print(signals)
"""
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)

    assert (ended.stdout, ended.stderr) == (f"[{signal.SIGTERM}]\n", "")


def test_a_second_server_on_a_data_directory_is_refused(tmp_path: Path) -> None:
    with owning(tmp_path):
        assert refused(f"--data-dir={tmp_path}").startswith("error: Another process uses the data directory")


def test_a_lock_that_is_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "lock").mkdir()

    said = refused(f"--data-dir={tmp_path}")
    assert said.startswith(f"error: {tmp_path / 'lock'} cannot be used: Is a directory. Move it away")


def test_files_are_for_the_user_of_the_server_alone(tmp_path: Path) -> None:
    """Bug: with the usual umask, everybody on the machine could read videos, pictures and answers."""
    shell = 'umask 022 && exec "$0" app.py --model=demo --port=0 --data-dir "$1"'
    (tmp_path / "data" / "session-secret").mkdir(parents=True)  # it ends there, after it has made its files
    run = subprocess.run(["sh", "-c", shell, sys.executable, tmp_path / "data"], cwd=ROOT, capture_output=True)

    made = [path for path in (tmp_path / "data").rglob("*") if path.name != "session-secret"]
    assert run.returncode == 2 and len(made) > 4
    assert [path for path in made if path.stat().st_mode & 0o077] == []


def test_a_port_that_is_taken_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = refused(f"--port={port}", f"--data-dir={tmp_path}")

    assert said.startswith(f"error: Port {port} of 127.0.0.1 cannot be used: Address already in use")


def test_a_damaged_journal_is_named(tmp_path: Path) -> None:
    db = JournalDB(tmp_path / "jobs.jsonl")
    for doc_id in "12":
        db.named("jobs").insert(Document({"n": 1}, doc_id))
    db.close()
    path = tmp_path / "jobs.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"n":1', b'"n":2', 1))

    said = refused(f"--data-dir={tmp_path}")
    assert said.startswith(f"error: {path} is damaged in line 1") and "python -m jobs.store repair" in said


@pytest.mark.parametrize(
    ("arguments", "environment", "words"),
    [
        (["--port=none"], {}, "PORT"),
        (["--host=0.0.0.0"], {}, "API_KEYS"),
        ([], {"MOONREEL_PROT": "1"}, "There is no setting MOONREEL_PROT"),
        (["--webhook-secret=short"], {}, "webhook_secret has to be"),
    ],
)
def test_bad_settings_are_named(tmp_path: Path, arguments: list[str], environment: dict[str, str], words: str) -> None:
    said = refused(f"--data-dir={tmp_path}", *arguments, **environment)

    assert said.startswith("error: ") and words in said


def test_a_reader_that_takes_nothing_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the real server, with the page: python -m tests.faults readers_stop_reading"""
    is_reading, is_let_go = threading.Event(), threading.Event()

    async def endless(scope: Scope, receive: Receive, send: Send) -> None:
        async def flood() -> None:
            await send({"type": "http.response.start", "status": 200})
            while True:
                await send({"type": "http.response.body", "body": bytes(65536), "more_body": True})
                await asyncio.sleep(0)

        flooding = asyncio.create_task(flood())
        is_reading.set()
        while (await receive())["type"] != "http.disconnect":
            pass
        flooding.cancel()
        is_let_go.set()

    monkeypatch.setattr("app.STUCK_S", 1)
    server = uvicorn.Server(uvicorn.Config(endless, "127.0.0.1", 0, log_level="critical", lifespan="off"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_until(lambda: server.started)
        let_go_of_stuck(server)
        with socket.create_connection(server.servers[0].sockets[0].getsockname()) as deaf:
            deaf.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert is_reading.wait(30)
            assert is_let_go.wait(30)
    finally:
        server.should_exit = True
        thread.join()
