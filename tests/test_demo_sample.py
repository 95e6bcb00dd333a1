"""The sample video is what sample.json says."""

import json

import numpy as np

from pipeline.__main__ import SAMPLE_VIDEO
from pipeline.demo.lessons import describe
from pipeline.demo.sample import FPS, frames
from pipeline.frames import probe, sample_frames


def test_the_video_shows_what_is_drawn() -> None:
    drawn = list(frames())

    for frame in sample_frames(SAMPLE_VIDEO, 1):
        difference = np.abs(frame.image.astype(int) - drawn[frame.frame_idx][1])
        assert difference.mean() < 3


def test_the_truth_is_that_of_the_drawn_scenes() -> None:
    truth = json.loads(SAMPLE_VIDEO.with_suffix(".json").read_text(encoding="utf-8"))["frames"]
    drawn = list(frames())

    assert [t["description"] for t in truth] == [describe(drawn[i * FPS][0]) for i in range(len(drawn) // FPS)]
    assert [t["timestamp_ms"] for t in truth] == [f.timestamp_ms for f in sample_frames(SAMPLE_VIDEO, 1)]


def test_the_video_is_long_enough_and_plays_in_browsers() -> None:
    info = probe(SAMPLE_VIDEO)

    assert info.duration_s and 20 <= info.duration_s <= 30
    assert (info.codec, info.container) == ("h264", "mp4")
    assert SAMPLE_VIDEO.read_bytes().find(b"moov") < SAMPLE_VIDEO.read_bytes().find(b"mdat")


def test_it_has_cuts_a_still_stretch_and_movement() -> None:
    changes = [
        np.abs(a.image.astype(int) - b.image).mean()
        for a, b in zip(list(sample_frames(SAMPLE_VIDEO, 1)), list(sample_frames(SAMPLE_VIDEO, 1))[1:], strict=False)
    ]

    assert sum(change > 30 for change in changes) >= 3
    assert min(sum(changes[i : i + 5]) for i in range(len(changes) - 5)) < 5
    assert sum(1 < change < 30 for change in changes) >= 4
