"""benchmark/page.py and benchmark/long_job.py, with few frames."""

import itertools
import json
from contextlib import closing
from pathlib import Path

import pytest

from benchmark import page
from benchmark.long_job import SOUGHT, write_long_job
from jobs.job_store import JobStore
from pipeline.frames import probe


@pytest.mark.long
def test_the_page_benchmark_reports_what_it_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = ["--frames", "300", "--live-frames", "50", "--viewers", "1", "--scroll-s", "0.5", "--repeats", "1"]

    assert page.main([*few, "--folder", str(tmp_path)]) == 0

    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert 0 < result["start"]["page_s"] < result["start"]["ready_s"]
    assert result["long_job"].keys() >= {"usable_ms", "heap_mb", "search_ms", "list_worst_ms", "strip_worst_ms"}
    assert all(value > 0 for value in [*result["long_job"].values(), *list(result["watching"].values())[:4]])
    assert result["long_job"]["num_elements"] < 1000  # of 300 rows and 300 tiles, only those in sight are there
    assert max(result["long_job"]["list_fps"], result["long_job"]["strip_fps"]) < 70  # a display's
    assert not list(tmp_path.iterdir())


def test_the_long_job_is_one_that_the_store_and_the_decoder_can_use(tmp_path: Path) -> None:
    job_id = write_long_job(tmp_path / "data", 20)
    with closing(JobStore(tmp_path / "data")) as store:
        store.recover()
        record = store.get(job_id)
        with store.frames(job_id) as frames:
            texts = [result["description"] for result in frames.results()]
        info = probe(store.files.video(job_id))

        assert (record["status"], record["num_frames"], record["last_seq"]) == ("completed", 20, 20)
        assert (info.duration_s, info.num_frames_estimate, info.container) == (4.0, 20, "mp4")
        assert sum(SOUGHT in text for text in texts) == 10
        assert all(text != following for text, following in itertools.pairwise(texts))
        assert all(8000 < store.files.picture(job_id, index).stat().st_size < 40_000 for index in range(20))
