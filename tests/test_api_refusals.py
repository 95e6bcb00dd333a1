"""What the API refuses, and how: problem documents with stable codes. And what it says of itself: ready?, /docs."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from api_client import ELSEWHERE, Client, code_of, ended, status_of, submit, upload
from pool_watch import Watch
from serving import SAMPLE, RunningApp, ServerProcess, running_app, wait_until

from pipeline.moondream.checkpoint import Checkpoint


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningApp]:
    """Has no model, so its jobs wait for ever."""
    settings = {"model": "/nowhere", "allow_anonymous": True, "rate_limit_per_minute": 10_000}
    with running_app(tmp_path_factory.mktemp("idle") / "data", **settings) as app:
        yield app


@pytest.fixture
def client(app: RunningApp) -> Iterator[httpx.Client]:
    with Client(app.url) as client:
        yield client


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, "video_url"),
        ({"video_url": ELSEWHERE, "target_fps": 0}, "target_fps"),
        ({"video_url": ELSEWHERE, "target_fps": "fast"}, "target_fps"),
        ({"video_url": ELSEWHERE, "question": "x" * 4001}, "question"),
        ({"video_url": ELSEWHERE, "start_s": 5, "end_s": 4}, "end_s"),
        ({"video_url": ELSEWHERE, "max_frames": 0}, "max_frames"),
        ({"video_url": ELSEWHERE, "caption_length": "endless"}, "caption_length"),
        ({"video_url": ELSEWHERE, "max_tokens": 257}, "max_tokens"),
        ({"video_url": ELSEWHERE, "webhook_url": "http://127.0.0.1/hook"}, "webhook_url"),
        ({"video_url": ELSEWHERE, "metadata": {"text": "x" * 4096}}, "metadata"),
        ({"video_url": ELSEWHERE, "fps": 1}, "fps"),
        ({"video_url": 7}, "video_url"),
        ([], "dictionary"),
    ],
)
def test_a_wrong_field_is_named(client: httpx.Client, body: Any, words: str) -> None:
    answer = client.post("/api/submit", json=body)

    assert code_of(answer) == (422, "invalid_field")
    assert words in answer.json()["detail"]


@pytest.mark.parametrize("query", ["target_fps=0", "target_fps=nan", "target_fps=x", f"question={'x' * 4001}"])
def test_a_wrong_parameter_is_named(client: httpx.Client, query: str) -> None:
    answer = client.post(f"/api/submit?video_url={ELSEWHERE}&{query}")

    assert code_of(answer) == (422, "invalid_field")
    assert answer.json()["detail"].startswith(query.partition("=")[0])


@pytest.mark.parametrize(
    "body", [b"", b"{", b"\xff", b'{"video_url": NaN}', b'{"video_url": "\\ud800"}', b"[" * 60_000]
)
def test_a_body_that_is_not_the_jobs_json_is_refused(client: httpx.Client, body: bytes) -> None:
    answer = client.post("/api/submit", content=body, headers={"Content-Type": "application/json"})

    assert code_of(answer) == (422, "invalid_field")


@pytest.mark.parametrize(
    "video_url",
    [
        "ftp://example.com/video.mp4",
        "file:///etc/passwd",
        "video.mp4",
        "https://user:password@example.com/video.mp4",
        "https://example.com:22/video.mp4",
        "http://127.0.0.1/video.mp4",
        "http://169.254.169.254/latest/meta-data",
        "http://[::1]/video.mp4",
        "upload:video.mp4",
        "data/jobs.jsonl",
    ],
)
def test_a_url_that_may_not_be_followed_is_refused_at_once(client: httpx.Client, video_url: str) -> None:
    answer = client.post("/api/submit", json={"video_url": video_url})

    assert code_of(answer) == (400, "invalid_video_url")
    assert answer.json()["detail"].startswith("Invalid video URL")
    assert "user:" not in answer.text


@pytest.mark.parametrize("job_id", ["job_8f14e45f-ceea-467f-9b1d-3a2c1f0e7d55", "%2e%2e", "x" * 2000, "%00", "job_%ff"])
def test_a_job_that_is_not_there_is_not_found(client: httpx.Client, job_id: str) -> None:
    for method, path in (("GET", "frames"), ("GET", "video"), ("GET", "events"), ("POST", "cancel"), ("POST", "retry")):
        answer = client.request(method, f"/api/jobs/{job_id}/{path}")

        assert answer.status_code == 404
        assert answer.headers["content-type"] == "application/problem+json"


def test_an_address_that_is_not_there_is_not_found(client: httpx.Client) -> None:
    assert code_of(client.get("/api/nothing")) == (404, "not_found")


@pytest.mark.parametrize("path", ["submit", "upload", "jobs/job_1/cancel", "jobs/job_1/retry", "session"])
def test_another_method_is_refused_and_told_which_one_works(client: httpx.Client, path: str) -> None:
    answer = client.get(f"/api/{path}")

    assert code_of(answer) == (405, "method_not_allowed")
    assert "GET" not in answer.headers["allow"]


def test_a_body_that_is_too_large_is_refused(client: httpx.Client) -> None:
    answer = client.post("/api/submit", json={"video_url": ELSEWHERE, "question": "x" * 65_536})

    assert code_of(answer) == (413, "too_large")


def test_a_file_that_is_no_video_is_refused(client: httpx.Client) -> None:
    answer = client.post("/api/upload", files={"file": ("video.mp4", b"not a video at all")})

    assert code_of(answer) == (415, "not_a_video")


# Once only


def test_the_same_idempotency_key_gives_the_same_job(client: httpx.Client) -> None:
    body, headers = {"video_url": ELSEWHERE, "metadata": {"a": 1, "b": 2}}, {"Idempotency-Key": "order-1"}
    same = {"metadata": {"b": 2, "a": 1}, "video_url": ELSEWHERE, "target_fps": 1}
    answers = [client.post("/api/submit", json=asked, headers=headers) for asked in (body, same)]

    assert [answer.status_code for answer in answers] == [202, 202]
    assert answers[0].json() == answers[1].json()
    assert client.get("/api/jobs/list").json()["total_count"] == 1


def test_the_same_idempotency_key_with_another_body_is_refused(client: httpx.Client) -> None:
    headers = {"Idempotency-Key": "order-1"}
    client.post("/api/submit", json={"video_url": ELSEWHERE}, headers=headers)
    other = client.post("/api/submit", json={"video_url": ELSEWHERE, "target_fps": 2}, headers=headers)

    assert code_of(other) == (422, "idempotency_mismatch")


def test_an_idempotency_key_is_its_callers_own(client: httpx.Client, app: RunningApp) -> None:
    headers = {"Idempotency-Key": "order-1"}
    with Client(app.url) as neighbour:
        answers = [c.post("/api/submit", json={"video_url": ELSEWHERE}, headers=headers) for c in (client, neighbour)]

    assert answers[0].json()["job_id"] != answers[1].json()["job_id"]


def test_an_uploads_idempotency_key_looks_at_the_file_too(client: httpx.Client) -> None:
    video, headers = SAMPLE.read_bytes(), {"Idempotency-Key": "upload-1"}
    files = [video, video, video + b"\0"]
    first, again, other = (
        client.post("/api/upload", files={"file": ("video.mp4", file)}, headers=headers) for file in files
    )

    assert first.status_code == 202 and first.json() == again.json()
    assert code_of(other) == (422, "idempotency_mismatch")


def test_an_idempotency_key_has_255_characters_at_most(client: httpx.Client) -> None:
    answers = [
        client.post("/api/submit", json={"video_url": ELSEWHERE}, headers={"Idempotency-Key": "k" * length})
        for length in (255, 256)
    ]

    assert answers[0].status_code == 202
    assert code_of(answers[1]) == (422, "invalid_field")


# Too much


def test_a_full_queue_says_when_to_come_back(tmp_path: Path) -> None:
    with running_app(tmp_path / "data", model="/nowhere", max_queued_jobs=1) as app, Client(app.url) as client:
        job_id = submit(client)
        answer = client.post("/api/submit", json={"video_url": ELSEWHERE})
        client.post(f"/api/jobs/{job_id}/cancel")
        submit(client)
        retried = client.post(f"/api/jobs/{job_id}/retry")

    assert code_of(answer) == code_of(retried) == (429, "queue_full")
    assert int(answer.headers["retry-after"]) > 0


def test_who_asks_too_often_is_told_when_to_come_back(tmp_path: Path) -> None:
    settings = {"model": "/nowhere", "allow_anonymous": True, "rate_limit_per_minute": 1}
    with running_app(tmp_path / "data", **settings) as app, Client(app.url) as client:
        job_id = submit(client)
        answers = [client.post("/api/submit", json={"video_url": ELSEWHERE}), client.delete(f"/api/jobs/{job_id}")]
        answers.append(client.post("/api/session", json={"key": "a key that is only guessed"}))
        assert status_of(client, job_id)["status"] == "submitted", "reading is free"

    for answer in answers:
        assert code_of(answer) == (429, "rate_limited")
        assert 0 < int(answer.headers["retry-after"]) <= 60


def test_a_full_disk_is_told_before_anything_is_accepted(tmp_path: Path) -> None:
    with running_app(tmp_path / "data", model="/nowhere", min_free_bytes=1 << 62) as app, Client(app.url) as client:
        by_url = client.post("/api/submit", json={"video_url": ELSEWHERE})
        by_upload = client.post("/api/upload", files={"file": ("video.mp4", SAMPLE.read_bytes())})
        assert app.service.store.index.count() == 0

    assert code_of(by_url) == code_of(by_upload) == (507, "storage_full")


# Ready or not


def test_without_a_model_the_server_is_alive_but_not_ready_and_jobs_are_accepted(client: httpx.Client) -> None:
    answer = wait_until(lambda: "/nowhere" in (answer := client.get("/api/ready")).text and answer)

    assert code_of(answer) == (503, "not_ready")
    assert "neither a folder" in answer.json()["detail"] and int(answer.headers["retry-after"]) > 0
    assert client.get("/api/health").json() == {"status": "ok"}
    assert status_of(client, submit(client))["status"] == "submitted"


def test_while_one_instance_works_the_server_is_ready_with_a_warning(
    tmp_path: Path, demo: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A load balancer would send the jobs elsewhere, or nowhere."""
    sick, well = Watch(demo), Watch(demo)
    sick.fails = lambda in_engine: True
    monkeypatch.setattr("pipeline.pool.FIRST_PAUSE_S", 0.1)
    monkeypatch.setattr("pipeline.pool.MAX_PAUSE_S", 0.3)
    monkeypatch.setattr(
        "pipeline.moondream.instances.engine_makers", lambda *args: [sick.make_engine, well.make_engine]
    )
    with running_app(tmp_path / "data") as app, Client(app.url) as client:
        while len(sick.engines) <= 1:  # until it has been given frames
            job_id = upload(client, SAMPLE.read_bytes(), reuse_similar=0)
            assert ended(client, job_id)["frames_failed"] == 0
        warned = wait_until(lambda: "taken out" in (answer := client.get("/api/ready")).text and answer)
        assert warned.status_code == 200
        assert warned.json()["warnings"][0].startswith("Instance 1 is taken out after ")
        assert "moonreel_instances_working 1.0" in client.get("/metrics").text

        well.fails = sick.fails
        job_id = upload(client, SAMPLE.read_bytes(), max_frames=1)
        refused = wait_until(lambda: (answer := client.get("/api/ready")).status_code == 503 and answer)
        assert code_of(refused) == (503, "not_ready") and "Instance 2 " in refused.json()["detail"]
        sick.fails = lambda in_engine: False
        assert ended(client, job_id)["status"] == "completed"


def test_while_the_model_is_loaded_the_server_says_so_and_jobs_wait_for_it(tmp_path: Path) -> None:
    """The question's length can be judged only then: such a job fails, where later ones are refused."""
    video, too_long = SAMPLE.read_bytes(), "why " * 900
    with ServerProcess(tmp_path / "data").start(is_ready=False) as server, Client(server.url) as client:
        loading = client.get("/api/ready")
        jobs = [upload(client, video, max_frames=1), upload(client, video, max_frames=1, question=too_long)]
        ready = wait_until(lambda: (answer := client.get("/api/ready")).status_code == 200 and answer.json())
        refused = client.post("/api/submit", json={"video_url": ELSEWHERE, "question": too_long})
        described, failed = (ended(client, job_id) for job_id in jobs)

    assert code_of(loading) == (503, "not_ready")
    assert loading.json()["detail"] == "The model demo is being loaded."
    model = {"id": "demo", "revision": None, "device": "cpu", "dtype": "float32"}
    assert ready == {"status": "ready", "model": model, "warnings": [], "nodes": []}
    assert described["status"] == "completed"
    assert (failed["status"], failed["error_code"]) == ("failed", "question_too_long")
    assert code_of(refused) == (422, "question_too_long")


# The documentation


def test_the_documentation_is_a_page(client: httpx.Client) -> None:
    answer = client.get("/docs")

    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/html")


def test_each_route_documents_its_refusals_as_problems(client: httpx.Client) -> None:
    for path, operations in client.get("/openapi.json").json()["paths"].items():
        for method, operation in operations.items():
            told = operation["responses"]
            asks = {"post": {"422", "429"}, "delete": {"429"}}.get(method, set()) if "session" not in path else set()
            assert {"400", "401", "403"} | asks <= set(told), path
            assert "404" in told or "{job_id}" not in path, path
            for status, response in told.items():
                assert status < "400" or "application/problem+json" in response.get("content", {}) or status == "416"


def test_what_the_documentation_refers_to_is_there_and_has_examples(client: httpx.Client) -> None:
    document = client.get("/openapi.json").json()
    schemas = document["components"]["schemas"]

    assert set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(document))) <= set(schemas)
    for schema, field in (("SubmitBody", "video_url"), ("Submitted", "job_id"), ("Problem", "code")):
        assert schemas[schema]["properties"][field]["examples"]
    for field in schemas["SubmitBody"]["properties"].values():
        assert field.get("description") or field.get("examples")
    codes = schemas["ErrorCode"]["enum"]
    assert {"invalid_video_url", "job_not_found", "queue_full", "not_ready", "method_not_allowed"} <= set(codes)


def test_the_upload_form_documents_the_file_and_all_fields_of_a_job(client: httpx.Client) -> None:
    document = client.get("/openapi.json").json()
    form = document["paths"]["/api/upload"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    body = document["components"]["schemas"]["SubmitBody"]

    assert set(form["properties"]) == {*body["properties"], "file"} - {"video_url"}
    assert form["required"] == ["file"]
