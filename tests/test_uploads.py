"""Uploads: real forms to a real server, well made and not. What is refused leaves nothing behind."""

import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from api_client import Client, code_of, status_of, submit, upload
from process_watch import rss_bytes
from serving import SAMPLE, RunningApp, running_app, wait_until

VIDEO = SAMPLE.read_bytes()
MAX_BYTES = 1_500_000_000
MULTIPART = {"Content-Type": "multipart/form-data; boundary=XX"}
HEAD = b'--XX\r\nContent-Disposition: form-data; name="file"; filename="%s"\r\nContent-Type: video/mp4\r\n\r\n'
END = b"\r\n--XX--\r\n"


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningApp]:
    """Has no model: what arrives waits."""
    settings = {"model": "/nowhere", "max_video_bytes": MAX_BYTES, "rate_limit_per_minute": 10_000}
    with running_app(tmp_path_factory.mktemp("uploads") / "data", **settings) as app:
        yield app


@pytest.fixture
def client(app: RunningApp) -> Iterator[httpx.Client]:
    """Afterwards, nothing that is not a job's is left."""
    with Client(app.url) as client:
        yield client
    wait_until(lambda: incoming(app) == [])


@pytest.fixture
def refused(client: httpx.Client, app: RunningApp) -> Iterator[httpx.Client]:
    """A client whose uploads make no job."""
    before = num_jobs(app)
    yield client
    assert num_jobs(app) == before


def incoming(app: RunningApp) -> list[Path]:
    return list(app.service.store.files.incoming.iterdir())


def num_jobs(app: RunningApp) -> int:
    """Of all visitors."""
    return app.service.store.index.count()


def send(client: httpx.Client, name: bytes, video: bytes = VIDEO) -> httpx.Response:
    return client.post("/api/upload", content=HEAD % name + video + END, headers=MULTIPART)


def field(name: str, value: bytes) -> bytes:
    return f'--XX\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n'.encode() + value + b"\r\n"


def chunks(head: bytes, num_bytes: int, end: bytes = END) -> Iterator[bytes]:
    """A form of any size that never stands in memory."""
    yield head
    for start in range(0, num_bytes, 1 << 16):
        yield bytes(min(1 << 16, num_bytes - start))
    yield end


def begun_upload(app: RunningApp, num_bytes: int) -> socket.socket:
    """A connection on which a form of num_bytes is announced."""
    connection = socket.create_connection(("127.0.0.1", int(app.url.rpartition(":")[2])), timeout=30)
    head = ["POST /api/upload HTTP/1.1", "Host: localhost", f"Content-Length: {num_bytes}"]
    lines = [*head, f"Content-Type: {MULTIPART['Content-Type']}", "", ""]
    connection.sendall("\r\n".join(lines).encode())
    return connection


def test_an_upload_is_a_job_with_the_fields_beside_it(client: httpx.Client, app: RunningApp) -> None:
    form = {"target_fps": "2", "question": "Who?", "start_s": "1", "end_s": "3", "metadata": '{"album": 7}'}
    answer = client.post("/api/upload", files={"file": ("holiday.mp4", VIDEO)}, data=form)

    job_id = answer.json()["job_id"]
    shown = status_of(client, job_id)
    assert (answer.status_code, answer.headers["location"]) == (202, f"/api/status/{job_id}")
    assert answer.json() == {"job_id": job_id, "status": "submitted", "message": "Job submitted for processing."}
    assert (shown["video_url"], shown["metadata"]) == ("upload:holiday.mp4", {"album": 7})
    assert (shown["input_target_fps"], shown["input_question"]) == (2, "Who?")
    assert (shown["start_s"], shown["end_s"]) == (1, 3)
    assert app.service.store.files.video(job_id).read_bytes() == VIDEO


def test_fields_may_stand_before_the_file_and_be_empty(client: httpx.Client) -> None:
    body = field("question", b"Who?") + field("target_fps", b"") + HEAD % b"a.mp4" + VIDEO + END

    job_id = client.post("/api/upload", content=body, headers=MULTIPART).json()["job_id"]
    shown = status_of(client, job_id)
    assert (shown["input_question"], shown["input_target_fps"]) == ("Who?", 1)


@pytest.mark.parametrize(
    ("file", "what"),
    [(b"", "empty"), (b"Dear diary, " * 1000, "text"), (b"\xff\xd8\xff" + bytes(5000), "picture"), (b"\0" * 99, "")],
)
def test_what_is_no_video_is_told_by_its_first_bytes(refused: httpx.Client, file: bytes, what: str) -> None:
    answer = send(refused, b"a.mp4", file)

    assert code_of(answer) == (415, "not_a_video")
    assert what in answer.json()["detail"]


def test_what_is_no_video_is_refused_before_all_of_it_has_come(refused: httpx.Client, app: RunningApp) -> None:
    with begun_upload(app, 1_000_000_000) as connection:
        connection.sendall(HEAD % b"a.mp4" + b"Dear diary, " * 1_000_000)
        answer = connection.recv(65536)

    assert answer.startswith(b"HTTP/1.1 415 ")


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "has none"),
        (field("question", b"Who?") + b"--XX--\r\n", "has none"),
        (HEAD % b"a.mp4" + VIDEO + b"\r\n" + HEAD % b"b.mp4" + VIDEO + END, "several"),
        (field("target_fps", b"1") + field("target_fps", b"2") + HEAD % b"a.mp4" + VIDEO + END, "target_fps"),
        (field("fps", b"1") + HEAD % b"a.mp4" + VIDEO + END, "fps"),
        (field("video_url", b"http://x.example") + HEAD % b"a.mp4" + VIDEO + END, "video_url"),
        (field("target_fps", b"fast") + HEAD % b"a.mp4" + VIDEO + END, "target_fps"),
        (field("target_fps", b"nan") + HEAD % b"a.mp4" + VIDEO + END, "target_fps"),
        (field("metadata", b"{") + HEAD % b"a.mp4" + VIDEO + END, "metadata"),
        (field("metadata", b"[1]") + HEAD % b"a.mp4" + VIDEO + END, "metadata"),
        (field("question", b"x" * 20_000) + HEAD % b"a.mp4" + VIDEO + END, "16384"),
        (HEAD % b"a.mp4" + VIDEO, "has none"),
        (HEAD % b"a.mp4" + VIDEO + b"\r\n--XX", "has none"),
        (b"no form at all", "cannot be read"),
        (HEAD % b"\xff\xfe.mp4" + VIDEO + END, "cannot be read"),
    ],
)
def test_a_form_that_is_wrong_is_refused_and_says_why(refused: httpx.Client, body: bytes, words: str) -> None:
    """A field that came twice was once two texts in one: 1 and 2 frames per second made 12."""
    answer = refused.post("/api/upload", content=body, headers=MULTIPART)

    assert code_of(answer) == (422, "invalid_field")
    assert words in answer.json()["detail"]


@pytest.mark.parametrize(
    "content_type", ["multipart/form-data", "multipart/form-data; boundary=", "application/json", "video/mp4", ""]
)
def test_what_is_no_form_is_refused(refused: httpx.Client, content_type: str) -> None:
    answer = refused.post("/api/upload", content=HEAD % b"a.mp4" + VIDEO + END, headers={"Content-Type": content_type})

    assert code_of(answer) == (422, "invalid_field")


@pytest.mark.parametrize("is_announced", [True, False])
@pytest.mark.parametrize("num_bytes", [200_001, 260_000, 300_000])
def test_more_bytes_than_a_video_may_have_are_refused(tmp_path: Path, is_announced: bool, num_bytes: int) -> None:
    """The largest is more than file and form together may have; without Content-Length, it is counted as it comes."""
    head = HEAD % b"a.mp4" + VIDEO[:1000]
    size = num_bytes - 1000
    headers = {"Content-Length": str(len(head) + size + len(END))} if is_announced else {}
    with (
        running_app(tmp_path / "data", model="/nowhere", max_video_bytes=200_000) as app,
        Client(app.url) as client,
    ):
        answer = client.post("/api/upload", content=chunks(head, size), headers={**MULTIPART, **headers})

        assert code_of(answer) == (413, "too_large")
        assert incoming(app) == [] and num_jobs(app) == 0


def test_an_upload_that_breaks_off_leaves_nothing(refused: httpx.Client, app: RunningApp) -> None:
    with begun_upload(app, 9_000_000) as connection:
        connection.sendall(HEAD % b"a.mp4" + VIDEO + bytes(3_000_000))
        wait_until(lambda: incoming(app))

    wait_until(lambda: incoming(app) == [])


@pytest.mark.parametrize(
    ("sent", "shown"),
    [
        (b"../../x", "x"),
        (b"/etc/passwd", "passwd"),
        (b"C:\\videos\\holiday.mp4", None),
        (b"..", "video"),
        (b".", "video"),
        (b" ", "video"),
        (b"", "video"),
        (b"a\nb.mp4", None),
        (b"a\0b\x1b[31m.mp4", "ab[31m.mp4"),
        (b"x" * 5000, "x" * 200),
        ("Größe-日本-🎬.mp4".encode(), "Größe-日本-🎬.mp4"),
        (b"<img src=x onerror=alert(1)>.mp4", "<img src=x onerror=alert(1)>.mp4"),
    ],
)
def test_a_files_name_is_a_text_and_leads_nowhere(
    client: httpx.Client, app: RunningApp, sent: bytes, shown: str | None
) -> None:
    answer = send(client, sent)

    assert answer.status_code == 202
    job_id = answer.json()["job_id"]
    name = status_of(client, job_id)["video_url"].removeprefix("upload:")
    assert name == shown or (shown is None and name.isprintable() and not set(name) & set("/\\\n"))
    folder = app.service.store.files.of(job_id)
    assert {path.name for path in folder.iterdir()} <= {"video", "frames", "frames.jsonl"}
    exported = client.get(f"/api/jobs/{job_id}/export?format=csv").headers["content-disposition"]
    assert exported.startswith("attachment; filename=") and exported.isascii()


def test_an_upload_of_50_mb_takes_no_memory_to_speak_of(client: httpx.Client, app: RunningApp) -> None:
    upload(client, VIDEO)
    before, seen = rss_bytes(os.getpid()), []

    def form() -> Iterator[bytes]:
        for chunk in chunks(HEAD % b"a.mp4" + VIDEO, 50_000_000):
            seen.append(rss_bytes(os.getpid()))
            yield chunk

    answer = client.post("/api/upload", content=form(), headers=MULTIPART)

    path = app.service.store.files.video(answer.json()["job_id"])
    assert answer.status_code == 202 and path.stat().st_size == 50_000_000 + len(VIDEO)
    assert max(seen) - before < 25_000_000
    client.delete(f"/api/jobs/{answer.json()['job_id']}").raise_for_status()


def test_two_uploads_at_once_do_not_mix(client: httpx.Client, app: RunningApp) -> None:
    """Both are under way, as each waits in the middle for the other to be there."""
    both_there, jobs = threading.Barrier(2, timeout=30), {}

    def form(mark: bytes) -> Iterator[bytes]:
        yield HEAD % mark + VIDEO + mark * 2_000_000
        both_there.wait()
        yield mark * 1_000_000 + END

    def run(mark: bytes) -> None:
        with Client(app.url) as sender:
            jobs[mark] = sender.post("/api/upload", content=form(mark), headers=MULTIPART).json()["job_id"]

    threads = [threading.Thread(target=run, args=(mark,)) for mark in (b"a", b"b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    for mark, job_id in jobs.items():
        assert status_of(client, job_id)["video_url"] == f"upload:{mark.decode()}"
        assert app.service.store.files.video(job_id).read_bytes() == VIDEO + mark * 3_000_000


def test_the_name_of_an_upload_is_no_url_to_submit(client: httpx.Client) -> None:
    upload(client, VIDEO)

    answer = client.post("/api/submit", json={"video_url": "upload:video.mp4"})
    assert code_of(answer) == (400, "invalid_video_url")
    assert submit(client)
