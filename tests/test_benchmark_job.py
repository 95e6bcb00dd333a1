"""benchmark/job.py, with a checkpoint of 1 MB and few frames."""

import json
from pathlib import Path

import pytest

from benchmark import job
from pipeline.demo import SAMPLE_VIDEO

FEW = ["--random-weights", "tiny", "--frames", "4", "--max-tokens", "3", "--slots", "2", "--repeats", "1"]


def test_the_job_benchmark_compares_a_real_job_with_the_engine_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alike = ["--video", str(SAMPLE_VIDEO), "--threads", "1", "--device", "cpu", "--dtype", "float32"]

    assert job.main([*FEW, *alike, "--output", str(tmp_path)]) == 0

    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    (saved,) = tmp_path.glob("job-*.json")
    assert json.loads(saved.read_text()) == result
    in_server, alone = result["job"], result["alone"]
    assert result["ratio"] == pytest.approx(in_server["wall_s"] / alone["wall_s"], rel=0.01)
    assert 4 <= in_server["num_tokens"] == alone["num_tokens"] <= 4 * 3
    assert 0 < in_server["first_result_s"] <= in_server["wall_s"]
    in_run = sum(in_server[f"{part}_s"] for part in ("download", "frames", "model", "rest"))
    assert 0 < in_run < in_server["wall_s"] + 0.01


def test_without_a_checkpoint_nothing_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert job.main([*FEW, "--folder", str(Path(__file__).parent)]) == 2

    assert "Give an empty folder" in capsys.readouterr().err
