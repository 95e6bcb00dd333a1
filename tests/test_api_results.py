"""What a job has found out, over real HTTP: frames, pictures, the video, exports, events; and who is told: webhooks and
/metrics."""

import base64
import csv
import io
import json
import socket
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import av
import httpx
import pytest
import webvtt
from api_client import Client, ended, running, status_of, submit, upload
from local_server import LocalServer, http
from prometheus_client.parser import text_string_to_metric_families
from serving import SAMPLE, RunningApp, running_app, wait_until
from standardwebhooks import Webhook

from jobs.schema import FramePage, JobSummary

SECRET = "whsec_" + base64.b64encode(bytes(range(32))).decode()
NUM_FRAMES = 25
Event = tuple[str, str, Any]  # its name, id and data; a comment is ("", "", its text)


def events_in(answer: httpx.Response) -> Iterator[Event]:
    """Read a stream of events as browsers do."""
    fields: dict[str, str] = {}
    for line in answer.iter_lines():
        name, _, value = line.partition(": ")
        if not name and value:
            yield "", "", value
        elif name:
            fields[name] = value
        elif fields:
            yield fields.get("event", ""), fields.get("id", ""), json.loads(fields["data"])
            fields = {}


def events_of(client: httpx.Client, job_id: str, last_event_id: str | None = None) -> list[Event]:
    headers = {"Last-Event-ID": last_event_id} if last_event_id is not None else {}
    with client.stream("GET", f"/api/jobs/{job_id}/events", headers=headers) as answer:
        assert answer.status_code == 200
        return list(events_in(answer))


def metrics_of(client: httpx.Client) -> dict[tuple[str, str], float]:
    """Values by name and label."""
    families = text_string_to_metric_families(client.get("/metrics").raise_for_status().text)
    samples = [sample for family in families for sample in family.samples]
    return {(sample.name, next(iter(sample.labels.values()), "")): sample.value for sample in samples}


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningApp]:
    folder = tmp_path_factory.mktemp("results") / "data"
    settings = {"allow_private_urls": "127.0.0.1", "rate_limit_per_minute": 10_000, "webhook_secret": SECRET}
    with running_app(folder, **settings) as app:
        yield app


@pytest.fixture(scope="module")
def idle_app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningApp]:
    """Has no model, so its jobs wait for ever."""
    with running_app(tmp_path_factory.mktemp("idle") / "data", model="/nowhere") as app:
        yield app


@pytest.fixture
def client(app: RunningApp) -> Iterator[httpx.Client]:
    with Client(app.url) as client:
        yield client


@pytest.fixture
def idle(idle_app: RunningApp) -> Iterator[httpx.Client]:
    with Client(idle_app.url) as client:
        yield client


@pytest.fixture(scope="module")
def done(app: RunningApp) -> dict[str, Any]:
    """The status of a completed job."""
    with Client(app.url) as client:
        return ended(client, upload(client, SAMPLE.read_bytes(), metadata='{"album": 7}'))


@pytest.fixture(scope="module")
def results(done: dict[str, Any]) -> list[dict[str, Any]]:
    return done["results_payload"]["frame_results"]


@pytest.fixture
def long_job(client: httpx.Client) -> Iterator[str]:
    """A job that runs for many seconds, with some frames described."""
    job_id = upload(client, SAMPLE.read_bytes(), target_fps=24)
    running(client, job_id)
    yield job_id
    client.post(f"/api/jobs/{job_id}/cancel")
    ended(client, job_id)


# Frames, pictures, the video


def test_frames_are_the_results_in_the_order_of_storing(
    client: httpx.Client, done: dict[str, Any], results: list[dict[str, Any]]
) -> None:
    answer = client.get(f"/api/jobs/{done['job_id']}/frames")
    FramePage.model_validate_json(answer.content, strict=True)

    assert answer.json() == {"frames": results, "next_after": NUM_FRAMES, "is_finished": True}
    assert [frame["seq"] for frame in results] == list(range(1, NUM_FRAMES + 1))


def test_after_the_last_frame_of_a_finished_job_nothing_comes(client: httpx.Client, done: dict[str, Any]) -> None:
    page = client.get(f"/api/jobs/{done['job_id']}/frames?after=25").json()

    assert page == {"frames": [], "next_after": 25, "is_finished": True}


def test_each_frame_has_a_small_picture_that_browsers_keep(client: httpx.Client, done: dict[str, Any]) -> None:
    url = f"/api/jobs/{done['job_id']}/frames/24.jpg"
    answer = client.get(url)
    again = client.get(url, headers={"If-None-Match": answer.headers["etag"]})

    assert (answer.headers["content-type"], answer.content[:3]) == ("image/jpeg", b"\xff\xd8\xff")
    assert "immutable" in answer.headers["cache-control"] and "private" in answer.headers["cache-control"]
    assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", answer.headers["etag"])
    with av.open(io.BytesIO(answer.content)) as picture:
        assert 0 < picture.streams.video[0].width <= 640


def test_a_frame_that_was_not_sampled_has_no_picture(client: httpx.Client, done: dict[str, Any]) -> None:
    answer = client.get(f"/api/jobs/{done['job_id']}/frames/1.jpg")

    assert (answer.status_code, answer.json()["code"]) == (404, "frame_not_found")


def test_the_video_comes_whole_or_in_parts(client: httpx.Client, done: dict[str, Any]) -> None:
    url, video = f"/api/jobs/{done['job_id']}/video", SAMPLE.read_bytes()
    whole = client.get(url)
    part = client.get(url, headers={"Range": "bytes=100-199"})
    tail = client.get(url, headers={"Range": "bytes=-10"})

    assert (whole.status_code, whole.headers["content-type"], whole.content) == (200, "video/mp4", video)
    assert whole.headers["accept-ranges"] == "bytes"
    assert (part.status_code, part.content) == (206, video[100:200])
    assert part.headers["content-range"] == f"bytes 100-199/{len(video)}"
    assert (tail.status_code, tail.content) == (206, video[-10:])


def test_a_part_beyond_the_videos_end_is_refused(client: httpx.Client, done: dict[str, Any]) -> None:
    answer = client.get(f"/api/jobs/{done['job_id']}/video", headers={"Range": "bytes=99999999-"})

    assert answer.status_code == 416
    assert answer.headers["content-range"] == f"bytes */{SAMPLE.stat().st_size}"


def test_a_video_that_is_not_here_yet_is_not_found(idle: httpx.Client) -> None:
    answer = idle.get(f"/api/jobs/{submit(idle)}/video")

    assert (answer.status_code, answer.json()["code"]) == (404, "video_not_kept")


# Exports


def export(client: httpx.Client, job_id: str, format: str) -> str:
    answer = client.get(f"/api/jobs/{job_id}/export?format={format}").raise_for_status()
    assert answer.headers["content-disposition"].startswith(f'attachment; filename="video.{format}"')
    return answer.text


def test_json_is_the_whole_status(client: httpx.Client, done: dict[str, Any]) -> None:
    assert json.loads(export(client, done["job_id"], "json")) == done


def test_jsonl_has_a_line_for_each_frame(
    client: httpx.Client, done: dict[str, Any], results: list[dict[str, Any]]
) -> None:
    lines = export(client, done["job_id"], "jsonl").splitlines()

    assert [json.loads(line) for line in lines][-NUM_FRAMES:] == results


def test_csv_has_a_row_for_each_frame(
    client: httpx.Client, done: dict[str, Any], results: list[dict[str, Any]]
) -> None:
    rows = list(csv.DictReader(io.StringIO(export(client, done["job_id"], "csv").removeprefix("\ufeff"))))

    columns = ["frame_idx", "timestamp_ms", "timestamp", "description", "status", "reused_from_frame_idx"]
    assert list(rows[0]) == columns
    assert [row["description"] for row in rows] == [frame["description"] for frame in results]
    assert (rows[24]["frame_idx"], rows[24]["timestamp"], rows[24]["status"]) == ("576", "00:00:24.000", "success")


@pytest.mark.parametrize("format", ["srt", "vtt"])
def test_subtitles_show_each_text_until_the_next(
    client: httpx.Client, done: dict[str, Any], results: list[dict[str, Any]], format: str
) -> None:
    cues = webvtt.from_buffer(io.StringIO(export(client, done["job_id"], format)), format=format).captions

    assert " ".join(cues[0].text.split()) == results[0]["description"]
    assert (cues[0].start, cues[-1].end) == ("00:00:00.000", "00:00:25.000")
    assert len(cues) == 1 + sum(a["description"] != b["description"] for a, b in pairwise(results))


def test_an_export_that_has_not_changed_is_not_sent_again(client: httpx.Client, done: dict[str, Any]) -> None:
    url = f"/api/jobs/{done['job_id']}/export?format=csv"
    again = client.get(url, headers={"If-None-Match": client.get(url).headers["etag"]})

    assert (again.status_code, again.content) == (304, b"")


def test_a_running_job_exports_what_it_has_so_far(client: httpx.Client, long_job: str) -> None:
    shown = json.loads(export(client, long_job, "json"))

    assert shown["status"] == "processing" and shown["results_payload"]["frame_results"]
    assert len(export(client, long_job, "csv").splitlines()) > 1


# Events


def test_events_of_a_finished_job_are_its_frames_and_done(
    client: httpx.Client, done: dict[str, Any], results: list[dict[str, Any]]
) -> None:
    *frames, last = events_of(client, done["job_id"])

    assert frames == [("frame", str(result["seq"]), result) for result in results]
    assert last[0] == "done" and JobSummary.model_validate(last[2]).status == "completed"


def test_events_follow_a_job_as_it_runs(client: httpx.Client) -> None:
    followed = events_of(client, upload(client, SAMPLE.read_bytes(), max_frames=12))

    assert [id for name, id, _ in followed if name == "frame"] == [str(n) for n in range(1, 13)]
    assert [name for name, _, _ in followed].count("done") == 1 and followed[-1][0] == "done"
    progress = [data["progress"] for name, _, data in followed if name == "progress"]
    assert progress == sorted(progress) and progress[-1] < followed[-1][2]["progress"] == 100


def test_a_reconnect_goes_on_after_the_last_event(client: httpx.Client, done: dict[str, Any]) -> None:
    assert [id for _, id, _ in events_of(client, done["job_id"], "23")] == ["24", "25", ""]
    assert [name for name, _, _ in events_of(client, done["job_id"], "25")] == ["done"]


def test_a_silent_stream_says_that_it_is_alive(idle: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.api_results.HEARTBEAT_S", 0.05)
    job_id = submit(idle)
    with idle.stream("GET", f"/api/jobs/{job_id}/events") as answer:
        stream = events_in(answer)
        first, second = next(stream), next(stream)

    assert answer.headers["content-type"].startswith("text/event-stream")
    assert (answer.headers["cache-control"], answer.headers["x-accel-buffering"]) == ("no-store", "no")
    assert (first[0], first[2]["status"]) == ("progress", "submitted")
    assert second == ("", "", "still here")


def test_readers_who_go_away_leave_nothing_behind(idle: httpx.Client, idle_app: RunningApp) -> None:
    job_id, changes = submit(idle), idle_app.service.store.changes
    for _ in range(5):
        with idle.stream("GET", f"/api/jobs/{job_id}/events") as answer:
            assert next(events_in(answer))[0] == "progress"

    wait_until(lambda: job_id not in changes._waiting)


def test_a_reader_who_does_not_read_holds_up_nobody(client: httpx.Client, app: RunningApp) -> None:
    job_id = upload(client, SAMPLE.read_bytes(), max_frames=3)
    with socket.create_connection(("127.0.0.1", int(app.url.rpartition(":")[2]))) as reader:
        reader.sendall(f"GET /api/jobs/{job_id}/events HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())

        assert ended(client, job_id)["status"] == "completed"


def test_events_of_a_job_that_is_deleted_end(idle: httpx.Client) -> None:
    job_id = submit(idle)
    with idle.stream("GET", f"/api/jobs/{job_id}/events") as answer:
        stream = events_in(answer)
        assert next(stream)[0] == "progress"
        idle.delete(f"/api/jobs/{job_id}").raise_for_status()

        assert [event for event in stream if event[0] == "done"] == []


# Who is told


def test_metrics_count_what_a_job_did(client: httpx.Client) -> None:
    before = metrics_of(client)
    shown = ended(client, upload(client, SAMPLE.read_bytes(), max_frames=3))
    after = metrics_of(client)
    grown = {key: value - before.get(key, 0.0) for key, value in after.items()}

    assert grown["moonreel_frames_total", "described"] == 3
    assert grown["moonreel_jobs", "completed"] == 1
    results = shown["results_payload"]["frame_results"]
    assert grown["moonreel_tokens_total", ""] == sum(frame["num_tokens"] for frame in results) > 0
    assert grown["moonreel_stage_seconds_total", "overall_pipeline_internal"] > 0
    assert grown["moonreel_stored_bytes", ""] >= SAMPLE.stat().st_size
    assert after["moonreel_ready", ""] == 1 and after["moonreel_queue_length", ""] == 0


def test_a_webhook_tells_how_the_job_ended_and_is_signed(client: httpx.Client) -> None:
    received: list[tuple[dict[str, str], bytes]] = []
    server = LocalServer()

    def receive(connection: socket.socket) -> None:
        head, _, body = server.requests[-1].encode("latin-1").partition(b"\r\n\r\n")
        lines = [line.partition(": ") for line in head.decode().split("\r\n")[1:]]
        headers = {name.lower(): value for name, _, value in lines}
        while len(body) < int(headers["content-length"]):
            body += connection.recv(65536)
        connection.sendall(http(status="204 No Content"))
        received.append((headers, body))

    server.replies["/hook"] = [receive]
    try:
        hook = f"http://127.0.0.1:{server.port}/hook"
        job_id = upload(client, SAMPLE.read_bytes(), max_frames=1, webhook_url=hook, metadata='{"album": 7}')
        headers, body = wait_until(lambda: received)[0]
    finally:
        server.stop()

    event = Webhook(SECRET).verify(body, headers)
    assert event["type"] == "job.completed"
    assert (event["data"]["job_id"], event["data"]["status"]) == (job_id, "completed")
    assert event["data"]["metadata"] == {"album": 7}
    assert status_of(client, job_id)["status"] == "completed"
