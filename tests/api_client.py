"""A client of the API for tests, which also checks each answer against what /docs says."""

import json
import re
from typing import Any

import httpx
from serving import wait_until

from jobs.record import FINISHED
from jobs.schema import JobStatus, Problem

ELSEWHERE = "https://example.com/video.mp4"  # for jobs that never run


class Client(httpx.Client):
    """A new visitor. Asserts that the status and the media type of each answer are documented."""

    def __init__(self, url: str, **options: Any) -> None:
        super().__init__(base_url=url, timeout=30, trust_env=False, event_hooks={"response": [self._check]}, **options)
        paths = httpx.get(url + "/openapi.json", trust_env=False).json()["paths"]
        self._paths = {re.compile(re.sub(r"\{\w+\}", "[^/]+", path)): of for path, of in paths.items()}

    def _check(self, answer: httpx.Response) -> None:
        request = answer.request
        for path, operations in self._paths.items():
            operation = operations.get(request.method.lower())
            if path.fullmatch(request.url.path) and operation:
                told = operation["responses"].get(str(answer.status_code))
                assert told, f"{request.method} {request.url.path} {answer.status_code} is not in /docs"
                media_type = answer.headers.get("content-type", "").partition(";")[0]
                assert not answer.is_error or media_type in told.get("content", [media_type])
                return


def submit(client: httpx.Client, video_url: str = ELSEWHERE, **options: Any) -> str:
    """-> the job's id. Each frame is described, so that it takes a while."""
    answer = client.post("/api/submit", json={"video_url": video_url, "reuse_similar": 0, **options})
    assert answer.status_code == 202, answer.text
    return answer.json()["job_id"]


def upload(client: httpx.Client, video: bytes, **fields: Any) -> str:
    """-> the job's id. Each frame is described, so that it takes a while."""
    answer = client.post("/api/upload", files={"file": ("video.mp4", video)}, data={"reuse_similar": 0, **fields})
    assert answer.status_code == 202, answer.text
    return answer.json()["job_id"]


def status_of(client: httpx.Client, job_id: str) -> dict[str, Any]:
    answer = client.get(f"/api/status/{job_id}").raise_for_status()
    JobStatus.model_validate_json(answer.content, strict=True)
    return answer.json()


def ended(client: httpx.Client, job_id: str) -> dict[str, Any]:
    """Wait for a job's end -> its status then"""
    return wait_until(lambda: (shown := status_of(client, job_id))["status"] in FINISHED and shown, pause_s=0.1)


def running(client: httpx.Client, job_id: str) -> dict[str, Any]:
    """Wait for a job's first frames -> its status then"""
    return wait_until(lambda: (shown := status_of(client, job_id))["frames_processed"] > 0 and shown)


def called(http: httpx.Client, name: str, data: list[Any]) -> tuple[str, Any]:
    """Call an endpoint of Gradio's, as the page does -> its last event, and what came with it"""
    event_id = http.post(f"/gradio_api/call/{name}", json={"data": data}).json()["event_id"]
    lines = http.get(f"/gradio_api/call/{name}/{event_id}").text.split("\n")
    event, data_line = [line for line in lines if line and not line.startswith(":")][-2:]
    return event.removeprefix("event: "), json.loads(data_line.removeprefix("data: "))


def code_of(answer: httpx.Response) -> tuple[int, str]:
    """The number and the code of a refusal, which is a whole problem document."""
    assert answer.headers["content-type"] == "application/problem+json", answer.text
    problem = Problem.model_validate_json(answer.content)
    assert set(answer.json()) == {"type", "title", "status", "detail", "code"}
    assert (problem.type, problem.status) == ("about:blank", answer.status_code)
    assert problem.title and problem.detail
    return answer.status_code, str(problem.code)
