"""Starts of a job, with a real store, pool and decoder; a death is that of a process where it is about such."""

import dataclasses
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from job_bench import DEMO, Bench, Death, skippable
from local_server import Lab, LocalServer, http
from serving import wait_until
from video_files import write_video

from jobs.job_run import RunOptions
from jobs.views import FrameCounts, status
from pipeline.moondream.checkpoint import Checkpoint
from pipeline.pool import PROOF_IDX
from pipeline.results import FrameResult

ROOT = Path(__file__).parent.parent
NUM_FRAMES = 12  # of the videos here; their pictures are described in two ways


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("videos") / "grey.avi", num_frames=NUM_FRAMES)


@pytest.fixture
def bench(tmp_path: Path, demo: Checkpoint, lab: Lab) -> Iterator[Bench]:
    bench = Bench(tmp_path, demo, lab)
    yield bench
    bench.close()


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, demo: Checkpoint, video: Path) -> list[tuple[Any, ...]]:
    """What an undisturbed run says of the video."""
    bench = Bench(tmp_path_factory.mktemp("undisturbed"), demo, Lab())
    job_id = bench.upload(video)
    assert bench.run(job_id)["status"] == "completed"
    told = bench.told(job_id)
    bench.close()
    assert [frame_idx for frame_idx, *_ in told] == list(range(NUM_FRAMES))
    assert len({description for *_, description in told}) > 1
    return told


def seqs(bench: Bench, job_id: str) -> list[int]:
    return [result["seq"] for result in bench.results(job_id)]


# A run


def test_a_job_is_downloaded_sampled_described_and_stored(
    bench: Bench, server: LocalServer, video: Path, expected: list[Any]
) -> None:
    server.replies["/video.mp4"] = [http(video.read_bytes())]
    job_id = bench.submit(bench.serve(server))
    record = bench.run(job_id)

    assert (record["status"], record["stage"], record["container"]) == ("completed", None, "avi")
    assert record["model"] == vars(DEMO)
    assert (record["num_frames"], record["num_frames_expected"], record["num_frames_failed"]) == (12, 12, 0)
    assert all(seconds > 0 for seconds in record["timings"].values()) and len(record["timings"]) == 4
    assert bench.told(job_id) == expected and seqs(bench, job_id) == list(range(1, 13))
    assert len(list(bench.store.files.of(job_id).glob("frames/*.jpg"))) == NUM_FRAMES
    assert bench.store.live(job_id) is None


def test_stage_progress_rate_and_eta_are_known_while_it_runs(bench: Bench, server: LocalServer, video: Path) -> None:
    seen: list[dict[str, Any]] = []

    def look(results: list[FrameResult] | None = None) -> None:
        with bench.store.frames(job_id) as frames:
            counts = FrameCounts(len(frames), 0, 0, frames.last_seq)
        seen.append(status(bench.store.get(job_id), counts, bench.store.live(job_id), None, None))

    def reply(connection: socket.socket) -> None:
        content = http(video.read_bytes())
        connection.sendall(content[: len(content) // 2])
        wait_until(lambda: (live := bench.store.live(job_id)) and live.bytes_downloaded)
        look()
        connection.sendall(content[len(content) // 2 :])

    server.replies["/video.mp4"] = [reply]
    job_id = bench.submit(bench.serve(server))
    bench.is_told = look
    bench.run(job_id)

    downloading, *describing = seen
    assert downloading["stage"] == "downloading" and downloading["bytes_downloaded"] > 0
    assert 0 < downloading["progress"] < 5 and downloading["frames_per_second"] is None
    assert len(describing) > 2 and {state["stage"] for state in describing} == {"describing"}
    assert [state["progress"] for state in describing] == sorted({state["progress"] for state in describing})
    assert all(state["frames_per_second"] > 0 for state in describing)
    assert describing[0]["eta_seconds"] > describing[-1]["eta_seconds"] == 0


@pytest.mark.parametrize(
    ("content", "request_", "code", "words"),
    [
        (b"no video", {}, "not_a_video", "video"),
        (None, {"start_s": 9}, "no_frames", "No frames extracted from video"),
        (None, {"question": "why? " * 400}, "question_too_long", "shorter question"),
    ],
)
def test_what_a_video_or_question_cannot_give_is_the_jobs_error(
    bench: Bench, video: Path, tmp_path: Path, content: bytes | None, request_: dict[str, Any], code: str, words: str
) -> None:
    given = tmp_path / "given.avi"
    given.write_bytes(video.read_bytes() if content is None else content)
    record = bench.run(bench.upload(given, **request_))

    assert (record["status"], record["error_code"]) == ("failed", code)
    assert words in str(record["error_message"])


def test_an_upload_that_is_gone_is_the_jobs_error(bench: Bench, video: Path) -> None:
    job_id = bench.upload(video)
    bench.store.files.video(job_id).unlink()

    assert bench.run(job_id)["error_code"] == "video_not_found"


def test_a_request_that_is_not_understood_fails_its_job(bench: Bench) -> None:
    """One stored by another version. It stumbled before the job could fail, which then ran for ever."""
    job_id = bench.store.add({"video_url": "upload:x", "webhook_url": None}, "me")
    bench.store.update(job_id, request={"video_url": "upload:x", "target_fps": 0, "webhook_url": None})

    assert bench.run(job_id)["error_code"] == "internal_error"


# Going on


def test_a_stopped_job_stores_what_is_in_flight_and_goes_on_after_it(
    bench: Bench, video: Path, expected: list[Any]
) -> None:
    job_id = bench.upload(video)
    bench.after_frames(3, lambda: bench.worker.begin_stop())
    record = bench.run(job_id)

    assert (record["status"], record["stage"]) == ("submitted", None)
    assert bench.told(job_id) == expected[: len(bench.watch.submitted)]
    assert 3 <= record["num_frames"] == len(bench.watch.submitted) < NUM_FRAMES
    bench.reopen()
    assert bench.run(job_id)["status"] == "completed"
    assert bench.told(job_id) == expected
    assert bench.watch.submitted == list(range(NUM_FRAMES))


def test_a_job_whose_server_died_goes_on_after_its_last_stored_frame(
    bench: Bench, video: Path, expected: list[Any]
) -> None:
    """However often that happens, as long as there is a new frame each time."""
    job_id = bench.upload(video)
    for _ in range(3):
        bench.after_frames(1, die)
        with pytest.raises(Death):
            bench.run(job_id)
        bench.reopen()
    num_stored = bench.num_described
    bench.is_told = lambda results: None

    assert bench.run(job_id)["status"] == "completed"
    assert 3 <= num_stored < bench.num_described == NUM_FRAMES
    assert bench.told(job_id) == expected and seqs(bench, job_id) == list(range(1, 13))


def die() -> None:
    raise Death


def test_a_download_that_was_cut_begins_again_and_a_complete_one_serves(
    bench: Bench, server: LocalServer, video: Path, expected: list[Any]
) -> None:
    def cut(connection: socket.socket) -> None:
        connection.sendall(http(video.read_bytes())[:-100])
        wait_until(lambda: (live := bench.store.live(job_id)) and live.bytes_downloaded)
        bench.worker.begin_stop()
        connection.recv(1)

    server.replies["/video.mp4"] = [cut, http(video.read_bytes())]
    job_id = bench.submit(bench.serve(server))
    assert bench.run(job_id)["status"] == "submitted"
    assert sorted(path.name for path in bench.store.files.of(job_id).iterdir()) == ["frames", "frames.jsonl"]
    bench.reopen()
    bench.after_frames(3, lambda: bench.worker.begin_stop())
    assert bench.run(job_id)["status"] == "submitted"
    bench.reopen()

    assert bench.run(job_id)["status"] == "completed"
    assert bench.told(job_id) == expected
    assert len(server.requests) == 2


@pytest.mark.parametrize("changed", [{"id": "other"}, {"revision": "2"}, {"dtype": "bfloat16"}])
def test_a_job_begun_with_another_model_fails(bench: Bench, video: Path, changed: dict[str, str]) -> None:
    job_id = bench.upload(video)
    bench.store.update(job_id, model={**vars(DEMO), "device": "cuda", **changed})
    record = bench.run(job_id)

    assert (record["status"], record["error_code"], record["num_frames"]) == ("failed", "model_changed", 0)
    assert "this server now runs demo in float32" in str(record["error_message"])


def test_a_retry_with_another_model_starts_over(bench: Bench, video: Path, expected: list[Any]) -> None:
    job_id = bench.upload(video)
    bench.after_frames(3, lambda: bench.worker.begin_stop())
    bench.run(job_id)
    bench.reopen(model=dataclasses.replace(DEMO, id="other"))
    first = (record := bench.run(job_id))["last_seq"] + 1
    assert record["error_code"] == "model_changed" and 3 < first == len(bench.results(job_id)) + 1
    bench.store.retry(job_id)
    record = bench.run(job_id)

    assert (record["status"], record["model"]) == ("completed", vars(bench.model))
    assert bench.num_described > NUM_FRAMES and seqs(bench, job_id) == [*range(first, first + 12)]
    assert bench.told(job_id) == expected


def test_a_deadline_ends_a_job_and_retry_goes_on(
    bench: Bench, video: Path, expected: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    skip = skippable(monkeypatch, "jobs.job_run")
    bench.reopen(options=RunOptions(deadline_s=3600))
    job_id = bench.upload(video)
    bench.after_frames(3, lambda: skip(3601))
    record = bench.run(job_id)

    assert (record["status"], record["error_code"]) == ("failed", "deadline_exceeded")
    assert "longer than 3600 s" in str(record["error_message"])
    assert bench.told(job_id) == expected[: record["num_frames"]] and record["num_frames"] >= 3
    bench.store.retry(job_id)
    assert bench.run(job_id)["status"] == "completed"
    assert bench.told(job_id) == expected and bench.num_described == NUM_FRAMES


# Frames that fail


def test_a_frame_that_fails_is_recorded_and_the_job_goes_on(bench: Bench, video: Path, expected: list[Any]) -> None:
    bench.watch.fails = lambda in_engine: 5 in in_engine
    job_id = bench.upload(video)
    record = bench.run(job_id)

    assert (record["status"], record["num_frames"], record["num_frames_failed"]) == ("completed", 12, 1)
    assert bench.told(job_id) == [*expected[:5], (5, 200, "error", ""), *expected[6:]]
    assert "The model fails on this frame" in bench.results(job_id)[5]["error_message"]


def test_failures_in_a_row_fail_the_job_with_the_first_cause(bench: Bench, video: Path) -> None:
    """The last one's was told."""

    def fails(in_engine: set[int]) -> bool:
        if max(in_engine) >= 2:
            raise RuntimeError(f"cause {max(min(in_engine), 2)}")
        return False

    bench.watch.fails = fails
    bench.reopen(options=RunOptions(max_failures_in_row=4))
    job_id = bench.upload(video)
    record = bench.run(job_id)

    assert (record["status"], record["error_code"]) == ("failed", "too_many_failures")
    assert str(record["error_message"]).startswith("4 frames in a row could not be described. The first: ")
    first, *_, last = (r["error_message"] for r in bench.results(job_id) if r["status"] == "error")
    assert "cause 2" in first != last and first in str(record["error_message"])


def test_failures_are_counted_through_a_restart_and_anew_after_a_retry(bench: Bench, video: Path) -> None:
    bench.watch.fails = lambda in_engine: max(in_engine) > 0
    bench.reopen(options=RunOptions(max_failures_in_row=8))
    job_id = bench.upload(video)
    bench.after_frames(2, lambda: bench.worker.begin_stop())
    assert bench.run(job_id)["status"] == "submitted"
    bench.reopen()
    record = bench.run(job_id)
    assert (record["error_code"], record["num_frames_failed"]) == ("too_many_failures", 8)

    bench.watch.fails = lambda in_engine: 1 in in_engine
    bench.store.retry(job_id)
    record = bench.run(job_id)
    assert (record["status"], record["num_frames_failed"]) == ("completed", 1)


def test_a_retry_does_failed_frames_again_and_no_others(bench: Bench, video: Path, expected: list[Any]) -> None:
    bench.watch.fails = lambda in_engine: not in_engine.isdisjoint({2, 5, 6, 7})
    bench.reopen(options=RunOptions(max_failures_in_row=3))
    job_id = bench.upload(video)
    assert bench.run(job_id)["status"] == "failed"
    num_stored, last_seq = bench.num_described, bench.results(job_id)[-1]["seq"]
    bench.watch.fails = lambda in_engine: False
    bench.store.retry(job_id)
    bench.reopen()

    assert bench.run(job_id)["status"] == "completed"
    assert bench.told(job_id) == expected and bench.num_described == NUM_FRAMES
    assert [r["frame_idx"] for r in bench.results(job_id) if r["seq"] <= last_seq] == [0, 1, 3, 4]
    assert num_stored == 4 and sorted(seqs(bench, job_id))[-8:] == list(range(last_seq + 1, last_seq + 9))


def test_a_job_without_any_description_fails(bench: Bench, video: Path) -> None:
    bench.watch.fails = lambda in_engine: PROOF_IDX not in in_engine
    record = bench.run(bench.upload(video, max_frames=2))
    assert (record["status"], record["error_code"]) == ("failed", "nothing_described")
    assert "illegal memory access" in str(record["error_message"])


def test_a_full_disk_fails_the_job_and_loses_nothing(
    bench: Bench, video: Path, expected: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    write, is_full = os.write, False

    def write_if_there_is_room(fd: int, line: bytes) -> int:
        frames = is_full and os.readlink(f"/proc/self/fd/{fd}").endswith("frames.jsonl")
        return write(fd, line[: len(line) // 2] if frames else line)

    def fill() -> None:
        nonlocal is_full
        is_full = True

    monkeypatch.setattr("jobs.journal.os.write", write_if_there_is_room)
    job_id = bench.upload(video)
    bench.after_frames(3, fill)
    record = bench.run(job_id)

    assert (record["status"], record["error_code"]) == ("failed", "storage_full")
    assert "The disk of this host is full" in str(record["error_message"])
    assert 3 <= record["num_frames"] < NUM_FRAMES and bench.told(job_id) == expected[: record["num_frames"]]
    bench.reopen()
    is_full = False
    bench.store.retry(job_id)
    assert bench.run(job_id)["status"] == "completed"
    assert bench.told(job_id) == expected


# Deaths


def starts_needed(bench: Bench, *poisonous: int) -> int:
    """Have a server that these frames kill work everything off."""
    bench.close()
    command = [sys.executable, "tests/poison_server.py", str(bench.folder / "data"), *map(str, poisonous)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    bench.open()
    return int(run.stdout)


def test_frames_that_kill_the_server_are_found_and_neither_their_neighbours_nor_other_jobs_are_blamed(
    bench: Bench, video: Path, expected: list[Any], tmp_path: Path
) -> None:
    """The first death tells nothing, the second and the third are over frame 0 alone; the next two over frame 4."""
    poisoned = bench.upload(video)
    innocent = bench.upload(write_video(tmp_path / "wide.avi", (80, 48), num_frames=14))

    assert starts_needed(bench, 0, 4) == 6
    assert bench.told(poisoned) == [(0, 0, "error", ""), *expected[1:4], (4, 160, "error", ""), *expected[5:]]
    assert bench.results(poisoned)[4]["error_message"] == "The server died 2 times while it described this frame."
    assert [(r["frame_idx"], r["status"]) for r in bench.results(innocent)] == [(i, "success") for i in range(14)]
    assert {bench.store.get(job_id)["status"] for job_id in (poisoned, innocent)} == {"completed"}


def test_a_job_of_nothing_but_deaths_fails_and_the_next_one_runs(bench: Bench, video: Path, tmp_path: Path) -> None:
    """After three errors in a row: the first costs three starts, the others two."""
    deadly = bench.upload(video)
    harmless = bench.upload(write_video(tmp_path / "wide.avi", (80, 48)))

    assert starts_needed(bench, *range(NUM_FRAMES)) == 8
    record = bench.store.get(deadly)
    assert (record["error_code"], record["num_frames_failed"]) == ("too_many_failures", 3)
    assert bench.store.get(harmless)["status"] == "completed"
    assert bench.store.get(harmless)["num_frames_failed"] == 0


def test_a_job_that_dies_three_times_before_any_frame_fails_and_the_next_one_runs(
    bench: Bench, video: Path, expected: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only what died in the model was counted: a picture that used up the memory killed the server for ever."""
    deadly, next_one = bench.upload(video), bench.upload(video)
    with monkeypatch.context() as patch:
        patch.setattr("jobs.job_run.thumbnail", lambda image: die())
        for _ in range(3):
            with pytest.raises(Death):
                bench.run(deadly)
            bench.reopen()
        record = bench.run(deadly)

    assert (record["status"], record["error_code"]) == ("failed", "server_died")
    assert "started 3 times" in str(record["error_message"])
    assert bench.run(next_one)["status"] == "completed"
    bench.store.retry(deadly)
    assert bench.run(deadly)["status"] == "completed" and bench.told(deadly) == expected
