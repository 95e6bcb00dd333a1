"""The program that measures what reuse saves, once through."""

import json
from pathlib import Path

import cv2
import pytest

from benchmark.reuse import main
from pipeline.demo import SAMPLE_VIDEO


@pytest.mark.long
def test_the_program_measures_a_video_and_shows_the_most_doubtful_reuses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sheet = tmp_path / "reuse.png"
    assert main([str(SAMPLE_VIDEO), "--no-recording", "--repeats", "1", "--sheet", str(sheet)]) == 0

    at_1_fps, at_5_fps = json.loads(capsys.readouterr().out.splitlines()[-1])["videos"]
    assert (at_1_fps["num_frames"], at_5_fps["num_frames"]) == (25, 125)
    assert 0.4 < at_1_fps["share_reused"] < at_5_fps["share_reused"] < 1
    assert 0 < at_5_fps["largest_difference"] <= 10 and at_5_fps["speed_up"] > 0
    assert at_1_fps["share_answers_repeated"] < at_5_fps["share_answers_repeated"] < 1
    assert 0 <= at_5_fps["share_crops_unchanged"] < 1
    image = cv2.imread(str(sheet))
    assert image is not None and image.shape == (12 * 204, 960, 3)
