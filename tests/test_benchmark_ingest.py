"""benchmark/ingest.py, on short and small clips."""

import json
from pathlib import Path

import pytest

from benchmark import ingest
from pipeline.frames import probe


def test_the_ingest_benchmark_reports_what_it_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--folder", str(tmp_path), "--heights", "90", "--repeats", "1", "--clip-s", "10", "--long-s", "20"]

    assert ingest.main(arguments) == 0

    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [(clip["height"], clip["codec"]) for clip in result["clips"]] == [(90, "h264"), (90, "hevc")]
    for clip in result["clips"]:
        assert set(clip["cpu_s"]) == {"cv2", "1 fps", "5 fps"}
        assert all(seconds > 0 for seconds in [*clip["cpu_s"].values(), *clip["first_frame_s"].values()])
    assert result["memory"]["20"]["decoder_peak_mb"] > 0
    assert not list(tmp_path.glob("*.part"))


def test_a_clip_has_the_length_asked_for(tmp_path: Path) -> None:
    info = probe(ingest.make_clip(tmp_path, "h264", 90, 30))

    assert (info.height, info.duration_s, info.num_frames_estimate) == (90, 30.0, 900)


def test_the_mean_of_ratios_is_geometric() -> None:
    assert ingest.geometric_mean([0.5, 2.0]) == 1.0
