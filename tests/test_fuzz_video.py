"""The fuzzing program, for a few files; the long run is python -m tests.fuzz_video --files 1000."""

import json
import random
from pathlib import Path

import fuzz_video
import pytest

from pipeline.errors import VideoUnreadable


def test_damaged_files_give_frames_or_errors_of_ours(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fuzz_video.fuzz(40, seed=3, keep=tmp_path) == 0

    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (found["files"], found["wrong"]) == (40, 0)
    assert found["frames"] > 10 and found["not_a_video"] > 3  # the mutators neither spare nor spoil everything


def test_a_seed_makes_the_same_files() -> None:
    files = {"a.mp4": bytes(range(256)) * 20, "b.webm": bytes(5000)}

    assert fuzz_video.mutated(random.Random(7), files) == fuzz_video.mutated(random.Random(7), files)


def test_every_kind_of_container_is_damaged(tmp_path: Path) -> None:
    containers = {Path(name).suffix for name in fuzz_video.sources(tmp_path)}

    assert len(containers) >= 8


def test_what_goes_wrong_is_found_and_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def ingest(content: bytes, folder: Path) -> int:
        if content[0] % 2:
            raise VideoUnreadable("This file is no video.")
        raise ZeroDivisionError

    monkeypatch.setattr(fuzz_video, "ingest", ingest)

    assert fuzz_video.fuzz(20, seed=1, keep=tmp_path / "kept") == 1
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert 0 < found["wrong"] == len(list((tmp_path / "kept").iterdir()))
