"""The JSON API from submit to delete, over real HTTP. Reads as its documentation. Frames, exports and events are in
test_api_results.py, errors in test_api_refusals.py, keys and cookies in test_doors.py, uploads in test_uploads.py."""

import re
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from api_client import ELSEWHERE, Client, code_of, ended, running, status_of, submit
from local_server import NOT_FOUND, LocalServer, http
from serving import SAMPLE, RunningApp, running_app, wait_until

from jobs.schema import JobPage

JOB_ID = re.compile(r"job_[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[0-9a-f]{4}-[0-9a-f]{12}")
SOME_FRAMES, ALL_FRAMES = 25, 600  # of the sample, at 1 and at 24 per second


@pytest.fixture(scope="module")
def web() -> Iterator[LocalServer]:
    """Where the videos are."""
    web = LocalServer()
    web.replies["/sample.mp4"] = [http(SAMPLE.read_bytes(), headers=("Content-Type: video/mp4",))]
    yield web
    web.stop()


@pytest.fixture(scope="module")
def sample_url(web: LocalServer) -> str:
    return f"http://127.0.0.1:{web.port}/sample.mp4"


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningApp]:
    folder = tmp_path_factory.mktemp("api") / "data"
    settings = {"allow_private_urls": "127.0.0.1", "allow_anonymous": True, "rate_limit_per_minute": 10_000}
    with running_app(folder, **settings) as app:
        yield app


@pytest.fixture(scope="module")
def idle_app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningApp]:
    """Has no model, so its jobs wait for ever."""
    settings = {"model": "/nowhere", "allow_anonymous": True, "rate_limit_per_minute": 10_000}
    with running_app(tmp_path_factory.mktemp("idle") / "data", **settings) as app:
        yield app


@pytest.fixture
def client(app: RunningApp) -> Iterator[httpx.Client]:
    """A new visitor."""
    with Client(app.url) as client:
        yield client


@pytest.fixture
def idle(idle_app: RunningApp) -> Iterator[httpx.Client]:
    """A new visitor, of the server without a model."""
    with Client(idle_app.url) as client:
        yield client


@pytest.fixture(scope="module")
def done(app: RunningApp, sample_url: str) -> dict[str, Any]:
    """The status of a completed job."""
    with Client(app.url) as client:
        return ended(client, submit(client, sample_url + "?token=secret", metadata={"album": 7}))


@pytest.fixture
def long_job(client: httpx.Client, sample_url: str) -> Iterator[str]:
    """A job that runs for many seconds, with some frames described."""
    job_id = submit(client, sample_url, target_fps=24)
    running(client, job_id)
    yield job_id
    if client.post(f"/api/jobs/{job_id}/cancel").status_code == 200:
        ended(client, job_id)


# Submit


def test_submitting_a_url_answers_at_once_with_the_jobs_id(client: httpx.Client, sample_url: str) -> None:
    body = {"video_url": sample_url, "target_fps": 1, "question": "What is this?", "max_frames": 2}
    answer = client.post("/api/submit", json=body)

    job_id = answer.json()["job_id"]
    assert answer.status_code == 202
    assert answer.json() == {"job_id": job_id, "status": "submitted", "message": "Job submitted for processing."}
    assert JOB_ID.fullmatch(job_id)
    assert answer.headers["location"] == f"/api/status/{job_id}"
    assert ended(client, job_id)["status"] == "completed"


def test_url_rate_and_question_may_stand_in_the_query(idle: httpx.Client) -> None:
    answer = idle.post("/api/submit", params={"video_url": ELSEWHERE, "target_fps": 0.5, "question": "Who?"})

    shown = status_of(idle, answer.json()["job_id"])
    assert answer.status_code == 202
    assert (shown["video_url"], shown["input_target_fps"], shown["input_question"]) == (ELSEWHERE, 0.5, "Who?")


def test_what_the_body_says_goes_before_the_query(idle: httpx.Client) -> None:
    query = {"video_url": ELSEWHERE, "target_fps": 2, "question": "Who?"}
    answer = idle.post("/api/submit", params=query, json={"target_fps": 3, "max_frames": 5})

    shown = status_of(idle, answer.json()["job_id"])
    assert (shown["input_target_fps"], shown["input_question"]) == (3, "Who?")


def test_a_job_that_says_only_where_its_video_is_has_the_defaults(idle: httpx.Client) -> None:
    shown = status_of(idle, submit(idle))

    assert (shown["input_target_fps"], shown["input_question"]) == (1, "Describe this scene.")


# Status


def test_a_waiting_job_tells_its_place(idle: httpx.Client) -> None:
    first, second = (status_of(idle, submit(idle)) for _ in range(2))

    assert second["queue_position"] == first["queue_position"] + 1
    assert (second["status"], second["stage"], second["progress"]) == ("submitted", None, 0)
    assert second["results_payload"] is second["processing_started_at"] is second["total_frames_expected"] is None


def test_a_running_job_tells_how_far_it_is(client: httpx.Client, long_job: str) -> None:
    shown = status_of(client, long_job)

    assert (shown["status"], shown["stage"]) == ("processing", "describing")
    assert 0 < shown["frames_processed"] == shown["last_seq"] < shown["total_frames_expected"] == ALL_FRAMES
    assert 5 < shown["progress"] < 100
    assert shown["frames_per_second"] > 0 and shown["eta_seconds"] > 0
    assert shown["bytes_downloaded"] == SAMPLE.stat().st_size
    assert shown["model"]["id"] == "demo" and shown["results_payload"] is None


def test_the_frames_of_a_running_job_can_be_read_page_by_page(client: httpx.Client, long_job: str) -> None:
    wait_until(lambda: status_of(client, long_job)["frames_processed"] >= 5)
    first = client.get(f"/api/jobs/{long_job}/frames?limit=3").json()
    second = client.get(f"/api/jobs/{long_job}/frames", params={"after": first["next_after"], "limit": 2}).json()

    assert [frame["seq"] for frame in first["frames"] + second["frames"]] == [1, 2, 3, 4, 5]
    assert (first["next_after"], second["next_after"]) == (3, 5)
    assert not first["is_finished"] and not second["is_finished"]


def test_a_completed_job_has_every_field_of_the_contract(done: dict[str, Any]) -> None:
    assert set(done) >= {
        *("job_id", "status", "video_url", "input_target_fps", "input_question", "submitted_at", "canceled_at"),
        *("processing_started_at", "completed_at", "failed_at", "stage", "progress", "frames_processed"),
        *("total_frames_expected", "frames_failed", "frames_reused", "frames_per_second", "bytes_downloaded"),
        *("eta_seconds", "queue_position", "truncated", "warnings", "metadata", "model", "error_message"),
        *("error_code", "results_payload"),
    }
    assert (done["status"], done["progress"], done["stage"], done["queue_position"]) == ("completed", 100, None, None)
    assert done["frames_processed"] == done["total_frames_expected"] == done["last_seq"] == SOME_FRAMES
    assert (done["frames_failed"], done["frames_reused"], done["truncated"], done["warnings"]) == (0, 0, False, [])
    assert time.time() - 60 < done["submitted_at"] <= done["processing_started_at"] <= done["completed_at"]
    assert done["failed_at"] is done["canceled_at"] is done["error_message"] is done["error_code"] is None
    assert (done["duration_s"], done["metadata"]) == (25, {"album": 7})


def test_its_results_have_every_field_of_the_contract(done: dict[str, Any]) -> None:
    results = done["results_payload"]
    assert set(results) >= {
        *("video_url", "target_fps_setting", "actual_original_fps", "total_frames_submitted_to_workers"),
        *("total_frames_results_received", "timings_seconds", "model", "frame_results"),
    }
    stages = ("video_download", "frame_extraction", "distributed_frame_processing_map", "overall_pipeline_internal")
    assert set(results["timings_seconds"]) == set(stages)
    assert results["timings_seconds"]["overall_pipeline_internal"] == max(results["timings_seconds"].values()) > 0
    assert results["model"] == {"id": "demo", "revision": None, "device": "cpu", "dtype": "float32"}
    assert results["video_url"] == done["video_url"]
    assert (results["target_fps_setting"], results["actual_original_fps"]) == (1, 24)
    assert results["total_frames_submitted_to_workers"] == results["total_frames_results_received"] == SOME_FRAMES


def test_each_of_its_frames_has_every_field_of_the_contract(done: dict[str, Any]) -> None:
    frames = done["results_payload"]["frame_results"]

    assert [frame["frame_idx"] for frame in frames] == [24 * n for n in range(SOME_FRAMES)]
    assert [frame["timestamp_ms"] for frame in frames] == [1000 * n for n in range(SOME_FRAMES)]
    assert {frame["job_id_for_frame"] for frame in frames} == {done["job_id"]}
    assert {frame["status"] for frame in frames} == {"success"}
    assert frames[0]["description"].startswith("A red circle at the top left")
    for frame in frames:
        times_ms = frame["processing_times_ms"]
        assert set(times_ms) == {"image_encode", "llm_inference", "total_worker_frame_time"}
        assert 0 < times_ms["image_encode"] <= times_ms["total_worker_frame_time"]


def test_results_can_be_left_out(client: httpx.Client, done: dict[str, Any]) -> None:
    shown = client.get(f"/api/status/{done['job_id']}?include_results=false").json()

    assert set(done) - set(shown) == {"results_payload"}


def test_a_part_of_a_video_is_described(client: httpx.Client, sample_url: str) -> None:
    shown = ended(client, submit(client, sample_url, start_s=5, end_s=8, target_fps=2))

    times_ms = [frame["timestamp_ms"] for frame in shown["results_payload"]["frame_results"]]
    assert times_ms == [5000, 5500, 6000, 6500, 7000, 7500]
    assert (shown["start_s"], shown["end_s"], shown["truncated"]) == (5, 8, False)


def test_max_frames_takes_the_first_and_says_that_it_cut(client: httpx.Client, sample_url: str) -> None:
    shown = ended(client, submit(client, sample_url, start_s=5, max_frames=2))

    results = shown["results_payload"]
    assert [frame["timestamp_ms"] for frame in results["frame_results"]] == [5000, 6000]
    assert shown["truncated"] and results["truncated"]
    assert shown["total_frames_expected"] == shown["frames_processed"] == 2


def test_a_caption_length_takes_the_place_of_the_question(client: httpx.Client, sample_url: str) -> None:
    short, long = (
        ended(client, submit(client, sample_url, max_frames=1, caption_length=length)) for length in ("short", "long")
    )

    texts = [shown["results_payload"]["frame_results"][0]["description"] for shown in (short, long)]
    assert [short["caption_length"], long["caption_length"]] == ["short", "long"]
    assert 0 < len(texts[0]) < len(texts[1])


def test_a_job_whose_video_cannot_be_had_fails_and_can_be_retried(
    client: httpx.Client, web: LocalServer, sample_url: str
) -> None:
    web.replies["/late.mp4"] = [NOT_FOUND]
    job_id = submit(client, sample_url.replace("sample", "late"), max_frames=1)
    failed = ended(client, job_id)
    web.replies["/late.mp4"] = web.replies["/sample.mp4"]
    client.post(f"/api/jobs/{job_id}/retry").raise_for_status()

    assert (failed["status"], failed["error_code"], failed["results_payload"]) == ("failed", "download_failed", None)
    assert failed["failed_at"] and failed["error_message"]
    retried = ended(client, job_id)
    assert (retried["status"], retried["error_code"], retried["failed_at"]) == ("completed", None, None)


# List


def test_the_list_has_ones_jobs_newest_first_in_pages(idle: httpx.Client) -> None:
    job_ids = [submit(idle) for _ in range(5)]
    pages, cursor = [], ""
    while cursor is not None:
        page = JobPage.model_validate(idle.get("/api/jobs/list", params={"limit": 2, "cursor": cursor}).json())
        pages.append([job.job_id for job in page.jobs])
        cursor = page.next_cursor
        assert page.total_count == 5

    assert pages == [[job_ids[4], job_ids[3]], [job_ids[2], job_ids[1]], [job_ids[0]]]


def test_the_list_can_be_filtered_by_status(idle: httpx.Client) -> None:
    job_ids = [submit(idle) for _ in range(3)]
    idle.post(f"/api/jobs/{job_ids[1]}/cancel")
    canceled = idle.get("/api/jobs/list?status_filter=canceled").json()
    waiting = idle.get("/api/jobs/list?status_filter=submitted&limit=1").json()

    assert [job["job_id"] for job in canceled["jobs"]] == [job_ids[1]] and canceled["total_count"] == 1
    assert [job["job_id"] for job in waiting["jobs"]] == [job_ids[2]] and waiting["total_count"] == 2


@pytest.mark.parametrize("query", ["limit=0", "limit=101", "status_filter=done", "cursor=x"])
def test_a_list_that_cannot_be_is_refused(idle: httpx.Client, query: str) -> None:
    answer = idle.get(f"/api/jobs/list?{query}")

    assert code_of(answer) == (422, "invalid_field")
    assert answer.json()["detail"].startswith(query.partition("=")[0])


# Cancel, retry, delete


def test_canceling_a_running_job_is_quick_and_keeps_what_it_has(client: httpx.Client, long_job: str) -> None:
    asked_s = time.monotonic()
    answer = client.post(f"/api/jobs/{long_job}/cancel")
    canceled = ended(client, long_job)

    assert answer.status_code == 200 and time.monotonic() - asked_s < 5
    assert canceled["status"] == "canceled" and canceled["canceled_at"] and canceled["progress"] < 100
    page = client.get(f"/api/jobs/{long_job}/frames?limit=1000").json()
    assert 0 < len(page["frames"]) == canceled["frames_processed"] < ALL_FRAMES
    assert page["is_finished"]


def test_canceling_again_is_harmless(idle: httpx.Client) -> None:
    job_id = submit(idle)
    answers = [idle.post(f"/api/jobs/{job_id}/cancel") for _ in range(2)]

    assert [answer.status_code for answer in answers] == [200, 200]
    assert answers[0].json() == answers[1].json() == status_of(idle, job_id)
    assert answers[0].json()["status"] == "canceled"


def test_what_is_completed_can_be_neither_canceled_nor_retried(client: httpx.Client, done: dict[str, Any]) -> None:
    assert code_of(client.post(f"/api/jobs/{done['job_id']}/cancel")) == (409, "job_finished")
    assert code_of(client.post(f"/api/jobs/{done['job_id']}/retry")) == (409, "not_retryable")


def test_a_retry_goes_on_and_describes_nothing_twice(client: httpx.Client, sample_url: str) -> None:
    job_id = submit(client, sample_url, target_fps=2, end_s=18)
    running(client, job_id)
    client.post(f"/api/jobs/{job_id}/cancel")
    canceled = ended(client, job_id)
    before = client.get(f"/api/jobs/{job_id}/frames?limit=1000").json()["frames"]
    retried = client.post(f"/api/jobs/{job_id}/retry")
    completed = ended(client, job_id)

    assert (canceled["status"], completed["status"]) == ("canceled", "completed")
    assert retried.status_code == 200 and retried.json()["status"] == "submitted"
    after = client.get(f"/api/jobs/{job_id}/frames?limit=1000").json()["frames"]
    assert 0 < len(before) < len(after) == completed["frames_processed"] == 36
    assert after[: len(before)] == before
    assert [frame["seq"] for frame in after] == list(range(1, 37)), "a frame stored twice would leave a gap"


def test_a_job_that_runs_or_waits_cannot_be_retried(client: httpx.Client, idle: httpx.Client, long_job: str) -> None:
    assert code_of(client.post(f"/api/jobs/{long_job}/retry")) == (409, "job_running")
    assert code_of(idle.post(f"/api/jobs/{submit(idle)}/retry")) == (409, "job_running")


def test_a_deleted_job_is_gone_with_all_it_kept(app: RunningApp, client: httpx.Client, sample_url: str) -> None:
    job_id = ended(client, submit(client, sample_url, max_frames=1))["job_id"]
    folder = app.service.store.files.of(job_id)
    assert (folder / "video").exists()

    answer = client.delete(f"/api/jobs/{job_id}")

    assert (answer.status_code, answer.content) == (204, b"")
    assert not folder.exists()
    assert code_of(client.delete(f"/api/jobs/{job_id}")) == (404, "job_not_found")
    for path in ("status/{}", "jobs/{}/frames", "jobs/{}/video", "jobs/{}/frames/0.jpg", "jobs/{}/export"):
        gone = client.get(f"/api/{path.format(job_id)}")
        assert code_of(gone) == (404, "job_not_found")
        assert gone.json()["detail"].startswith("Job ID not found in store")


def test_a_running_job_cannot_be_deleted_a_waiting_one_can(
    client: httpx.Client, idle: httpx.Client, long_job: str
) -> None:
    assert code_of(client.delete(f"/api/jobs/{long_job}")) == (409, "job_running")
    assert idle.delete(f"/api/jobs/{submit(idle)}").status_code == 204
