"""The hub as a server on this machine, and look-ups there in processes of their own: huggingface_hub reads its settings
once, when it is imported."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

ROOT = Path(__file__).parent.parent
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass(frozen=True)
class Found:
    """What a look-up printed, what it told on stderr, or the error that ended it: "WeightsNotFound: ..."."""

    printed: str
    told: str
    error: str


def look_up(program: str, *arguments: str, **environment: str) -> Found:
    """Run a program with settings of huggingface_hub."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING_FACE"))}
    ended = subprocess.run(
        [sys.executable, "-c", f"import sys; {program}", *arguments],
        env={**kept, "HF_HUB_DISABLE_PROGRESS_BARS": "1", **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    error = ended.stderr.strip().rpartition("pipeline.errors.")[2] if ended.returncode else ""
    return Found(ended.stdout.strip(), ended.stderr, error)


@dataclass
class FakeHub:
    """A hub with one repository, some/model, and some/KIND for each kind of refusal."""

    folder: Path
    url: str = ""
    num_breaks: int = 0  # how often the weights' download still breaks off half-way
    ranges: list[str] = field(default_factory=list)  # asked for, when the weights were downloaded
    downloads: list[str] = field(default_factory=list)
    may_go_on: threading.Event = field(default_factory=threading.Event)  # with the weights' second half

    def __post_init__(self) -> None:
        self.may_go_on.set()


REFUSALS = {"gated": (403, "GatedRepo"), "unknown": (404, "RepoNotFound"), "private": (401, "RepoNotFound")}
REFUSALS |= {"moved": (404, "RevisionNotFound"), "broken": (500, "")}


@contextmanager
def hub_of(folder: Path) -> Iterator[FakeHub]:
    """Serve a folder as some/model."""
    fake = FakeHub(folder)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(fake))
    fake.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield fake
    finally:
        fake.may_go_on.set()
        server.shutdown()
        thread.join()
        server.server_close()


def handler(fake: FakeHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            parts = self.path.partition("?")[0].strip("/").split("/")
            if parts[:3] == ["api", "models", "some"]:
                self.api(parts[3], is_tree="tree" in parts)
            elif parts[:2] == ["some", "model"]:
                self.file(fake.folder / parts[-1])
            else:
                self.answer(404)

        do_HEAD = do_GET

        def api(self, name: str, is_tree: bool) -> None:
            files = [{"type": "file", "path": p.name, "size": p.stat().st_size} for p in fake.folder.iterdir()]
            if name == "hangs-up":
                self.close_connection = True
            elif name in REFUSALS:
                status, code = REFUSALS[name]
                self.answer(status, headers={"X-Error-Code": code})
            elif is_tree:
                self.answer(200, json.dumps([{**file, "oid": file["path"]} for file in files]).encode())
            else:
                siblings = [{"rfilename": file["path"]} for file in files]
                self.answer(200, json.dumps({"id": f"some/{name}", "sha": COMMIT, "siblings": siblings}).encode())

        def file(self, path: Path) -> None:
            content, wanted = path.read_bytes(), self.headers.get("Range", "")
            start = int(wanted.removeprefix("bytes=").partition("-")[0] or 0)
            headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
            if start:
                headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            middle = max(start, len(content) // 2)
            self.answer(206 if start else 200, content[start:middle], headers, length=len(content) - start)
            if self.command == "GET":
                fake.downloads.append(path.name)
                if path.suffix == ".safetensors":
                    fake.ranges.append(wanted)
                    if fake.num_breaks:
                        fake.num_breaks -= 1
                        self.close_connection = True
                        return
                    fake.may_go_on.wait(60)
                self.wfile.write(content[middle:])

        def answer(
            self, status: int, body: bytes = b"", headers: dict[str, str] | None = None, length: int | None = None
        ) -> None:
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body) if length is None else length))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    return Handler
