"""The engine against what the reference implementation computed. Run: pytest tests/test_verify.py"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.moondream.verify import Report, main


def verify(capsys: pytest.CaptureFixture[str], folder: Path, *options: str) -> tuple[int, dict[str, Any]]:
    """-> the exit code, and the last line of the output."""
    exit_code = main([str(folder), *options])
    return exit_code, json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.parametrize(("name", "num_slots", "num_images"), [("base", 3, 4), ("gqa-eos", 8, 3)])
def test_the_engine_agrees_with_the_reference(
    golden: Path, capsys: pytest.CaptureFixture[str], name: str, num_slots: int, num_images: int
) -> None:
    exit_code, report = verify(capsys, golden / name, "--slots", str(num_slots))

    assert (exit_code, report["ok"]) == (0, True)
    assert report["images"] == report["crops_equal"] == num_images
    assert report["ids_equal"] == report["ids_compared"] > 200
    assert max(report["max_abs_embedding"], report["max_abs_first_logits"]) < 1e-4
    assert (report["slots"], report["dtype"]) == (num_slots, "float32")


def test_bfloat16_agrees_within_its_precision(golden: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exit_code, report = verify(capsys, golden / "gqa-eos", "--slots", "8", "--dtype", "bfloat16")

    assert (exit_code, report["ok"], report["dtype"]) == (0, True, "bfloat16")


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["base", "gqa-eos"])
def test_a_gpu_agrees_with_the_reference(golden: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    exit_code, report = verify(capsys, golden / name, "--slots", "8", "--device", "cuda")

    assert (exit_code, report["ok"]) == (0, True)


def test_one_wrong_id_is_found(golden: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(shutil.copytree(golden / "gqa-eos", tmp_path / "copy"))
    expected = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
    expected["images"][1]["query"][0]["answer_ids"][-1] += 1
    (folder / "expected.json").write_text(json.dumps(expected), encoding="utf-8")

    exit_code, report = verify(capsys, folder, "--slots", "8")

    assert (exit_code, report["ok"]) == (1, False)
    assert (report["queries_equal"], report["ids_equal"]) == (report["queries"] - 1, report["ids_compared"] - 1)


def test_a_model_that_computes_nan_is_found(golden: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """max(0.0, nan) is 0.0: NaN counted as agreement, and in bfloat16 nothing else would have shown it."""
    folder = Path(shutil.copytree(golden / "gqa-eos", tmp_path / "copy"))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.text.lm_head.bias"][7] = torch.nan
    save_file(tensors, folder / "model.safetensors")

    assert main([str(folder), "--slots", "8", "--dtype", "bfloat16"]) == 1
    assert "NaN" in capsys.readouterr().err


def test_a_folder_without_reference_outputs_is_an_error(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tiny_folder)]) == 1
    assert "expected.json" in capsys.readouterr().err


# --- the verdict


def agreeing(dtype: str = "float32") -> Report:
    return Report(images=2, crops_equal=2, queries=3, queries_equal=3, prompts_equal=3, dtype=dtype)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("images", 0),
        ("crops_equal", 1),
        ("prompts_equal", 2),
        ("queries_equal", 2),
        ("captions", 1),
        ("reasoning", 1),
        ("max_abs_embedding", 2e-3),
        ("max_abs_embedding", float("inf")),
        ("max_abs_first_logits", 2e-3),
        ("max_abs_first_logits", float("nan")),
        ("max_abs_box", 2e-5),
        ("max_abs_box", None),
        ("max_abs_point", None),
    ],
)
def test_any_disagreement_is_enough_for_a_no(field: str, value: float | None) -> None:
    report = agreeing()
    assert report.judge()

    setattr(report, field, value)

    assert not report.judge()


def test_bfloat16_may_differ_in_ids_but_not_in_inputs() -> None:
    report = agreeing("bfloat16")
    report.queries_equal, report.max_abs_embedding, report.max_abs_box = 1, 0.29, None
    assert report.judge()

    report.crops_equal = 1

    assert not report.judge()


def test_ids_are_compared_up_to_the_first_difference() -> None:
    report = Report()

    same = [report.compare_ids([1, 2, 3], [1, 2, 3]), report.compare_ids([1, 9, 3], [1, 2, 3])]

    assert (same, report.ids_equal, report.ids_compared) == ([True, False], 3 + 1, 3 + 2)


def test_sections_may_be_missing(golden: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(shutil.copytree(golden / "gqa-eos", tmp_path / "copy"))
    expected = json.loads((folder / "expected.json").read_text())
    first, second, third = expected["images"]
    del first["reasoning"], first["point"], expected["max_objects"]
    second.update(query=[], caption=None, reasoning=[], detect=[], point=[])
    third["detect"] = third["point"] = first["detect"] = []
    (folder / "expected.json").write_text(json.dumps(expected))

    exit_code, report = verify(capsys, folder, "--slots", "3")

    assert (exit_code, report["ok"], report["images"], report["queries"]) == (0, True, 3, 6)


def test_zero_slots_are_refused(golden: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([str(golden / "base"), "--slots", "0"])
    assert "--slots must be at least 1" in capsys.readouterr().err
