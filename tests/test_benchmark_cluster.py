"""benchmark/cluster.py without a cluster: with one, it is run in the environment of tests/ray."""

import json
from pathlib import Path

import pytest

from benchmark import cluster

FEW = ["--repeats", "1", "--batches", "2", "--sizes", "360p", "--seconds", "10", "--jobs", "1"]


def test_the_cluster_benchmark_reports_what_it_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cluster.main(["--sides", "threads", *FEW, "--output", str(tmp_path)]) == 0

    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    (saved,) = tmp_path.glob("cluster-*.json")
    assert json.loads(saved.read_text()) == result
    found = result["360p"]
    assert set(found) == {"batch_ms", "first_answer_ms", "frames_per_second", "app_cpu_ms", "decoders_cpu_ms"}
    assert all(of_sides.keys() == {"threads"} and of_sides["threads"] > 0 for of_sides in found.values())
    assert 0 < found["batch_ms"]["threads"] / 1000 < result["cold_first_answer_s"]["threads"]


def test_a_job_that_fails_is_no_measurement(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "360p-h264-10s.mp4").write_bytes(b"no video")

    assert cluster.main(["--sides", "threads", *FEW, "--folder", str(tmp_path)]) == cluster.EXIT_NOT_MEASURED

    assert "error: " in capsys.readouterr().err
