"""What the server is made of and whom it asks: lock file, list of parts, no code from elsewhere, no telemetry."""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from gradio_client import Client
from local_server import LocalServer
from local_server import http as reply
from serving import ROOT, SAMPLE, ServerProcess, wait_until

NO_TOKEN: Any = False  # Gradio's type says str | None
README = (ROOT / "README.md").read_text(encoding="utf-8")
OURS = [path for folder in ("pipeline", "jobs", "benchmark") for path in (ROOT / folder).rglob("*.py")]
# Calls that run what a file or a stranger brings along; torch.load does so but with weights_only=True.
RUNS_CODE = {"eval", "exec", "__import__", "pickle.load", "pickle.loads", "torch.load", "yaml.load", "os.system"}
# Runs in the server and in its children first of all: https://peps.python.org/pep-0578/
WATCH = """
import sys
def watch(event, args):
    if event in ("socket.connect", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname"):
        asked = args[:2] if event == "socket.getaddrinfo" else args[1] if len(args) > 1 else args
        with open({told!r}, "a") as file:
            file.write(f"{{event}} {{asked}}\\n")
sys.addaudithook(watch)
"""


def pins(path: Path) -> dict[str, str]:
    found = re.findall(
        r"^([A-Za-z0-9_.-]+)(?:\[[a-z,]+\])?==([^\s;\\]+)", path.read_text(encoding="utf-8"), re.MULTILINE
    )
    return {name.lower().replace("_", "-"): version for name, version in found}


def test_the_lock_file_holds_every_requirement_in_its_version() -> None:
    locked = pins(ROOT / "requirements-lock.txt")

    assert pins(ROOT / "requirements.txt").items() <= locked.items()
    assert len(locked) > 60  # with all that these need in turn


def test_every_line_of_the_lock_file_has_a_hash() -> None:
    entries = re.split(r"\n(?=[A-Za-z0-9])", (ROOT / "requirements-lock.txt").read_text(encoding="utf-8"))[1:]

    assert [entry for entry in entries if "==" not in entry or "--hash=sha256:" not in entry] == []


def test_the_list_of_parts_is_made_by_the_readmes_command(tmp_path: Path) -> None:
    (command,) = re.findall(r"^\.venv/bin/(cyclonedx-py requirements .+)$", README, re.MULTILINE)
    lock = (ROOT / "requirements-lock.txt").read_text(encoding="utf-8")
    (tmp_path / "requirements-lock.txt").write_text(lock[: lock.index("\nannotated-types==")] + "\n")  # the first two

    program, *arguments = command.split()
    subprocess.run([Path(sys.executable).with_name(program), *arguments], cwd=tmp_path, check=True, capture_output=True)

    parts = json.loads((tmp_path / "sbom.json").read_text(encoding="utf-8"))["components"]
    assert [(part["name"], part["version"]) for part in parts] == [
        (name, version) for name, version in pins(tmp_path / "requirements-lock.txt").items()
    ]
    assert all(part["purl"].startswith("pkg:pypi/") and part["externalReferences"][0]["hashes"] for part in parts)


def test_what_is_known_of_the_parts_is_said_of_the_versions_in_the_lock_file() -> None:
    section = README[README.index("## Supply chain") : README.index("## The same answers")]
    said = dict(re.findall(r"`([a-z-]+)` (\d[\w.]*\d)", section))

    assert len(said) > 6
    assert said.items() <= pins(ROOT / "requirements-lock.txt").items()


@pytest.mark.parametrize("path", OURS, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_runs_code_that_a_file_or_a_stranger_brings(path: Path) -> None:
    assert sorted(dangers(path.read_text(encoding="utf-8"))) == []


def test_code_from_elsewhere_would_be_found() -> None:
    source = (
        "import torch\ntorch.load('x')\nAutoModel.from_pretrained('x', trust_remote_code=True)\nrun('x', shell=True)"
    )

    assert sorted(dangers(source)) == ["shell", "torch.load", "trust_remote_code"]


def dangers(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            is_data = any(
                keyword.arg == "weights_only" and ast.unparse(keyword.value) == "True" for keyword in node.keywords
            )
            if (name := ast.unparse(node.func)) in RUNS_CODE and not is_data:
                yield name
            for keyword in node.keywords:
                is_off = isinstance(keyword.value, ast.Constant) and not keyword.value.value
                if keyword.arg in ("trust_remote_code", "shell") and not is_off:
                    yield keyword.arg


def test_the_server_asks_nobody_but_whom_it_is_told_to(tmp_path: Path) -> None:
    """The page, an upload, a job of a URL with a webhook, gradio_client: seen from within by an audit hook."""
    told = tmp_path / "told"
    (tmp_path / "sitecustomize.py").write_text(WATCH.format(told=str(told)))
    web = LocalServer()
    web.replies |= {"/v.mp4": [reply(SAMPLE.read_bytes())], "/hook": [reply()]}
    environment = {"PYTHONPATH": str(tmp_path)}
    try:
        with ServerProcess(
            tmp_path / "data", page=True, environment=environment, allow_private_urls="127.0.0.1"
        ).start() as server:
            with server.client() as http:
                assert http.get("/").status_code == 200
                http.post("/api/upload", files={"file": ("v.mp4", SAMPLE.read_bytes())}).raise_for_status()
                body = {"video_url": f"http://127.0.0.1:{web.port}/v.mp4", "max_frames": 1}
                http.post("/api/submit", json={**body, "webhook_url": f"http://127.0.0.1:{web.port}/hook"})
                client = Client(server.url, verbose=False, token=NO_TOKEN, analytics_enabled=False)
                assert len(client.predict(api_name="/list")["jobs"]) == 2
                wait_until(lambda: any(head.startswith("POST /hook") for head in web.requests))
            own_port = int(server.url.rpartition(":")[2])
            assert server.stop() == 0
    finally:
        web.stop()

    lines = told.read_text(encoding="utf-8").splitlines()
    connected = {line.partition(" ")[2] for line in lines if line.startswith("socket.connect ")}
    assert connected == {f"('127.0.0.1', {web.port})", f"('127.0.0.1', {own_port})"}  # the second: Gradio, of itself
    assert not [line for line in lines if "127.0.0.1" not in line and "localhost" not in line], lines
