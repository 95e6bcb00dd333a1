"""The log of a real server: each line in one format, whoever wrote it."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import SAMPLE, ServerProcess, wait_until

SECRET = "hush-hush"
# The app with a route in which everything goes wrong that libraries write of in ways of their own.
PROGRAM = """
import sys, warnings, app
from fastapi import APIRouter

router = APIRouter()

@router.get("/api/break")
async def broken() -> None:
    print("printed in", "parts")
    warnings.warn("careful")
    raise ZeroDivisionError("broken")

app.ROUTERS.append(router)
sys.exit(app.main([]))
"""
LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} (INFO|WARNING|ERROR) [a-z_.]+: \S.*")
KEYS = ["asctime", "levelname", "name", "message"]
JOB_KEYS = {"job_id", "status", "seconds"}  # of a change of its status


class BreakingServer(ServerProcess):
    program = ("-c", PROGRAM)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """With the page, and without a model: the hub may not be asked for it."""
    folder = tmp_path_factory.mktemp("log")
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf")}
    settings: dict[str, Any] = {"model": "nobody/nothing", "page": True, "log_format": "json"}
    with BreakingServer(folder / "data", environment=environment, **settings) as server:
        yield server.start(is_ready=False)


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client


def test_without_a_model_the_page_is_served_jobs_wait_and_ready_says_what_to_do(client: httpx.Client) -> None:
    ready = wait_until(lambda: "HF_HUB_OFFLINE" in (answer := client.get("/api/ready")).text and answer)

    assert (ready.status_code, ready.json()["code"]) == (503, "not_ready")
    assert ready.json()["detail"] == (
        "The weights of nobody/nothing at main are not complete in the local cache, and HF_HUB_OFFLINE is set. "
        "Unset it, give a local folder with --model, or start with --model demo, which needs no download. "
        "The server tries again every 60 s."
    )
    assert client.get("/").status_code == 200
    sent = client.post("/api/upload", files={"file": ("a.mp4", SAMPLE.read_bytes())})
    assert client.get(f"/api/status/{sent.json()['job_id']}").json()["status"] == "submitted"


def test_every_line_of_the_json_log_has_the_same_keys(server: ServerProcess, client: httpx.Client) -> None:
    close = {"Connection": "close"}  # as the server does after an exception

    def is_broken() -> bool:
        """With its warning: one is lost where another thread leaves catch_warnings() at that moment."""
        assert client.get("/api/break", params={"token": SECRET}, headers=close).status_code == 500
        return "careful" in server.log.read_text(encoding="utf-8")

    wait_until(is_broken)
    assert client.get("/api/nothing", params={"token": SECRET}).status_code == 404
    wait_until(lambda: "HF_HUB_OFFLINE" in client.get("/api/ready").text)
    assert server.stop() == 0

    text = server.log.read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    assert all(list(line)[:4] == KEYS and set(line) - {*KEYS, "exc_info"} <= JOB_KEYS for line in lines)
    said = {(line["levelname"], line["name"]): line["message"] for line in lines}
    assert said["INFO", "moonreel"].startswith("The page is at http://127.0.0.1:")
    assert said["ERROR", "jobs.service"].startswith("No model: The weights of nobody/nothing")
    assert said["WARNING", "py.warnings"] == "UserWarning: careful (<string>:10)"
    assert said["ERROR", "uvicorn.error"] == "Exception in ASGI application\n"
    assert {line["message"] for line in lines if line["name"] == "stdout"} == {"printed in parts"}
    assert "ZeroDivisionError: broken" in next(line["exc_info"] for line in lines if "exc_info" in line)
    assert SECRET not in text


def test_every_line_of_the_text_log_is_one_of_ours(tmp_path: Path) -> None:
    with BreakingServer(tmp_path / "data", page=False).start(is_ready=False) as server:
        with server.client() as client:
            assert client.get("/api/nothing").status_code == 404
        assert server.stop() == 0

    lines = server.log.read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if not LINE.fullmatch(line)] == []
    assert {line.split()[3] for line in lines} >= {"uvicorn.error:", "jobs.service:"}
