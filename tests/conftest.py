"""Fixtures that several test files share."""

import copy
import dataclasses
import json
import os
import shutil
import signal
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Before anybody loads torch, here and in servers: several test files run at a time, and threads that wait for one
# another on the same cores take three times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import cv2
import numpy as np
import pytest
import torch
import trustme
from browsing import Visits, expect_line, launched, upload, visiting
from job_house import House
from local_server import MP4, Lab, LocalServer, http
from playwright.sync_api import Browser
from safetensors.torch import save_file
from serving import ServerProcess
from transformers import PreTrainedTokenizerFast

from pipeline.moondream.checkpoint import PREFIX, Checkpoint, load_checkpoint
from pipeline.moondream.config import MoondreamConfig
from pipeline.moondream.model import Moondream

# A shell that starts us in the background lets us ignore Ctrl-C, and the programs that we start and interrupt, too.
signal.signal(signal.SIGINT, signal.default_int_handler)

GOLDEN = Path(__file__).parent / "data" / "golden"
# 2 layers, 4 heads on 2 keys, an 8 x 8 grid of patches, tilings of up to 6 crops. Ids and templates are golden/base's.
TINY_SIZES: dict[str, Any] = {
    "text": {
        "dim": 64,
        "ff_dim": 96,
        "n_layers": 2,
        "vocab_size": 512,
        "max_context": 512,
        "n_heads": 4,
        "n_kv_heads": 2,
    },
    "vision": {
        "enc_dim": 32,
        "enc_n_layers": 2,
        "enc_ff_dim": 48,
        "enc_n_heads": 2,
        "proj_out_dim": 64,
        "crop_size": 112,
        "max_crops": 6,
        "overlap_margin": 1,
        "proj_inner_dim": 48,
    },
    "region": {"dim": 64, "coord_feat_dim": 16, "size_feat_dim": 24, "inner_dim": 48},
}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the gpu tests out where there is no CUDA."""
    if torch.cuda.is_available():
        return
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    config.hook.pytest_deselected(items=on_gpu)
    items[:] = [item for item in items if item not in on_gpu]


@pytest.fixture(scope="session")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """75 frames at 25 fps; frame i is grey level 3 * i. MJPG keeps all levels apart, mp4v does not."""
    path = tmp_path_factory.mktemp("video") / "grey.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 25, (64, 48))
    for i in range(75):
        writer.write(np.full((48, 64, 3), 3 * i, np.uint8))
    writer.release()
    return path


@pytest.fixture(scope="session")
def odd() -> Path:
    """The folder of small odd videos and expected.json."""
    return Path(__file__).parent / "data" / "odd"


@pytest.fixture(scope="session")
def demo() -> Checkpoint:
    """The demo checkpoint, as the product ships it."""
    return load_checkpoint("demo", device="cpu")


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of the checkpoints with reference outputs."""
    return GOLDEN


@pytest.fixture(scope="session")
def tiny_config() -> MoondreamConfig:
    tokenizer = json.loads((GOLDEN / "base" / "config.json").read_text(encoding="utf-8"))["tokenizer"]
    return MoondreamConfig.from_dict({**TINY_SIZES, "tokenizer": tokenizer})


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_config: MoondreamConfig) -> Checkpoint:
    """Random weights, float32, on the CPU. Large ones, so that answers vary; and eos, the end of the reasoning and
    coordinates come up now and then. The two best logits of a step are never closer than 0.002: rounding is safe.
    """
    model, generator = Moondream(tiny_config), torch.Generator().manual_seed(6)
    ids = tiny_config.tokenizer
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                is_table = name in ("text.wte", "vision.pos_emb")
                parameter.normal_(0, 1 if is_table else 3 / parameter.shape[-1] ** 0.5, generator=generator)
            elif not name.endswith("weight"):
                parameter.normal_(0, 0.1, generator=generator)
        for token, bonus in ((ids.eos_id, 5), (ids.answer_id, 6), (ids.coord_id, 4)):
            model.text.lm_head.bias[token] += bonus
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(GOLDEN / "base" / "tokenizer.json"))
    frozen = model.eval().requires_grad_(False)
    return Checkpoint(frozen, tokenizer, "tiny", None, torch.device("cpu"), torch.float32)


@pytest.fixture(scope="session")
def endless_checkpoint(tiny_checkpoint: Checkpoint) -> Checkpoint:
    """tiny_checkpoint without eos: every answer has its max_tokens or max_objects."""
    model = copy.deepcopy(tiny_checkpoint.model)
    model.text.lm_head.bias[tiny_checkpoint.config.tokenizer.eos_id] = -1e9
    return dataclasses.replace(tiny_checkpoint, model=model)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Checkpoint) -> Path:
    """tiny_checkpoint on disk."""
    folder = tmp_path_factory.mktemp("tiny")
    tensors = {PREFIX + name: parameter.clone() for name, parameter in tiny_checkpoint.model.named_parameters()}
    save_file(tensors, folder / "model.safetensors")
    config = dataclasses.asdict(tiny_checkpoint.config)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    shutil.copy(GOLDEN / "base" / "tokenizer.json", folder)
    return folder


@pytest.fixture(scope="session")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="session")
def trusting(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    authority.configure_trust(context)
    return context


@pytest.fixture
def lab(trusting: ssl.SSLContext) -> Lab:
    """127.0.0.1 counts as public, 127.0.0.2 and everything else on this host does not."""
    lab = Lab()
    lab.public = {"127.0.0.1"}
    lab.names = {"video.example": ["127.0.0.1"]}
    lab.ssl_context = trusting
    return lab


@pytest.fixture
def server() -> Iterator[LocalServer]:
    server = LocalServer()
    server.replies["/video.mp4"] = [http(MP4, headers=("Content-Type: video/mp4",))]
    yield server
    server.stop()


@pytest.fixture
def tls_server(authority: trustme.CA) -> Iterator[LocalServer]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("video.example").configure_cert(context)
    server = LocalServer(tls=context)
    server.replies["/video.mp4"] = [http(MP4)]
    yield server
    server.stop()


@pytest.fixture
def canary(server: LocalServer) -> Iterator[LocalServer]:
    """Listens where nobody may come: on 127.0.0.2, at the server's port."""
    canary = LocalServer("127.0.0.2", server.port)
    canary.replies = server.replies
    yield canary
    canary.stop()
    assert canary.num_connections == 0


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with launched() as browser:
        yield browser


@pytest.fixture(scope="module")
def page_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """Serves the page, with the demo model."""
    with ServerProcess(tmp_path_factory.mktemp("page") / "data", page=True).start() as server:
        yield server
        assert server.stop() == 0


@pytest.fixture
def visits(browser: Browser, page_server: ServerProcess) -> Iterator[Visits]:
    with visiting(browser, page_server.url) as visits:
        yield visits


@pytest.fixture(scope="module")
def done(browser: Browser, page_server: ServerProcess) -> str:
    """The id of a job over the sample that is completed, in the history of page_server."""
    with visiting(browser, page_server.url) as visits:
        page = visits.open()
        job_id = upload(page)
        page.goto(f"/?job={job_id}")
        expect_line(page, "Done")
    return job_id


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    house = House(tmp_path / "data")
    yield house
    house.store.close()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave it to the system when to write: nobody pulls the plug here."""
    monkeypatch.setattr("jobs.journal._sync", lambda fd: None)
    monkeypatch.setattr("jobs.job_files.sync_folder", lambda folder: None)
