"""The app on Gradio's server: the page is served, gradio_client gets the API's answers, Gradio's own doors are shut.

What the page does is tested in a browser, by test_page.py."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from api_client import called
from gradio_client import Client, handle_file
from serving import ROOT, SAMPLE, ServerProcess, wait_until

from jobs.schema import JobPage, JobStatus, ResultsPayload

NO_TOKEN: Any = False  # Gradio's type says str | None


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("ui") / "data"
    ssr = {"GRADIO_SSR_MODE": "true"}  # as a Space sets it
    with ServerProcess(folder, page=True, environment=ssr).start() as server:
        yield server
        assert server.stop() == 0


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Client:
    return Client(server.url, verbose=False, token=NO_TOKEN, analytics_enabled=False)


def named(client: Client) -> dict[str, Any]:
    listed = client.view_api(return_format="dict", print_info=False)
    assert isinstance(listed, dict)
    return listed["named_endpoints"]


def test_the_page_is_served_and_the_api_answers_json_beside_it(server: ServerProcess) -> None:
    with server.client() as http:
        page, ready, docs, nothing = (http.get(path) for path in ("/", "/api/ready", "/docs", "/api/nothing"))

    assert page.status_code == 200 and "Moonreel" in page.text
    assert ready.json()["model"]["id"] == "demo"
    assert docs.status_code == 200
    assert (nothing.status_code, nothing.json()["code"]) == (404, "not_found")


def test_gradio_client_sees_our_endpoints_and_no_others(client: Client) -> None:
    endpoints = named(client)

    assert set(endpoints) == {"/submit", "/submit_file", "/status", "/list", "/wait", "/result", "/cancel"}
    assert [p["parameter_name"] for p in endpoints["/submit"]["parameters"]][:3] == [
        "video_url",
        "target_fps",
        "question",
    ]


def test_gradio_client_uploads_waits_and_gets_the_same_answers_as_the_api(
    client: Client, server: ServerProcess
) -> None:
    job_id = client.predict(handle_file(SAMPLE), 2, api_name="/submit_file")["job_id"]
    shown: list[dict[str, Any]] = list(client.submit(job_id, api_name="/wait"))  # type: ignore[assignment]
    result = client.predict(job_id, api_name="/result")
    listed = client.predict(api_name="/list")
    status = client.predict(job_id, True, api_name="/status")

    assert shown[-1]["status"] == "completed" and shown[-1]["video_url"] == "upload:sample.mp4"
    assert len(ResultsPayload.model_validate(result).frame_results) == 50
    assert job_id in [job.job_id for job in JobPage.model_validate(listed).jobs]
    JobStatus.model_validate(status)
    with server.client() as http:
        assert http.get(f"/api/status/{job_id}").json() == status


def test_the_example_of_the_readme_saves_subtitles(
    server: ServerProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"<!-- client -->\n```python\n(.*?)```", readme, re.DOTALL)
    (tmp_path / "pipeline").symlink_to(ROOT / "pipeline")
    monkeypatch.chdir(tmp_path)

    exec(compile(example.replace("http://127.0.0.1:7860", server.url), "README.md", "exec"), {})

    assert (tmp_path / "sample.vtt").read_text(encoding="utf-8").startswith("WEBVTT")
    assert "100%" in capfd.readouterr().err


def test_gradio_client_is_told_what_is_wrong_in_the_apis_words(client: Client, tmp_path: Path) -> None:
    text = tmp_path / "text.mp4"
    text.write_text("This is no video at all.")
    for words, args, name in (
        ("Invalid video URL", ("ftp://example.com/video.mp4",), "/submit"),
        ("target_fps", ("https://example.com/video.mp4", -1), "/submit"),
        ("This file is text, not a video", (handle_file(text),), "/submit_file"),
        ("Job ID not found in store", ("job_0",), "/status"),
        ("Job ID not found in store", ("job_0",), "/cancel"),
    ):
        with pytest.raises(Exception, match=words):
            client.predict(*args, api_name=name)


def test_the_page_asks_about_a_frame_through_gradios_queue(server: ServerProcess) -> None:
    with server.client() as http:
        job_id = http.post("/api/upload", files={"file": ("v.mp4", SAMPLE.read_bytes())}).json()["job_id"]
        wait_until(lambda: http.get(f"/api/status/{job_id}").json()["status"] == "completed")
        events = [called(http, "ask", [job_id, frame_idx, "How many objects are there?"]) for frame_idx in (0, 1)]

    (event, (answer,)), refused = events
    assert event == "complete"
    assert (answer["job_id"], answer["timestamp_ms"], answer["answer"]) == (job_id, 0, "Two.")
    assert refused[0] == "error" and "no result for a frame 1" in str(refused[1])


def test_a_job_can_be_canceled_by_gradio_client(client: Client, server: ServerProcess) -> None:
    job_id = client.predict(handle_file(SAMPLE), 24, api_name="/submit_file")["job_id"]
    client.predict(job_id, api_name="/cancel")

    with server.client() as http:
        wait_until(lambda: http.get(f"/api/status/{job_id}").json()["status"] == "canceled")
    with pytest.raises(Exception, match="there are no complete results"):
        client.predict(job_id, api_name="/result")


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/gradio_api/process_recording"),
        ("GET", "/monitoring"),
        ("GET", "/monitoring/summary"),
        ("GET", "/gradio_api/proxy=https://example.com/"),
        ("POST", "/gradio_api/run/submit"),
        ("GET", "/gradio_api/file=/etc/passwd"),
        ("GET", "/gradio_api/file=README.md"),
        ("GET", "/gradio_api/file=https://example.com/"),
        ("GET", "/gradio_api/file/README.md"),
        ("GET", "/gradio_api/custom_component/x/client/component/x.js"),
        ("POST", "/gradio_api/component_server"),
        ("GET", "/gradio_api%2Ffile=README.md"),
        ("GET", "/gradio%5Fapi/queue/status"),
        ("GET", "//gradio_api/queue/status"),
        ("GET", "/gradio_api//info"),
        ("GET", "/Gradio_API/info"),
        ("GET", "/gradio_api/info/"),
    ],
)
def test_what_gradio_leaves_open_is_shut_however_it_is_spelled(server: ServerProcess, method: str, path: str) -> None:
    with server.client() as http:
        answer = http.request(method, httpx.URL(server.url).copy_with(raw_path=path.encode()))

    assert (answer.status_code, answer.json()["code"]) == (404, "not_found")


def test_pages_of_other_sites_change_nothing_through_gradio_either(server: ServerProcess) -> None:
    with server.client() as http:
        origin = {"Origin": "https://evil.example"}
        upload = http.post("/gradio_api/upload", files={"files": b"x"}, headers=origin)
        call = http.post("/gradio_api/call/submit", json={"data": ["https://example.com/v.mp4"]}, headers=origin)

    assert (upload.status_code, call.status_code) == (403, 403)
    assert "access-control-allow-origin" not in upload.headers


def test_the_server_stops_within_its_time_with_a_reader_attached(tmp_path: Path) -> None:
    with ServerProcess(tmp_path / "data", page=True).start() as server:
        with server.client() as http:
            sample = SAMPLE.read_bytes()
            job_id = http.post(
                "/api/upload", files={"file": ("v.mp4", sample)}, data={"target_fps": 3, "reuse_similar": 0}
            ).json()["job_id"]
            with http.stream("GET", f"/api/jobs/{job_id}/events") as events:
                lines = events.iter_lines()
                next(line for line in lines if line == "event: frame")
                assert server.process
                server.process.terminate()
                for _ in lines:  # until the stream ends
                    pass
        assert server.process.wait(40) == 0  # 3 s for connections, 10 s for frames, and a busy machine
        server.start()
        with server.client() as http:
            wait_until(lambda: http.get(f"/api/status/{job_id}").json()["status"] == "completed")
            frames = http.get(f"/api/status/{job_id}").json()["results_payload"]["frame_results"]

    assert len(frames) == 75
    assert sorted(frame["seq"] for frame in frames) == list(range(1, 76))
