"""How far the model is, while it is downloaded and loaded: told by the library, and by a server that waits for it."""

import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from fake_hub import FakeHub, hub_of, look_up
from safetensors.torch import load_file, save_file
from serving import SAMPLE, ServerProcess, wait_until

from pipeline.moondream.checkpoint import load_checkpoint
from pipeline.moondream.hub import DEMO_FOLDER, Progress

FOLLOW = """
from pipeline.moondream.hub import *
find_checkpoint("some/model", on_progress=lambda p: print(p.stage, p.num_bytes, p.total_bytes, flush=True))
"""
PADDING = {"model.text.padding.kv_cache.k": torch.zeros(6 * 2**20)}  # 24 MiB; the loader passes it over


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeHub]:
    """The demo model, in a larger file: huggingface_hub counts pieces of 10 MiB."""
    folder = Path(shutil.copytree(DEMO_FOLDER, tmp_path_factory.mktemp("hub") / "repository"))
    weights = folder / "model.safetensors"
    save_file({**load_file(weights), **PADDING}, weights)
    with hub_of(folder) as fake:
        yield fake


def followed(fake: FakeHub, home: Path) -> list[tuple[int, int]]:
    """Find the model -> the bytes that were told, and of how many."""
    found = look_up(FOLLOW, HF_HOME=str(home), HF_ENDPOINT=fake.url, HF_HUB_DISABLE_PROGRESS_BARS="")
    assert found.error == "" and "Fetching" not in found.told, found.told
    told = [line.split() for line in found.printed.splitlines()]
    assert {stage for stage, *_ in told} <= {"downloaded"}
    return [(int(num_bytes), int(total_bytes)) for _, num_bytes, total_bytes in told]


def test_a_download_tells_its_bytes_and_no_more_than_are_to_come(fake: FakeHub, tmp_path: Path) -> None:
    told = followed(fake, tmp_path)

    sizes = {path.name: path.stat().st_size for path in fake.folder.iterdir()}
    everything = sum(sizes[name] for name in ("config.json", "tokenizer.json", "model.safetensors"))
    assert told == sorted(told) and told[-1] == (everything, everything)
    assert {num_bytes // (10 * 2**20) for num_bytes, _ in told} == {0, 1, 2, 3}


def test_what_is_in_the_cache_does_not_count(fake: FakeHub, tmp_path: Path) -> None:
    assert followed(fake, tmp_path) != []
    (weights,) = tmp_path.glob("hub/models--some--model/snapshots/*/model.safetensors")
    assert followed(fake, tmp_path) == []

    num_bytes = weights.stat().st_size
    weights.resolve().unlink()
    weights.unlink()
    assert followed(fake, tmp_path)[-1] == (num_bytes, num_bytes)


def test_a_download_that_is_resumed_counts_on(fake: FakeHub, tmp_path: Path) -> None:
    fake.num_breaks, before = 1, len(fake.ranges)
    told = followed(fake, tmp_path)

    assert fake.ranges[before:] == ["", f"bytes={10 * 2**20}-"]
    assert told == sorted(told) and told[-1][0] == told[-1][1]


def test_loading_tells_the_bytes_that_are_loaded() -> None:
    told: list[Progress] = []
    load_checkpoint("demo", device="cpu", on_progress=told.append)

    loaded = [progress.num_bytes for progress in told]
    assert {progress.stage for progress in told} == {"loaded"} and loaded == sorted(loaded)
    (total_bytes,) = {progress.total_bytes for progress in told}
    assert total_bytes and 0.95 < loaded[-1] / total_bytes <= 1


# A server that waits


@dataclass(frozen=True)
class Wait:
    """What a server said while its model was on its way, how it ended in mid-download, and what the next one did."""

    detail: str
    status: str  # of the job that was submitted meanwhile
    code: int
    end_s: float
    final_status: str
    log: str


@pytest.fixture(scope="module")
def wait(fake: FakeHub, tmp_path_factory: pytest.TempPathFactory) -> Wait:
    folder = tmp_path_factory.mktemp("wait")
    environment = {"HF_HOME": str(folder / "hf"), "HF_ENDPOINT": fake.url}
    with ServerProcess(folder / "data", model="some/model", environment=environment) as server:
        fake.may_go_on.clear()
        with server.start(is_ready=False).client() as client:
            sent = client.post("/api/upload", files={"file": ("a.mp4", SAMPLE.read_bytes())}, data={"max_frames": 1})
            status = f"/api/status/{sent.json()['job_id']}"
            told = wait_until(lambda: re.search(r".*\([1-9]\d%\).*", client.get("/api/ready").json()["detail"]))
            before = client.get(status).json()["status"]
        started_s = time.monotonic()
        code = server.stop()
        end_s = time.monotonic() - started_s
        fake.may_go_on.set()
        with server.start().client() as client:
            wait_until(lambda: client.get(status).json()["status"] not in ("submitted", "processing"))
            after = client.get(status).json()["status"]
        server.stop()
        return Wait(told[0], before, code, end_s, after, server.log.read_text(encoding="utf-8"))


def test_a_server_says_how_far_the_download_is(wait: Wait) -> None:
    assert re.fullmatch(r"The model some/model is being downloaded: 1\d\.\d of 3\d\.\d MB \(3\d%\)\.", wait.detail), (
        wait.detail
    )


def test_a_job_waits_for_the_model(wait: Wait) -> None:
    assert (wait.status, wait.final_status) == ("submitted", "completed")


def test_a_download_does_not_hold_up_the_end(wait: Wait) -> None:
    """The server stayed until the download was complete, and was then aborted by the interpreter (SIGABRT)."""
    assert wait.code == 0 and wait.end_s < 8


def test_the_log_tells_each_tenth_of_a_download_once(wait: Wait) -> None:
    percentages = re.findall(r"INFO jobs\.service: .* is being downloaded: .* \((\d+)%\)", wait.log)

    assert percentages[-1] == "100" and percentages.count("100") == 1
    assert "Fetching" not in wait.log
