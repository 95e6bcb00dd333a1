"""benchmark/store.py, with few jobs."""

import json
from pathlib import Path

import pytest

from benchmark import store


@pytest.mark.long
def test_the_store_benchmark_reports_what_it_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = ["--jobs", "60", "--frames", "40", "--appends", "10", "--requests", "40", "--clients", "2", "--repeats", "1"]

    assert store.main([*few, "--folder", str(tmp_path)]) == 0

    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    for append in result["appends"].values():
        assert all(value > 0 for value in append.values())
    assert result["starts"]["open_s"] <= result["starts"]["open_and_recover_s"] < result["starts"]["full_start_s"]
    assert result["starts"]["empty_rss_mb"] > 0
    assert {row["num"] for kind, row in result["requests"].items() if "mixed" not in kind} == {40}
    assert sum(row["num"] for kind, row in result["requests"].items() if "mixed" in kind) == 40
    assert all(0 < row["p50_ms"] <= row["p99_ms"] <= row["max_ms"] for row in result["requests"].values())
    assert not list(tmp_path.iterdir())


def test_the_written_history_is_one_that_the_store_can_use(tmp_path: Path) -> None:
    own = store.write_history(tmp_path / "data", 30)
    jobs = store.JobStore(tmp_path / "data")
    try:
        jobs.recover()

        assert jobs.page(None, None, None, 50).total_count == 30
        assert [record["job_id"] for record in jobs.page(store.OWNER, None, None, 50).records] == own[::-1]
        with jobs.frames(own[0]) as frames:
            assert [result["frame_idx"] for result in frames.results()] == list(range(store.FRAMES_PER_JOB))
    finally:
        jobs.close()


def test_a_percentile_is_one_of_the_values() -> None:
    values = [float(value) for value in range(200)]

    assert (store.percentile(values, 0.99), store.percentile(values[:1], 0.99)) == (198.0, 0.0)
