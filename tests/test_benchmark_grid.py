"""`python -m benchmark`: the search on made-up figures, the load on tiny models, and once the whole program."""

import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from PIL import Image

from benchmark import closed_loop, plot, saved
from benchmark.__main__ import main
from benchmark.closed_loop import Load
from benchmark.grid import OutOfMemoryRow, Row, best, best_under_latency, instance_counts, search
from benchmark.phases import PhaseWatch
from benchmark.roofline import Ceilings, decode_bytes, decode_flops, encode_flops, prefill_flops
from pipeline.errors import ModelError
from pipeline.moondream.capacity import device_slug, read_tuned
from pipeline.moondream.checkpoint import Checkpoint
from pipeline.moondream.engine import Engine
from pipeline.moondream.prompts import Query

IMAGE = np.zeros((40, 40, 3), np.uint8)


def row(instances: int, slots: int, frames_per_s: float, latency_p95_s: float = 1.0) -> Row:
    return Row(instances, slots, frames_per_s, 10 * frames_per_s, latency_p95_s / 2, latency_p95_s, 10**9, 0.5, 8, 1.0)


def test_the_search_gives_up_what_gains_nothing_or_does_not_fit() -> None:
    rates = {1: [10, 18, 18.1, 18.2], 2: [19, 30, None], 3: [30.1, 30.2, 30.3], 4: [25, 25, 25]}

    def measure(instances: int, slots: int) -> Row | OutOfMemoryRow:
        rate = rates[instances][slots.bit_length() - 1]
        return OutOfMemoryRow(instances, slots) if rate is None else row(instances, slots, rate)

    measured = list(search([1, 2, 3, 4, 6], [1, 2, 4, 8], measure))

    settings = [(row.instances, row.slots) for row in measured]
    assert settings == [(i, s) for i in (1, 2, 3, 4) for s in ((1, 2, 4, 8) if i == 1 else (1, 2, 4))]


def test_as_many_instances_as_asked_for_are_tried() -> None:
    assert instance_counts(1) == [1]
    assert instance_counts(20) == [1, 2, 3, 4, 6, 8, 12, 16, 20]


def test_the_best_setting_is_the_smallest_of_the_fast_ones() -> None:
    rows = [row(1, 4, 10.0, 1.0), row(1, 8, 19.6, 2.0), row(2, 4, 19.5, 3.0), row(1, 16, 20.0, 4.0)]

    assert best(rows) == rows[1]
    assert best_under_latency(rows, 1.5) == rows[0]
    assert best_under_latency(rows, 0.5) is best([]) is None


def test_a_load_keeps_every_slot_busy_and_counts_whole_answers(endless_checkpoint: Checkpoint) -> None:
    load = Load(endless_checkpoint, [IMAGE], Query("hello", max_tokens=3), min_s=0.0, max_s=10.0)
    watch = PhaseWatch(endless_checkpoint, Ceilings(1e3, 1e3, 1e3))
    measured = closed_loop.measure(load, 2, 3, watch)

    assert isinstance(measured, Row)
    assert watch.phases["decode"].spent_s > 0 and watch.phases["prefill"].spent_s > 0
    assert 12 <= measured.num_frames < 12 + 12  # two per slot, and what arrived with the last
    assert measured.tokens_per_s == pytest.approx(3 * measured.frames_per_s)
    assert 0 < measured.latency_p50_s <= measured.latency_p95_s
    assert measured.peak_memory_bytes > 10**8 and 0 < (measured.utilisation or 0) <= 1.1


def test_a_slow_setting_is_measured_on_fewer_answers() -> None:
    load = Load(cast(Checkpoint, None), [IMAGE], Query(), min_s=3.0, max_s=10.0)

    assert [load.is_enough(2, 3.0), load.is_enough(1, 10.0)] == [True, True]
    assert [load.is_enough(2, 2.9), load.is_enough(1.9, 9.0), load.is_enough(0.9, 60.0)] == [False] * 3


def test_a_cache_beyond_the_memory_is_a_row(tiny_checkpoint: Checkpoint) -> None:
    load = Load(tiny_checkpoint, [IMAGE], Query("hello", max_tokens=3), min_s=0.0, max_s=10.0)

    assert closed_loop.measure(load, 10**6, 1024) == OutOfMemoryRow(10**6, 1024)


@pytest.mark.parametrize("words", ["the numbers do not add up", "CUDA out of memory"])
def test_an_engine_that_fails_is_told_and_not_measured(endless_checkpoint: Checkpoint, words: str) -> None:
    """The pool would replace it, and the figures would hold for the rest."""

    class Breaking(PhaseWatch):
        def watch(self, engine: Engine) -> None:
            def fail(*_: object) -> None:
                raise RuntimeError(words)

            vars(engine._runner)["decode"] = fail

    load = Load(endless_checkpoint, [IMAGE], Query("hello", max_tokens=3), min_s=0.0, max_s=10.0)
    watch = Breaking(endless_checkpoint, Ceilings(1e3, 1e3, 1e3))
    if "memory" in words:
        assert closed_loop.measure(load, 1, 2, watch) == OutOfMemoryRow(1, 2)
    else:
        with pytest.raises(ModelError, match=words):
            closed_loop.measure(load, 1, 2, watch)


def test_the_phases_count_the_work_of_every_frame(endless_checkpoint: Checkpoint) -> None:
    config, task = endless_checkpoint.config, Query("hello", max_tokens=3)
    watch, engine = PhaseWatch(endless_checkpoint, Ceilings(1e3, 1e3, 1e3)), Engine(endless_checkpoint, num_slots=1)
    watch.watch(engine)
    watch.start()
    for key in range(2):
        engine.submit(key, IMAGE, [task])
    completed = [done for _ in range(100) if engine.num_in_flight for done in engine.step()]
    (prompt,) = {len(done.answers[0].prompt_ids) for done in completed}
    report = watch.report(instances=1, num_frames=2, run_s=100.0)

    start = config.prefix_len
    steps = (start + prompt + 1, start + prompt + 2)  # the first of three tokens comes of the prompt
    assert 1e12 * report["encode"]["tflop_per_frame"] == encode_flops(config, 1, 1)
    prefill = prefill_flops(config, start) + prefill_flops(config, prompt, start)
    assert 1e12 * report["prefill"]["tflop_per_frame"] == pytest.approx(prefill)
    assert 1e12 * report["decode"]["tflop_per_frame"] == pytest.approx(sum(decode_flops(config, 1, n) for n in steps))
    assert 1e9 * report["decode"]["gb_per_frame"] == pytest.approx(sum(decode_bytes(config, 4, 1, n) for n in steps))
    assert report["prefill"]["least_s_per_frame"] == pytest.approx(prefill / 1e3)
    assert sum(phase["share"] for phase in report.values()) == pytest.approx(1)
    watch.start()
    watch.stop()
    engine.submit("late", IMAGE, [task])
    engine.step()
    assert watch.report(1, 2, 1.0)["encode"]["s_per_frame"] == 0


def test_a_new_run_replaces_the_entry_of_its_model_and_format_for_the_app(
    tmp_path: Path, tiny_checkpoint: Checkpoint
) -> None:
    path = tmp_path / "new" / f"{device_slug(tiny_checkpoint.device)}.json"
    entry = {
        "num_parameters": sum(parameter.numel() for parameter in tiny_checkpoint.model.parameters()),
        "measured_at": "2026-11-24",
        "rows": [{"rate": 3.00004, "text": "1.23456"}],
    }
    for dtype, slots in (("float32", 1), ("bfloat16", 2), ("float32", 4)):
        saved.save(path, "A device", {**entry, "dtype": dtype, "best": {"instances": 3, "slots": slots}})

    content = json.loads(path.read_text())
    assert [model["dtype"] for model in content["models"]] == ["bfloat16", "float32"]
    assert content["models"][0]["rows"] == [{"rate": 3.0, "text": "1.23456"}]
    found = read_tuned(path.parent, tiny_checkpoint)
    assert found and (found.instances, found.slots) == (3, 4)
    assert "A device on 2026-11-24" in found.why


@pytest.mark.parametrize("high", [0.013, 0.99, 1.0, 7.1, 20.0, 999.0])
def test_ticks_are_round_and_cover_the_values(high: float) -> None:
    ticks = plot.linear_ticks(high)
    assert ticks[0] == 0 and ticks[-2] < high <= ticks[-1] * (1 + 1e-9) and 3 <= len(ticks) <= 9

    ticks = plot.log_ticks(high / 30, high)
    assert ticks[0] <= high / 30 and ticks[1] > high / 30 and ticks[-2] < high <= ticks[-1]


def test_one_row_is_enough_for_a_picture(tmp_path: Path) -> None:
    only = row(1, 1, 2.5)
    plot.draw(tmp_path / "one.png", "One", [only], only, bound_s=None)

    with Image.open(tmp_path / "one.png") as picture:
        assert picture.size == (plot.WIDTH, plot.HEIGHT)


def test_the_whole_program_finds_saves_and_draws(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmark.roofline.REPEAT_S", 0.0)
    few = ["--random_weights", "tiny", "--max_models", "1", "--slots", "2,1", "--max-tokens", "4", "--min-s", "0"]

    assert main([*few, "--fps", "0.5", "--device", "cpu", "--dtype", "float32", "--output", str(tmp_path)]) == 0

    (path,) = tmp_path.glob("*.json")
    content = json.loads(path.read_text(encoding="utf-8"))
    (entry,) = content["models"]
    settings = [{name: row[name] for name in ("instances", "slots")} for row in entry["rows"]]
    assert settings == [{"instances": 1, "slots": 1}, {"instances": 1, "slots": 2}]
    assert entry["best"] in settings
    assert entry["best_under_latency"]["latency_bound_s"] > 0
    assert (entry["name"], entry["dtype"], entry["max_tokens"]) == ("random weights tiny", "float32", 4)
    assert entry["num_parameters"] > 10**5 and content["device"].endswith("cores")
    assert entry["roofline"]["ceilings"]["matmul_flops"] > 0
    assert all(row["tokens_per_s"] == pytest.approx(4 * row["frames_per_s"], rel=0.01) for row in entry["rows"])
    with Image.open(path.with_name(f"{path.stem}-random-weights-tiny.png")) as picture:
        assert picture.size == (plot.WIDTH, plot.HEIGHT)
    printed = capsys.readouterr().out
    assert "best: 1 instance of" in printed and "where the time goes" in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-models", "0"], "max_models"),
        (["--max-tokens", "0"], "max_tokens"),
        (["--folder", "here"], "random_weights"),
        (["--video", "nowhere.mp4"], "no file"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: Any) -> None:
        raise AssertionError("loaded before the options were looked at")

    monkeypatch.setattr("benchmark.__main__.load_checkpoint", load)

    assert main(options) == 2
    assert message in capsys.readouterr().err
