"""benchmark.engine on the tiny checkpoint, and its comparison of ids. Run: pytest tests/test_benchmark_engine.py"""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from benchmark import engine as benchmark_engine
from benchmark.engine import SIZES, Runs, Teacher, describe, draw_frames, main, median_of, reference_frame_s
from benchmark.phases import PhaseWatch
from benchmark.roofline import Ceilings
from pipeline.moondream.checkpoint import Checkpoint

SLOW = Ceilings(354e9, 100e9, 31e9)  # half the reference machine's arithmetic


@pytest.mark.long
def test_it_measures_both_sizes_and_every_phase(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--random-weights", "tiny", "--folder", str(tmp_path), "--dtype", "float32", "--frames", "3"]

    assert main([*arguments, "--tokens", "4", "--repeats", "2", "--alone", "1"]) == 0

    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["size"] for row in result["rows"]] == list(SIZES)
    for row in result["rows"]:
        assert row["ids_equal"] == row["ids_compared"] == 8  # 2 runs of 1 frame, in float32
        assert len(row["ceilings_before_each_run"]) == 4 and row["ceilings"]["matmul_flops"] > 0
        assert row["ratio"] == pytest.approx(row["alone"]["frame_s"] / row["in_flight"]["frame_s"])
        for kind in (row["in_flight"], row["alone"]):
            assert len(kind["runs_frame_s"]) == 2 and kind["tokens_per_s"] > 0
            assert all(kind["phases"][phase]["s_per_frame"] > 0 for phase in ("encode", "prefill", "decode"))


def test_a_teacher_finds_each_id_that_differs_and_goes_on_with_the_given_one(endless_checkpoint: Checkpoint) -> None:
    images = list(draw_frames(2, SIZES["360p"]))

    def run(teacher: Teacher | None = None) -> list[tuple[int, ...]]:
        return describe(Runs(1, PhaseWatch(endless_checkpoint, SLOW)), images, endless_checkpoint, 6, teacher)

    free = run()
    wrong = list(free[1])
    wrong[2] = (wrong[2] + 1) % 400
    honest, misled = Teacher(free), Teacher([free[0], tuple(wrong)])

    assert run(honest) == free and honest.gaps == []
    assert run(misled) == [free[0], tuple(wrong)]
    assert len(misled.gaps) >= 1 and all(gap > 0 for gap in misled.gaps)  # what follows a wrong id may differ too


def test_ceilings_are_medians_of_looks_before_each_run() -> None:
    looks = [Ceilings(700e9, 200e9, 31e9), Ceilings(1600e9, 280e9, 29e9), Ceilings(1500e9, 250e9, 30e9)]

    assert median_of(looks) == Ceilings(1500e9, 250e9, 30e9)


def test_the_reference_is_slower_where_the_machine_is() -> None:
    there = Ceilings(708e9, 0, 31e9)

    assert reference_frame_s("360p", there, 32) == pytest.approx(3.1 + 5.5 + 32 * 0.23)
    assert reference_frame_s("360p", SLOW, 32) == pytest.approx(2 * (3.1 + 5.5) + 32 * 0.23)


def test_a_missed_requirement_of_the_2b_model_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    phases = {name: {"reached": 0.58, "bound_by": "arithmetic", "s_per_frame": 2.0} for name in benchmark_engine.PHASES}
    row = {
        "size": "360p",
        "num_tokens": 32,
        "ceilings": asdict(SLOW),
        "ceilings_before_each_run": [asdict(SLOW)] * 2,
        "in_flight": {"frame_s": 8.0, "tokens_per_s": 20.0, "phases": phases},
        "alone": {"frame_s": 12.0, "tokens_per_s": 5.0, "phases": phases},
        "ids_compared": 64,
        "ids_equal": 63,
        "gaps": [0.0312],
    }

    verdicts = benchmark_engine.tell(row, is_judged=True)

    assert verdicts == [False, True, True, True, True]  # encode; prefill, decode, in flight, reference
    printed = capsys.readouterr().out
    assert "MISSED" in printed and "98.4%" in printed and "0.031" in printed
