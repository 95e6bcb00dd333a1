"""benchmark/pool.py, with a checkpoint of 1 MB."""

import json
from pathlib import Path

import pytest

from benchmark import pool
from benchmark.random_weights import CONFIGS, make_checkpoint

FEW = ["--random-weights", "tiny", "--frames", "2", "--max-tokens", "3", "--repeats", "1", "--device", "cpu"]


def test_the_pool_benchmark_reports_what_it_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "results"

    assert pool.main([*FEW, "--output", str(output)]) == 0

    printed = capsys.readouterr().out
    result = json.loads(printed.splitlines()[-1])
    (saved,) = output.glob("pool-*.json")
    assert json.loads(saved.read_text()) == result
    runs = {name: values[0] for name, values in result["runs"].items()}
    assert result["speed_up"] == pytest.approx(runs["one_by_one_s"] / runs["together_s"], rel=0.1)
    assert result["frames_per_second"] == pytest.approx(8 / runs["together_s"], rel=0.1)
    assert 0 < result["busy_share_of_cores"] <= 1.1 and result["alone_s"] > 0
    assert 0 <= result["first_answer_queued_s"] < result["first_answer_s"] > result["first_answer_in_slot_s"] > 0
    assert "MISSED" not in printed  # a tiny model is not judged


def test_a_figure_that_is_not_as_required_is_an_exit_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is a thousand times as fast; called by another name, the tiny model is judged."""
    list(make_checkpoint(tmp_path / "checkpoint", "tiny"))
    monkeypatch.setitem(CONFIGS, "other", CONFIGS["tiny"])
    monkeypatch.setattr(pool, "MIN_SPEED_UP", 1000)

    few = [*FEW, "--random-weights", "other", "--folder", str(tmp_path / "checkpoint"), "--output", str(tmp_path)]
    assert pool.main(few) == 1

    assert "MISSED" in capsys.readouterr().out
