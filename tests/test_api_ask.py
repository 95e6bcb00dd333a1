"""Other questions about a job's video, over real HTTP and by the demo model: about one frame, and about all of them."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from api_client import Client, code_of, ended, running, submit, upload
from serving import SAMPLE, RunningApp, running_app

from jobs.http import MAX_ASKED_BY_ONE
from pipeline.frames import sample_frames

HOW_MANY = "How many objects are there?"


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningApp]:
    settings = {"allow_anonymous": True, "rate_limit_per_minute": 10_000}
    with running_app(tmp_path_factory.mktemp("ask") / "data", **settings) as app:
        yield app


@pytest.fixture(scope="module")
def client(app: RunningApp) -> Iterator[httpx.Client]:
    with Client(app.url) as client:
        yield client


@pytest.fixture(scope="module")
def done(client: httpx.Client) -> dict[str, Any]:
    """The status of a completed job over seconds 5 to 10 of the sample."""
    return ended(
        client, upload(client, SAMPLE.read_bytes(), target_fps=2, start_s=5, end_s=10, metadata='{"album": 7}')
    )


def ask(client: httpx.Client, job_id: str, question: str = HOW_MANY, **more: Any) -> httpx.Response:
    return client.post(f"/api/jobs/{job_id}/ask", json={"question": question, **more})


def frames_of(status: dict[str, Any]) -> list[dict[str, Any]]:
    return status["results_payload"]["frame_results"]


def test_a_question_about_one_frame_is_answered_at_once_and_not_stored(
    client: httpx.Client, done: dict[str, Any]
) -> None:
    frame = frames_of(done)[0]
    answer = ask(client, done["job_id"], frame_idx=frame["frame_idx"])

    shown = {"job_id": done["job_id"], "frame_idx": 120, "timestamp_ms": 5000, "question": HOW_MANY}
    assert answer.status_code == 200
    assert answer.json() == {**shown, "answer": "Three."}
    assert client.get(f"/api/status/{done['job_id']}").json() == done


def test_a_frame_asked_the_jobs_own_question_gets_the_jobs_own_answer(
    client: httpx.Client, done: dict[str, Any]
) -> None:
    frames = frames_of(done)[::4]
    question = done["input_question"]
    assert [ask(client, done["job_id"], question, frame_idx=f["frame_idx"]).json()["answer"] for f in frames] == [
        frame["description"] for frame in frames
    ]


@pytest.mark.parametrize("leads_to", [0, None])
def test_a_frame_is_found_by_its_number_where_the_index_leads_astray(
    client: httpx.Client, done: dict[str, Any], monkeypatch: pytest.MonkeyPatch, leads_to: int | None
) -> None:
    wrong = next(sample_frames(SAMPLE, 1)) if leads_to == 0 else None
    monkeypatch.setattr("jobs.api_ask.seek_frame", lambda *args: wrong)
    frame = frames_of(done)[-1]
    answer = ask(client, done["job_id"], done["input_question"], frame_idx=frame["frame_idx"])

    assert answer.json()["answer"] == frame["description"]
    assert next(sample_frames(SAMPLE, 1)).frame_idx != frame["frame_idx"]


def test_a_question_about_all_frames_is_a_new_job_over_the_same_video(
    app: RunningApp, client: httpx.Client, done: dict[str, Any]
) -> None:
    answer = ask(client, done["job_id"])
    assert answer.status_code == 202
    assert answer.headers["location"] == f"/api/status/{answer.json()['job_id']}"
    asked = ended(client, answer.json()["job_id"])

    assert asked["status"] == "completed" and asked["job_id"] != done["job_id"]
    assert (asked["source_job_id"], asked["input_question"]) == (done["job_id"], HOW_MANY)
    for name in ("video_url", "input_target_fps", "start_s", "end_s", "metadata"):
        assert asked[name] == done[name]
    marks = [[(frame["frame_idx"], frame["timestamp_ms"]) for frame in frames_of(shown)] for shown in (asked, done)]
    assert marks[0] == marks[1]
    assert {frame["description"] for frame in frames_of(asked)} <= {"One.", "Two.", "Three.", "Four."}
    videos = [app.service.store.files.video(shown["job_id"]) for shown in (asked, done)]
    assert os.path.samefile(*videos)


def test_a_video_that_jobs_share_is_counted_once_also_after_a_restart(tmp_path: Path) -> None:
    """Each of them counted it, so that other jobs had to go for room that was not taken."""
    video, size = SAMPLE.read_bytes(), SAMPLE.stat().st_size
    with running_app(tmp_path / "data") as app, Client(app.url) as client:
        first = ended(client, upload(client, video, max_frames=1))["job_id"]
        second = ended(client, ask(client, first).json()["job_id"])["job_id"]
        third = ended(client, ask(client, second).json()["job_id"])["job_id"]
        assert size < app.service.store.files.total_bytes < 2 * size
    with running_app(tmp_path / "data") as app, Client(app.url) as client:
        assert size < app.service.store.files.total_bytes < 2 * size
        client.delete(f"/api/jobs/{first}").raise_for_status()
        assert size < app.service.store.files.total_bytes < 2 * size
    with running_app(tmp_path / "data") as app, Client(app.url) as client:
        for job_id in (second, third):
            assert size < app.service.store.files.total_bytes < 2 * size
            client.delete(f"/api/jobs/{job_id}").raise_for_status()
        assert app.service.store.files.total_bytes == 0


def test_a_repeated_question_with_its_key_is_the_same_job(client: httpx.Client, done: dict[str, Any]) -> None:
    url, headers = f"/api/jobs/{done['job_id']}/ask", {"Idempotency-Key": "once"}
    ids = [client.post(url, json={"question": HOW_MANY}, headers=headers).json()["job_id"] for _ in "ab"]

    assert ids[0] == ids[1]


def test_who_is_shown_a_job_does_not_learn_the_id_of_the_one_it_was_asked_of(
    app: RunningApp, client: httpx.Client, done: dict[str, Any]
) -> None:
    asked = ask(client, done["job_id"]).json()["job_id"]
    ended(client, asked)
    with Client(app.url) as friend:
        paths = (f"/api/status/{asked}", f"/api/jobs/{asked}/events", f"/api/jobs/{asked}/export")
        told = [friend.get(path).text for path in paths]

    assert done["job_id"] in client.get(f"/api/status/{asked}").text
    assert all(asked in text and done["job_id"] not in text for text in told)


def test_one_caller_cannot_take_all_places(app: RunningApp, client: httpx.Client, done: dict[str, Any]) -> None:
    app.service.api.asked["127.0.0.1"] = MAX_ASKED_BY_ONE
    answer = ask(client, done["job_id"], frame_idx=120)
    del app.service.api.asked["127.0.0.1"]

    assert code_of(answer) == (429, "rate_limited")
    assert ask(client, done["job_id"], frame_idx=120).status_code == 200
    assert not app.service.api.asked


def test_the_new_job_outlives_the_one_that_it_was_asked_of(client: httpx.Client) -> None:
    first = ended(client, upload(client, SAMPLE.read_bytes(), max_frames=1))
    second = ask(client, first["job_id"]).json()["job_id"]
    assert client.delete(f"/api/jobs/{first['job_id']}").status_code == 204

    assert ended(client, second)["status"] == "completed"
    assert client.get(f"/api/jobs/{second}/video").content == SAMPLE.read_bytes()


def test_a_running_job_is_asked_about_a_frame_but_not_about_all(client: httpx.Client) -> None:
    job_id = upload(client, SAMPLE.read_bytes(), target_fps=24)
    running(client, job_id)
    one, every = ask(client, job_id, frame_idx=0), ask(client, job_id)
    client.post(f"/api/jobs/{job_id}/cancel")
    ended(client, job_id)

    assert (one.status_code, one.json()["answer"]) == (200, "Two.")
    assert code_of(every) == (409, "job_running")


def test_what_cannot_be_asked_is_told(app: RunningApp, client: httpx.Client, done: dict[str, Any]) -> None:
    job_id = done["job_id"]
    without = ended(client, submit(client, "https://nowhere.invalid/video.mp4"))["job_id"]

    assert code_of(ask(client, job_id, frame_idx=121)) == (404, "frame_not_found")
    assert code_of(ask(client, job_id, " ")) == (422, "invalid_field")
    assert code_of(ask(client, job_id, frame_idx=-1)) == (422, "invalid_field")
    assert code_of(ask(client, job_id, "why " * 900, frame_idx=120)) == (422, "question_too_long")
    assert code_of(ask(client, job_id, "why " * 900)) == (422, "question_too_long")
    assert code_of(ask(client, "job_0")) == (404, "job_not_found")
    assert code_of(ask(client, without)) == (404, "video_not_kept")
    assert list(app.service.store.files.incoming.iterdir()) == []


def test_a_frame_cannot_be_asked_about_while_there_is_no_model(tmp_path: Path) -> None:
    with running_app(tmp_path / "data", model="/nowhere") as app, Client(app.url) as client:
        answer = ask(client, upload(client, SAMPLE.read_bytes()), frame_idx=0)

    assert code_of(answer) == (503, "not_ready")


def test_the_sample_video_can_be_had_from_the_server(client: httpx.Client) -> None:
    whole, part = client.get("/api/sample.mp4"), client.get("/api/sample.mp4", headers={"Range": "bytes=4-7"})

    assert (whole.headers["content-type"], whole.content) == ("video/mp4", SAMPLE.read_bytes())
    assert (part.status_code, part.content) == (206, b"ftyp")
