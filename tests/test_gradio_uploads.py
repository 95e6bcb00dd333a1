"""Gradio's door for uploads: on a server for strangers, and what lies there unsubmitted."""

import os
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from serving import SAMPLE, ServerProcess

from jobs.gradio_uploads import sweep

NUM_BYTES = SAMPLE.stat().st_size


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A visitor's address may upload the sample twice in a day, and a half."""
    folder = tmp_path_factory.mktemp("uploads") / "data"
    (folder / "gradio" / "left").mkdir(parents=True)  # by a server that was killed
    (folder / "gradio" / "left" / "over.mp4").write_bytes(b"x")
    settings = {"page": True, "allow_anonymous": True, "anonymous_upload_bytes": NUM_BYTES * 5 // 2}
    with ServerProcess(folder, **settings).start(is_ready=False) as server:
        yield server
        assert server.stop() == 0


def upload(server: ServerProcess, door: str, address: str) -> httpx.Response:
    name = "file" if door == "/api/upload" else "files"
    with server.client(headers={"X-Forwarded-For": address}) as http:
        return http.post(door, files={name: ("v.mp4", SAMPLE.read_bytes())})


@pytest.mark.parametrize(("door", "network"), [("/api/upload", "192.0.2"), ("/gradio_api/upload", "198.51.100")])
def test_an_address_uploads_so_much_in_a_day(server: ServerProcess, door: str, network: str) -> None:
    answers = [upload(server, door, f"{network}.1") for _ in range(3)]

    assert [answer.status_code for answer in answers[:2]] == [202 if door == "/api/upload" else 200] * 2
    assert (answers[2].status_code, answers[2].json()["code"]) == (429, "rate_limited")
    assert "ANONYMOUS_UPLOAD_BYTES" in answers[2].json()["detail"]
    assert 3600 < int(answers[2].headers["retry-after"]) < 24 * 3600
    assert upload(server, door, f"{network}.2").status_code < 300  # somebody else may


def test_both_doors_count_together(server: ServerProcess) -> None:
    doors = ["/gradio_api/upload", "/api/upload", "/gradio_api/upload"]

    assert [upload(server, door, "203.0.113.1").status_code for door in doors] == [200, 202, 429]


def test_two_who_send_the_same_file_at_the_same_time_both_submit_it(server: ServerProcess) -> None:
    """The first submit moved the file away that the second one named."""
    paths = [upload(server, "/gradio_api/upload", f"198.51.101.{i}").json()[0] for i in range(2)]
    assert paths[0] == paths[1]

    with server.client() as http:
        for path in paths:
            data = [{"path": path, "meta": {"_type": "gradio.FileData"}}, 1, "Who?"]
            event_id = http.post("/gradio_api/call/submit_file", json={"data": data}).json()["event_id"]
            told = http.get(f"/gradio_api/call/submit_file/{event_id}").text
            assert "event: complete" in told and '"job_id"' in told, told


def test_uploads_lie_in_the_data_directory_and_those_of_an_earlier_server_are_gone(server: ServerProcess) -> None:
    (path,) = upload(server, "/gradio_api/upload", "203.0.113.9").json()

    assert Path(path).is_relative_to(server.settings["data_dir"] / "gradio")
    assert not (server.settings["data_dir"] / "gradio" / "left").exists()


def test_what_nobody_submitted_within_the_hour_is_deleted(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    for folder in (old, new):
        folder.mkdir()
        (folder / "v.mp4").write_bytes(b"x")
    os.utime(old, (0, 0))

    assert sweep(tmp_path) == 1
    assert list(tmp_path.iterdir()) == [new]
    assert sweep(tmp_path / "none") == 0
