"""Where a checkpoint's files are found. The hub is a server on this machine.

huggingface_hub reads its settings once, when it is imported: hence a process of its own for each look-up.
Run: pytest tests/test_hub.py
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pipeline.errors import WeightsNotFound
from pipeline.moondream import hub
from pipeline.moondream.hub import MODEL_ID, REVISION, find_checkpoint

ROOT = Path(__file__).parent.parent
COMMIT = "0123456789abcdef0123456789abcdef01234567"
FIND = "from pipeline.moondream.hub import *; print(repr(find_checkpoint(*sys.argv[1:])))"
FIND_TOKENIZER = "from pipeline.moondream.hub import *; print(download_tokenizer())"
ADVICE = "give a local folder with --model, or try --model demo."


@dataclass(frozen=True)
class Found:
    """What a look-up in a process of its own printed, or the error that ended it: "WeightsNotFound: ..."."""

    printed: str
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
    return Found(ended.stdout.strip(), error)


# --- folders and names


def test_a_folders_files_are_found(tiny_folder: Path) -> None:
    files = find_checkpoint(str(tiny_folder))

    assert (files.model, files.revision) == (str(tiny_folder), None)
    assert files.config == tiny_folder / "config.json"
    assert files.weights == (tiny_folder / "model.safetensors",)
    assert files.tokenizer == tiny_folder / "tokenizer.json"


def test_a_home_folder_may_begin_with_a_tilde(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tiny_folder.parent))

    assert find_checkpoint(f"~/{tiny_folder.name}").config == tiny_folder / "config.json"


def test_demo_is_the_products_own_folder(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "DEMO_FOLDER", tiny_folder)

    files = find_checkpoint("demo")

    assert (files.model, files.config) == ("demo", tiny_folder / "config.json")


@pytest.mark.parametrize("name", ["nowhere", "./no/where", "/no/where", "~/nowhere", "a/b/c", "../x"])
def test_what_is_neither_a_folder_nor_an_id_is_refused_without_asking_the_hub(name: str) -> None:
    with pytest.raises(WeightsNotFound, match=f"neither a folder, nor a hub id such as {MODEL_ID}"):
        find_checkpoint(name)


@pytest.mark.parametrize("name", ["a--b/c", "x/y..z", "org/name.git", "spa ce/x"])
def test_an_id_that_the_hub_cannot_have_is_refused(name: str) -> None:
    with pytest.raises(WeightsNotFound, match="is not a hub id"):
        find_checkpoint(name)


def test_a_folder_without_a_config_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(WeightsNotFound, match=r"has no config\.json"):
        find_checkpoint(str(tmp_path))


def test_a_folder_without_weights_is_incomplete(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")

    with pytest.raises(WeightsNotFound, match=r"it has no model\*\.safetensors file"):
        find_checkpoint(str(tmp_path))


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": 3}', "{}"])
def test_an_index_that_is_none_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_text(content)

    with pytest.raises(WeightsNotFound, match="is not an index of safetensors files"):
        find_checkpoint(str(tmp_path))


def test_no_code_of_a_repository_is_ever_run() -> None:
    """What lets transformers do so appears nowhere."""
    option = "trust_remote_" + "code"

    assert [path for path in (ROOT / "pipeline").rglob("*.py") if option in path.read_text(encoding="utf-8")] == []


# --- the cache, offline


def cached(home: Path, repo_id: str, revision: str, source: Path) -> Path:
    """Lay a repository's files out as the hub's cache does -> its snapshot."""
    repo = home / "hub" / f"models--{repo_id.replace('/', '--')}"
    snapshot = repo / "snapshots" / COMMIT
    shutil.copytree(source, snapshot)
    (repo / "refs").mkdir()
    (repo / "refs" / revision).write_text(COMMIT)
    return snapshot


@pytest.mark.parametrize(("revision", "arguments"), [(REVISION, []), ("other", ["other"])])
def test_the_real_model_is_found_in_the_cache_at_its_revision(
    tmp_path: Path, tiny_folder: Path, revision: str, arguments: list[str]
) -> None:
    snapshot = cached(tmp_path, MODEL_ID, revision, tiny_folder)

    found = look_up(FIND, MODEL_ID, *arguments, HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1")

    assert str(snapshot / "model.safetensors") in found.printed, found.error
    assert f"model='{MODEL_ID}', revision='{revision}'" in found.printed


def test_another_model_is_taken_at_main(tmp_path: Path, tiny_folder: Path) -> None:
    cached(tmp_path, "some/model", "main", tiny_folder)

    found = look_up(FIND, "some/model", HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1")

    assert "model='some/model', revision='main'" in found.printed, found.error


def test_the_tokenizer_is_found_in_the_cache(tmp_path: Path, tiny_folder: Path) -> None:
    snapshot = cached(tmp_path, "moondream/starmie-v1", "main", tiny_folder)

    found = look_up(FIND_TOKENIZER, HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1")

    assert found.printed == str(snapshot / "tokenizer.json"), found.error


@pytest.mark.parametrize("program", [FIND, FIND_TOKENIZER])
def test_offline_and_not_cached_says_what_to_do(tmp_path: Path, program: str) -> None:
    found = look_up(program, *([MODEL_ID] if program == FIND else []), HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1")

    assert found.error.startswith("WeightsNotFound: ") and found.error.endswith(ADVICE)
    assert "is not in the local cache" in found.error


def test_a_snapshot_that_is_not_complete_says_so(tmp_path: Path, tiny_folder: Path) -> None:
    (cached(tmp_path, MODEL_ID, REVISION, tiny_folder) / "model.safetensors").unlink()

    found = look_up(FIND, MODEL_ID, HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1")

    assert found.error.startswith("WeightsNotFound: The weights of") and "incomplete" in found.error


# --- the hub, as a server on this machine


@dataclass
class FakeHub:
    """A hub with one repository, some/model, and some/KIND for each kind of refusal."""

    folder: Path
    url: str = ""
    num_breaks: int = 0  # how often the weights' download still breaks off half-way
    ranges: list[str] = field(default_factory=list)  # asked for, when the weights were downloaded
    downloads: list[str] = field(default_factory=list)


REFUSALS = {"gated": (403, "GatedRepo"), "unknown": (404, "RepoNotFound"), "private": (401, "RepoNotFound")}
REFUSALS |= {"moved": (404, "RevisionNotFound"), "broken": (500, "")}


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
            if self.command == "GET":
                fake.downloads.append(path.name)
                if path.suffix == ".safetensors":
                    fake.ranges.append(wanted)
                    if fake.num_breaks:
                        fake.num_breaks -= 1
                        self.answer(200, content[: len(content) // 2], headers, length=len(content))
                        self.close_connection = True
                        return
            self.answer(206 if start else 200, content[start:], headers)

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


@pytest.fixture
def fake(tiny_folder: Path, tmp_path: Path) -> Iterator[FakeHub]:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "repository"))
    (folder / "moondream.py").write_text("raise SystemExit('code of a repository ran')")
    made = FakeHub(folder)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(made))
    made.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield made
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("gated", "is gated: accept its terms at https://huggingface.co/some/gated and set HF_TOKEN."),
        ("unknown", "The hub has no repository some/unknown, or it is private. Check the name"),
        ("private", "The hub has no repository some/private, or it is private. Check the name"),
        ("moved", "some/moved has no revision 'v2'. Check --revision."),
        ("broken", "some/broken at v2 is not in the local cache and cannot be downloaded. Check the network"),
    ],
)
def test_a_refusal_of_the_hub_says_what_to_do(fake: FakeHub, tmp_path: Path, kind: str, said: str) -> None:
    found = look_up(FIND, f"some/{kind}", "v2", HF_HOME=str(tmp_path), HF_ENDPOINT=fake.url)

    assert found.error.startswith("WeightsNotFound: ") and said in found.error


def test_a_connection_that_breaks_off_says_what_to_do(fake: FakeHub, tmp_path: Path) -> None:
    """Errors of the HTTP client are no OSErrors: this one came through as it was."""
    found = look_up(FIND, "some/hangs-up", HF_HOME=str(tmp_path), HF_ENDPOINT=fake.url)

    assert found.error.startswith("WeightsNotFound: ") and found.error.endswith(ADVICE)


def test_a_hub_that_is_not_there_says_what_to_do(fake: FakeHub, tmp_path: Path) -> None:
    found = look_up(FIND, "some/model", HF_HOME=str(tmp_path), HF_ENDPOINT="http://127.0.0.1:1")

    assert found.error.startswith("WeightsNotFound: ") and found.error.endswith(ADVICE)


def test_a_checkpoint_is_downloaded_without_its_code_and_only_once(fake: FakeHub, tmp_path: Path) -> None:
    first = look_up(FIND, "some/model", HF_HOME=str(tmp_path), HF_ENDPOINT=fake.url)
    second = look_up(FIND, "some/model", HF_HOME=str(tmp_path), HF_ENDPOINT=fake.url)
    offline = look_up(FIND, "some/model", HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1")

    snapshot = tmp_path / "hub" / "models--some--model" / "snapshots" / COMMIT
    assert str(snapshot / "model.safetensors") in first.printed, first.error
    assert first == second == offline
    assert sorted(fake.downloads) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert sorted(path.name for path in snapshot.iterdir()) == sorted(fake.downloads)


def test_a_download_that_breaks_off_is_resumed(fake: FakeHub, tmp_path: Path) -> None:
    content = os.urandom(24 * 2**20)  # huggingface_hub keeps whole chunks of 10 MiB
    (fake.folder / "model.safetensors").write_bytes(content)
    fake.num_breaks = 1

    found = look_up(FIND, "some/model", HF_HOME=str(tmp_path), HF_ENDPOINT=fake.url)

    weights = tmp_path / "hub" / "models--some--model" / "snapshots" / COMMIT / "model.safetensors"
    assert found.error == ""
    assert weights.read_bytes() == content
    assert fake.ranges == ["", f"bytes={10 * 2**20}-"]
