"""On a Hugging Face Space: what README.md tells it, and the server as a Space starts it.

A Space itself is not at hand: its environment and its proxy's headers are. The settings that differ there:
test_settings.py. Test: pytest tests/test_space.py
"""

import importlib.metadata
import re
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import httpx
import pytest
from huggingface_hub.repocard import metadata_load
from local_server import LocalServer
from packaging.requirements import Requirement
from serving import ROOT, SAMPLE, ServerProcess

from pipeline.moondream.hub import FILES, MODEL_ID, REVISION, TOKENIZER_ID

NAME = "me-moonreel.hf.space"
ORIGIN = f"https://{NAME}"
VISIT = {"Host": NAME, "X-Forwarded-Proto": "https"}  # as the Space's proxy sends it on
FROM_PAGE = {**VISIT, "Origin": ORIGIN, "Sec-Fetch-Site": "same-origin"}
FROM_ELSEWHERE = {**VISIT, "Origin": "https://evil.example", "Sec-Fetch-Site": "cross-site"}
COLOURS = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}  # that a Space may have


@pytest.fixture(scope="module")
def front() -> dict[str, Any]:
    """The YAML at the top of README.md, which configures a Space."""
    front = metadata_load(ROOT / "README.md")
    assert front
    return front


def test_the_space_runs_the_app_with_the_gradio_that_is_pinned(front: dict[str, Any]) -> None:
    pins = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "requirements.txt").read_text(encoding="utf-8"), re.MULTILINE))

    assert (front["sdk"], front["sdk_version"]) == ("gradio", pins["gradio"])
    assert (ROOT / front["app_file"]).is_file()
    assert front["python_version"] == "3.11"  # text: as a number, 3.10 would be 3.1
    assert front["suggested_hardware"] == "a10g-small"


def test_the_space_is_described(front: dict[str, Any]) -> None:
    assert front["title"] == "Moonreel" and len(front["short_description"]) <= 60
    assert {front["colorFrom"], front["colorTo"]} <= COLOURS
    assert front["license"] == "apache-2.0" and "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")


def test_the_space_brings_the_files_that_the_app_looks_for(front: dict[str, Any]) -> None:
    """Each entry is an id, its files and its revision, with spaces between."""
    model, tokenizer = (entry.split(" ") for entry in front["preload_from_hub"])
    names = model[1].split(",")

    assert front["models"] == [MODEL_ID, TOKENIZER_ID]
    assert (model[0], model[2:]) == (MODEL_ID, [REVISION])
    assert {"config.json", "model.safetensors"} <= set(names)
    assert all(any(fnmatch(name, pattern) for pattern in FILES) for name in names)
    assert tokenizer == [TOKENIZER_ID, "tokenizer.json"]


@pytest.fixture(scope="module")
def internet() -> Iterator[LocalServer]:
    """The proxy by which the server would leave this computer."""
    internet = LocalServer()
    yield internet
    internet.stop()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("space")


@pytest.fixture(scope="module")
def server(folder: Path, internet: LocalServer) -> Iterator[ServerProcess]:
    """With all that a Space sets; but for the port, and a node that tells that it was started."""
    node = folder / "node"
    node.write_text(f"#!/bin/sh\ntouch {folder}/node-was-here\n")
    node.chmod(0o755)
    proxy = f"http://127.0.0.1:{internet.port}"
    environment = {
        "SYSTEM": "spaces",
        "SPACE_ID": "me/moonreel",
        "SPACE_HOST": NAME,
        "GRADIO_SSR_MODE": "true",
        "GRADIO_NODE_PATH": str(node),
        "GRADIO_SERVER_NAME": "0.0.0.0",
        "GRADIO_SERVER_PORT": "7860",
        **{name: proxy for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy")},
        **{name: "127.0.0.1,0.0.0.0,localhost" for name in ("NO_PROXY", "no_proxy")},
    }
    with ServerProcess(folder / "data", page=True, environment=environment).start() as server:
        yield server
        assert server.stop() == 0


@pytest.fixture
def http(server: ServerProcess) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client


def upload(http: httpx.Client, headers: dict[str, str]) -> httpx.Response:
    return http.post("/api/upload", headers=headers, files={"file": ("sample.mp4", SAMPLE.read_bytes())})


def test_the_page_and_the_api_answer_by_the_name_of_the_space(http: httpx.Client) -> None:
    page, ready, config = (http.get(path, headers=VISIT) for path in ("/", "/api/ready", "/config"))

    assert page.status_code == 200 and "Moonreel" in page.text
    assert page.headers["content-security-policy"].endswith("; frame-ancestors 'self' https://huggingface.co")
    assert ready.json()["model"]["id"] == "demo"
    assert config.json()["root"] == ORIGIN


def test_another_name_is_refused(http: httpx.Client) -> None:
    answer = http.get("/api/ready", headers={"Host": "evil.example"})

    assert (answer.status_code, answer.json()["code"]) == (400, "foreign_host")


def test_the_page_uploads_and_is_known_again_in_its_frame(http: httpx.Client) -> None:
    answer = upload(http, FROM_PAGE)
    cookie = answer.headers["set-cookie"]

    assert answer.status_code == 202
    assert cookie.endswith("; Path=/; SameSite=none; Secure; Partitioned")
    listed = http.get("/api/jobs/list", headers={**VISIT, "Cookie": cookie.partition(";")[0]}).json()["jobs"]
    assert [job["job_id"] for job in listed] == [answer.json()["job_id"]]


def test_a_page_of_another_site_uploads_nothing_and_reads_nothing(http: httpx.Client) -> None:
    refused, read = upload(http, FROM_ELSEWHERE), http.get("/api/jobs/list", headers=FROM_ELSEWHERE)

    assert (refused.status_code, refused.json()["code"]) == (403, "cross_site")
    assert not [name for name in read.headers if name.startswith("access-control-")]
    assert read.headers["cross-origin-resource-policy"] == "same-origin"


@pytest.mark.usefixtures("server")
def test_the_server_asks_nobody_and_starts_no_node(internet: LocalServer, folder: Path) -> None:
    assert internet.num_connections == 0
    assert not (folder / "node-was-here").exists()


def test_the_pins_are_what_a_space_can_install_beside_gradio() -> None:
    """Spaces install gradio[oauth,mcp]; its mcp wants an older pydantic than gradio alone."""
    pins = dict(
        re.findall(r"^([\w-]+)==([\w.]+)", (ROOT / "requirements.txt").read_text(encoding="utf-8"), re.MULTILINE)
    )
    wanted = [Requirement(text) for text in importlib.metadata.requires("gradio") or ()]
    for requirement in wanted:
        is_installed = any(
            requirement.marker is None or requirement.marker.evaluate({"extra": extra}) for extra in ("oauth", "mcp")
        )
        if is_installed and requirement.name in pins:
            assert requirement.specifier.contains(pins[requirement.name]), f"{requirement} and {pins[requirement.name]}"
