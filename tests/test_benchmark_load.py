"""benchmark/load.py and benchmark/random_weights.py, with a checkpoint of 1 MB."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from benchmark import load
from benchmark.random_weights import make_checkpoint
from pipeline.moondream.checkpoint import REAL_VOCAB_SIZE, fits, load_checkpoint
from pipeline.moondream.config import MoondreamConfig

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    *_, num_bytes = make_checkpoint(folder, "tiny")
    assert num_bytes > 0
    return folder


def test_random_weights_load_strictly(folder: Path) -> None:
    checkpoint = load_checkpoint(str(folder), device="cpu", dtype="bfloat16")

    assert all(parameter.isfinite().all() for parameter in checkpoint.model.parameters())
    assert torch.equal(checkpoint.model.text.post_ln.weight, torch.ones(64, dtype=torch.bfloat16))
    assert checkpoint.encode("query") == [checkpoint.config.tokenizer.templates.query.prefix[1]]


def test_the_tokenizer_passes_for_the_real_one_at_the_real_vocabulary(folder: Path) -> None:
    config = MoondreamConfig.from_file(folder / "config.json")
    config = replace(config, text=replace(config.text, vocab_size=REAL_VOCAB_SIZE))

    assert fits(PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json")), config)


@pytest.mark.long
def test_the_program_measures_in_a_temporary_folder_and_removes_it(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmark.load", "--random-weights", "tiny"]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "TMPDIR": str(tmp_path)}, capture_output=True, text=True, check=True
    )

    result = json.loads(done.stdout.splitlines()[-1])
    assert set(result["hardware"]) == {"cpu", "num_cores", "has_native_bfloat16"}
    assert result["peak_rss_bytes"] >= result["baseline_rss_bytes"] > result["file_bytes"] > 10**6
    assert result["ratio"] == round(result["peak_rss_bytes"] / result["file_bytes"], 3)
    assert [frame["size"] for frame in result["frames"]] == ["640x360", "1280x720"]
    assert all(1 <= frame["num_tokens"] <= 32 and frame["total_ms"] > 0 for frame in result["frames"])
    assert not any(tmp_path.glob("moonreel-*"))


def test_a_peak_above_the_limit_fails_unless_the_weights_were_converted(folder: Path) -> None:
    """Beside 1 MB of weights, the libraries alone are far above the limit; called tiny, it would not be judged."""
    assert load.measure(folder, "0.5b", "bfloat16") == 1
    assert load.measure(folder, "0.5b", "float32") == 0


@pytest.mark.long
def test_a_given_folder_is_used_as_it_is_and_kept(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}

    assert load.main(["--random-weights", "tiny", "--folder", str(folder)]) == 0

    assert json.loads(capfd.readouterr().out.splitlines()[-1])["size"] == "tiny"
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_a_folder_with_something_else_is_refused_and_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tokenizer.json").write_text("precious")

    assert load.main(["--random-weights", "tiny", "--folder", str(tmp_path)]) == 2

    assert "Give an empty folder" in capsys.readouterr().err
    assert [path.read_text() for path in tmp_path.iterdir()] == ["precious"]
