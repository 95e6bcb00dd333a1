"""The kill loop, for a few runs, and that its audit finds what it is there for.

The long one: python -m tests.kill_loop --runs 200
"""

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import kill_loop
import pytest
from kill_audit import Audit, attempts, by_frame
from kill_clients import Job

from jobs.job_store import JobStore
from jobs.schema import JobRequest
from jobs.store import JournalDB

FRAMES = [{"frame_idx": 10 * i, "timestamp_ms": 400 * i, "description": "A.", "status": "success"} for i in range(3)]


def test_kills_lose_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    code = kill_loop.kill_loop(1, seed=3, folder=tmp_path)

    output = capsys.readouterr().out
    found = json.loads(output.splitlines()[-1])
    assert code == 0, output
    assert found["runs"] == sum(found["killed_at"].values()) == 1
    assert found["acknowledged"] >= 1 and found["frames"] > 0


def answers(status: str, frames: list[dict[str, Any]]) -> httpx.Client:
    """A server that has the job j1, with these frames."""
    summary = {"job_id": "j1", "metadata": {"number": 1}, "status": status, "error_message": None}
    whole = {**summary, "frames_processed": len(frames), "last_seq": len(frames)}
    whole["results_payload"] = {"frame_results": by_frame(frames)}
    pages = {
        "/api/jobs/list": {"jobs": [summary], "next_cursor": None},
        "/api/status/j1": whole,
        "/api/jobs/j1/frames": {"frames": frames},
    }
    transport = httpx.MockTransport(lambda request: httpx.Response(200, json=pages[request.url.path]))
    return httpx.Client(transport=transport, base_url="http://server")


def numbered(frames: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**frame, "seq": seq} for seq, frame in enumerate(frames, 1)]


def complaints(job: Job, status: str = "completed", frames: list[dict[str, Any]] | None = None) -> Counter[str]:
    with answers(status, numbered(FRAMES) if frames is None else frames) as http:
        audit = Audit(http, {"upload": FRAMES})
        audit.check_jobs([job])
    del audit.counts["frames"]
    return audit.counts


def job(**fields: Any) -> Job:
    return Job(1, "upload", None, [], **{"job_id": "j1", **fields})


def test_a_job_as_it_has_to_be_gives_no_complaint() -> None:
    assert not complaints(job(seen=numbered(FRAMES)[:2]))
    assert not complaints(job(may_end={"canceled"}), "canceled", numbered(FRAMES)[:1])
    assert not complaints(job(may_end={"canceled"}, last_seq_at_cancel=3))  # it had just finished


@pytest.mark.parametrize(
    "what, about, status, frames",
    [
        ("lost", job(job_id="j2"), "completed", None),
        ("lost", job(), "completed", numbered(FRAMES[:2])),
        ("lost", job(seen=[{**FRAMES[0], "seq": 1, "num_tokens": 3}]), "completed", None),
        ("lost", job(may_end={"deleted"}), "deleted", None),
        ("lost", job(may_end={"canceled"}, last_seq_at_cancel=2), "completed", None),
        ("lost", job(), "canceled", None),
        ("failed", job(), "failed", None),
        ("duplicated", job(), "completed", numbered([*FRAMES, FRAMES[0]])),
        ("duplicated", job(), "completed", [{**frame, "seq": 7} for frame in FRAMES]),
        ("differing", job(), "completed", numbered([{**frame, "description": "B."} for frame in FRAMES])),
    ],
)
def test_what_is_not_as_acknowledged_is_found(what: str, about: Job, status: str, frames: Any) -> None:
    assert complaints(about, status, frames)[what] >= 1


def test_what_is_left_on_the_disk_is_found(tmp_path: Path) -> None:
    audit = Audit(answers("completed", []), {})
    for name in ("jobs/j1/frames", "jobs/j2", "incoming"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "jobs.jsonl").write_text("no journal\n" * 2)
    (tmp_path / "jobs/j1/frames/0.part").touch()
    with JournalDB(tmp_path / "jobs/j1/frames.jsonl") as frames:
        for seq in (1, 2):
            frames.named("frames").put({"0": {"seq": seq}})

    audit.check_disk(tmp_path, {"j1"})

    assert audit.counts == {"left_over": 2, "duplicated": 1, "damaged": 1}


def test_a_filled_journal_is_compacted_soon_and_holds_the_same(tmp_path: Path) -> None:
    store = JobStore(tmp_path)
    job_id = store.add(JobRequest.model_validate({"video_url": "http://video.example/v.mp4"}).model_dump(), "me")
    store.close()

    assert kill_loop.fill(tmp_path, random.Random(1))

    num_lines = len((tmp_path / "jobs.jsonl").read_bytes().splitlines())
    store = JobStore(tmp_path)
    store.claim(0)
    for stage in ("downloading", "describing") * 11:
        store.update(job_id, stage=stage)
    store.close()
    assert num_lines > 900 > 25 > len((tmp_path / "jobs.jsonl").read_bytes().splitlines())


def test_a_frame_that_was_alone_at_a_death_is_seen_until_it_is_stored(tmp_path: Path) -> None:
    store = JobStore(tmp_path)
    job_id = store.add(JobRequest.model_validate({"video_url": "http://video.example/v.mp4"}).model_dump(), "me")
    store.claim(0)
    attempt = {"is_open": True, "num_starts": 1, "frame_idx": 10, "timestamp_ms": 400, "num_deaths": 1}
    store.update(job_id, attempt=attempt)
    pinned = list(attempts(tmp_path))
    with store.frames(job_id) as frames:
        frames.append([FRAMES[1]])
    after = list(attempts(tmp_path))
    store.close()

    assert pinned == [{**attempt, "is_pinned": True}]
    assert after == [{**attempt, "is_pinned": False}]
