"""A data directory that commit 5dcf01b left, killed in the middle of a job and with webhooks waiting, goes on here."""

import tarfile
import threading
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import ServerProcess, wait_until
from standardwebhooks import Webhook

from jobs.journal import decode, encode, lines
from jobs.store import JournalDB

OLD = Path(__file__).parent / "data" / "store-v1.tar.gz"
OLD_HOOK = "http://127.0.0.1:65000/hook"
ALICE = {"Authorization": "Bearer alice-key-0123456789"}
BOB = {"Authorization": "Bearer bob-key-0123456789"}
SETTINGS: dict[str, Any] = {
    "api_keys": "alice:alice-key-0123456789,bob:bob-key-0123456789",
    "allow_private_urls": "127.0.0.1",
    "retention_days": 100_000,  # the directory is of a day that is further away with every day
    "answer_cache_bytes": 1_000_000,
}


@dataclass
class Receiver:
    """Takes webhooks in and answers 204."""

    received: list[tuple[dict[str, str], bytes]] = field(default_factory=list)
    url: str = ""


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    taken = Receiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            taken.received.append((dict(self.headers), body))
            self.send_response(204)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        taken.url = f"http://127.0.0.1:{server.server_port}/hook"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield taken
        server.shutdown()
        thread.join()


@pytest.fixture
def folder(tmp_path: Path, receiver: Receiver) -> Path:
    """The old directory, with its webhooks addressed to the receiver."""
    folder = tmp_path / "data"
    with tarfile.open(OLD) as archive:
        archive.extractall(folder, filter="data")
    path = folder / "jobs.jsonl"
    changes = [decode(line) for line in lines(path)]
    path.write_bytes(b"".join(encode(_readdressed(change, receiver.url)) for change in changes if change))
    return folder


def _readdressed(change: Any, url: str) -> Any:
    for document in change.documents.values():
        if document and document["request"]["webhook_url"] == OLD_HOOK:
            document["request"]["webhook_url"] = url
            for webhook in document["webhooks"]:
                webhook["url"] = url
    return change


def _records(folder: Path) -> dict[str, Any]:
    with closing(JournalDB(folder / "jobs.jsonl")) as db:
        return {job_id: dict(record) for job_id, record in db.named("jobs").stored().items()}


def _results(folder: Path, job_id: str) -> list[dict[str, Any]]:
    path = folder / "jobs" / job_id / "frames.jsonl"
    if not path.exists():
        return []
    with closing(JournalDB(path)) as db:
        return sorted((dict(result) for result in db.named("frames").stored().values()), key=lambda r: r["seq"])


def _headers(record: dict[str, Any]) -> dict[str, str]:
    return ALICE if record["owner"] == "key:alice" else BOB


def _get(client: httpx.Client, path: str, record: dict[str, Any]) -> httpx.Response:
    answer = client.get(path, headers=_headers(record))
    assert answer.status_code == 200, (path, answer.text)
    return answer


def test_all_of_an_old_directory_goes_on(folder: Path, receiver: Receiver) -> None:
    before = _records(folder)
    old_results = {job_id: _results(folder, job_id) for job_id in before}
    old_secret = (folder / "webhook-secret").read_text(encoding="ascii")
    videos = {job_id: path.read_bytes() for job_id in before if (path := folder / "jobs" / job_id / "video").exists()}
    states = sorted(record["status"] for record in before.values())
    assert states == ["canceled", "completed", "completed", "completed", "failed", "processing", "submitted"]

    with ServerProcess(folder, **SETTINGS).start() as server, server.client() as client:
        for owner, headers in (("key:alice", ALICE), ("key:bob", BOB)):
            listed = client.get("/api/jobs/list?limit=100", headers=headers).json()["jobs"]
            assert {job["job_id"] for job in listed} == {j for j, record in before.items() if record["owner"] == owner}
        for job_id, record in before.items():

            def status(job_id: str = job_id, record: dict[str, Any] = record) -> dict[str, Any]:
                return _get(client, f"/api/status/{job_id}?include_results=false", record).json()

            expected = "completed" if record["status"] in ("processing", "submitted") else record["status"]
            wait_until(lambda expected=expected, status=status: status()["status"] == expected)
            frames = _get(client, f"/api/jobs/{job_id}/frames?limit=1000", record).json()["frames"]
            assert frames[: len(old_results[job_id])] == old_results[job_id]  # nothing is described again
            for frame in frames:
                picture = _get(client, f"/api/jobs/{job_id}/frames/{frame['frame_idx']}.jpg", record)
                assert picture.content.startswith(b"\xff\xd8")
            if job_id in videos:
                assert _get(client, f"/api/jobs/{job_id}/video", record).content == videos[job_id]

        canceled = next(job_id for job_id, record in before.items() if record["status"] == "canceled")
        assert client.post(f"/api/jobs/{canceled}/retry", headers=BOB).status_code == 200
        wait_until(lambda: client.get(f"/api/status/{canceled}", headers=BOB).json()["status"] == "completed")
        failed = next(job_id for job_id, record in before.items() if record["status"] == "failed")
        assert client.delete(f"/api/jobs/{failed}", headers=BOB).status_code == 204

        wait_until(lambda: len(receiver.received) >= 3)  # two had waited, the third is of the interrupted job
    waiting = {webhook["webhook_id"] for record in before.values() for webhook in record["webhooks"]}
    assert len(waiting) == 2
    names = [{name.lower(): value for name, value in headers.items()} for headers, _ in receiver.received]
    assert waiting < {headers["webhook-id"] for headers in names} and len(names) == 3
    for headers, (_, body) in zip(names, receiver.received, strict=True):
        Webhook(old_secret).verify(body, headers)  # a receiver of before takes it as it did
