"""benchmark/roofline.py: its arithmetic against numbers worked out by hand, its ceilings against reason."""

from pathlib import Path

import pytest
import torch

from benchmark.random_weights import CONFIGS
from benchmark.roofline import Ceilings, decode_bytes, decode_flops, encode_flops, main, measure_ceilings, prefill_flops
from pipeline.moondream.model import Moondream

REAL = CONFIGS["2b"]


def test_encoding_counts_every_crop_and_every_image() -> None:
    # 729 x (2 x 588 x 1152 + 27 x (2 x (4 x 1152^2 + 2 x 1152 x 4304) + 4 x 729 x 1152))
    crop = 729 * (1_354_752 + 27 * (30_449_664 + 3_359_232))
    image = 729 * 2 * (2304 * 8192 + 8192 * 2048)

    assert encode_flops(REAL, 1, 1) == crop + image == pytest.approx(0.718e12, rel=0.001)
    assert encode_flops(REAL, 7, 2) == 7 * crop + 2 * image


def test_prefilling_counts_the_attention_to_what_is_before() -> None:
    weights = 2048 * 6144 + 2048**2 + 2 * 2048 * 8192  # of a layer

    assert prefill_flops(REAL, 730) == 730 * 24 * (2 * weights + 4 * 730 * 2048) == pytest.approx(1.868e12, rel=0.001)
    assert prefill_flops(REAL, 10, 730) == 10 * 24 * (2 * weights + 4 * 740 * 2048)


def test_a_decode_step_reads_the_weights_once_and_each_slot_s_cache() -> None:
    one, eight = (decode_bytes(REAL, 2, num_slots, 760) for num_slots in (1, 8))
    cache = 760 * 2 * 24 * 32 * 64 * 2  # keys and values, bfloat16

    assert one - cache == eight - 8 * cache == 2 * (24 * 50_331_648 + 51200 * 2048) == pytest.approx(2.626e9, rel=0.001)
    assert decode_flops(REAL, 8, 760) == 8 * decode_flops(REAL, 1, 760)
    assert decode_flops(REAL, 1, 760) == pytest.approx(2 * 1.313e9 + 4 * 760 * 2048 * 24, rel=0.001)


def test_the_weights_counted_are_those_of_the_network() -> None:
    """All matrices of the text model but the embeddings, of which a step reads a row."""
    with torch.device("meta"):
        text = Moondream(REAL).text
    matrices = sum(parameter.numel() for parameter in text.parameters() if parameter.ndim == 2) - text.wte.numel()

    assert decode_bytes(REAL, 1, 0, 0) == matrices


def test_the_longer_of_arithmetic_and_reading_is_the_least_time() -> None:
    ceilings = Ceilings(matmul_flops=100.0, float32_flops=50.0, bandwidth_bytes=10.0)

    assert (ceilings.least_s(200.0, 10.0), ceilings.least_s(100.0, 30.0)) == (2.0, 3.0)


def test_the_bounds_in_the_readme_are_those_of_the_arithmetic(capsys: pytest.CaptureFixture[str]) -> None:
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")

    assert main(["70", "600"]) == 0

    table = capsys.readouterr().out
    assert table in readme, table
    assert len(table.splitlines()) == 10


def test_ceilings_are_measured_in_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmark.roofline.REPEAT_S", 0.0)
    ceilings = measure_ceilings(torch.device("cpu"), torch.float32)

    assert ceilings.float32_flops == ceilings.matmul_flops > 1e8  # the slowest machine multiplies so fast,
    assert 1e13 > ceilings.bandwidth_bytes > 1e8  # and none reads faster than its caches
