"""The soak program, for a moment, and that it finds what grows. The long one: python -m tests.soak --minutes 30"""

import json
import os
from collections import Counter
from pathlib import Path

import pytest
import soak
from process_watch import Held, held, slope_per_hour
from visitors import Tally

REST = Held(500_000_000, 0, 20, 15, 0, 30_000_000, 200)


@pytest.mark.long
def test_things_are_done_and_samples_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples = tmp_path / "samples.jsonl"

    soak.soak(0.05, 3, tmp_path, samples, sample_s=0.3, rest_s=0.1)

    printed = capsys.readouterr()
    found = json.loads(printed.out.splitlines()[-1])
    assert sum(found["done"].values()) >= 3
    assert not [line for line in printed.err.splitlines() if "grows" not in line and "at rest" not in line]
    lines = samples.read_text(encoding="utf-8").splitlines()
    assert len(lines) >= 5 and json.loads(lines[-1])["rss_bytes"] > 100_000_000


def run(rss_bytes: int = 0, num_files: int = 0, disk_bytes: int = 0) -> list[tuple[float, Held]]:
    """Half an hour, in which so much is added."""
    return [
        (
            10.0 * i,
            Held(500_000_000 + rss_bytes * i // 180, 0, 20 + num_files, 15, 0, 30_000_000 + disk_bytes * i // 180, 200),
        )
        for i in range(181)
    ]


def test_a_flat_run_is_good() -> None:
    assert soak.judge(run(), REST, REST, Tally(), Counter()) == 0


@pytest.mark.parametrize(
    ("taken", "after", "words"),
    [
        (run(rss_bytes=30_000_000), REST, "rss_bytes grows by 60,000,000 an hour"),
        (run(disk_bytes=4_000_000), REST, "disk_bytes grows by 8,000,000 an hour"),
        (run(), Held(500_000_000, 0, 30, 15, 0), "num_files at rest went from 20 to 30"),
        (run(), Held(500_000_000, 0, 20, 15, 3), "num_children at rest went from 0 to 3"),
    ],
)
def test_what_grows_is_named(
    taken: list[tuple[float, Held]], after: Held, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert soak.judge(taken, REST, after, Tally(), Counter()) == 1
    assert words in capsys.readouterr().err


def test_a_slope_is_told_per_hour() -> None:
    assert slope_per_hour([0.0, 10.0, 20.0], [5.0, 6.0, 7.0]) == pytest.approx(360)


def test_what_a_process_holds_is_read_off_the_system(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_bytes(b"12345")
    before = held(os.getpid(), tmp_path)
    with (tmp_path / "folder" / "file").open("rb"):
        after = held(os.getpid(), tmp_path)

    assert after.num_files == before.num_files + 1
    assert (before.disk_bytes, before.num_disk_entries) == (5, 2)
    assert before.rss_bytes > 10_000_000 and before.num_threads >= 1
