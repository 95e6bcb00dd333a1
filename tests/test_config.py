"""Which config.json files are taken, and what they mean. Run: pytest tests/test_config.py"""

from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import WeightsMismatch
from pipeline.moondream.config import MoondreamConfig, Template


def test_an_empty_config_means_the_2b_model() -> None:
    assert MoondreamConfig.from_dict({}) == MoondreamConfig()


def test_the_hub_carries_the_sizes_under_config() -> None:
    raw = {"text": {"n_layers": 5}}

    assert MoondreamConfig.from_dict({"config": raw, "architectures": ["x"]}) == MoondreamConfig.from_dict(raw)
    assert MoondreamConfig.from_dict({"config": {}, "text": {"n_layers": 5}}) == MoondreamConfig()


def test_a_subset_leaves_the_other_defaults() -> None:
    config = MoondreamConfig.from_dict({"text": {"n_layers": 5}, "tokenizer": {"eos_id": 9}})

    assert (config.text.n_layers, config.text.dim, config.tokenizer.eos_id, config.tokenizer.bos_id) == (5, 2048, 9, 0)


def test_unknown_keys_are_ignored() -> None:
    raw = {"text": {"group_size": 128, "prefix_attn": 730}, "vision": {"colour": 1}, "region": {"x": 1}, "more": {}}

    assert MoondreamConfig.from_dict(raw) == MoondreamConfig()


def test_templates_are_taken_one_by_one() -> None:
    templates = {"caption": {"short": [1, 2]}, "point": {"prefix": [4], "suffix": [5, 6]}, "detect": None}
    config = MoondreamConfig.from_dict({"tokenizer": {"templates": templates}})

    defaults = MoondreamConfig().tokenizer.templates
    assert config.tokenizer.templates.caption == {**defaults.caption, "short": (1, 2)}
    assert config.tokenizer.templates.point == Template((4,), (5, 6))
    assert config.tokenizer.templates.detect == defaults.detect


def test_derived_sizes_follow_from_the_2b_models() -> None:
    config = MoondreamConfig()

    assert (config.text.head_dim, config.text.rotary_dim, config.text.qkv_dim) == (64, 32, 3 * 2048)
    assert (config.vision.grid_size, config.vision.num_patches, config.prefix_len) == (27, 729, 730)
    assert (config.vision.margin_px, config.vision.window_px) == (56, 266)


def test_fewer_key_heads_make_a_narrower_qkv() -> None:
    text = MoondreamConfig.from_dict({"text": {"n_kv_heads": 8}}).text

    assert text.qkv_dim == (32 + 2 * 8) * 64


def test_the_half_billion_variant_is_accepted() -> None:
    raw = {
        "text": {"dim": 1024, "n_heads": 16, "n_kv_heads": 16, "ff_dim": 4096},
        "vision": {"enc_dim": 720, "enc_n_heads": 10, "enc_ff_dim": 2690, "proj_out_dim": 1024},
        "region": {"dim": 1024},
    }

    assert MoondreamConfig.from_dict(raw).text.head_dim == 64


@pytest.mark.parametrize(
    ("raw", "named"),
    [
        ({"text": {"dim": 2050}}, "text.dim"),
        ({"text": {"n_kv_heads": 5}}, "text.n_kv_heads"),
        ({"vision": {"enc_n_heads": 7}}, "vision.enc_dim"),
        ({"vision": {"crop_size": 380}}, "vision.crop_size"),
        ({"vision": {"crop_size": 112}}, "vision.overlap_margin"),
        ({"vision": {"proj_out_dim": 1024}}, "vision.proj_out_dim"),
        ({"region": {"dim": 1024}}, "region.dim"),
        ({"text": {"max_context": 730}}, "text.max_context"),
        ({"vision": {"overlap_margin": -1}}, "overlap_margin"),
    ],
)
def test_sizes_that_cannot_belong_together_are_named(raw: dict[str, Any], named: str) -> None:
    with pytest.raises(WeightsMismatch, match=named):
        MoondreamConfig.from_dict(raw)


@pytest.mark.parametrize("name", ["n_heads", "n_kv_heads", "n_layers"])
def test_a_size_of_zero_is_a_mismatch(name: str) -> None:
    """0 heads were a ZeroDivisionError."""
    with pytest.raises(WeightsMismatch, match=f"{name} is 0"):
        MoondreamConfig.from_dict({"text": {name: 0}})


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[1, 2]",
        b'"text"',
        b"\xff\xfe",
        b'{"config": null}',
        b'{"text": 3}',
        b'{"tokenizer": {"templates": {"query": {"prefix": [1]}}}}',
    ],
)
def test_a_file_that_is_no_config_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)

    with pytest.raises(WeightsMismatch, match="is not a Moondream2 config"):
        MoondreamConfig.from_file(path)


@pytest.mark.parametrize("name", ["base", "gqa-eos"])
def test_the_golden_configs_are_read(golden: Path, name: str) -> None:
    config = MoondreamConfig.from_file(golden / name / "config.json")

    assert config.text.vocab_size == 512
    assert config.tokenizer.templates.query == Template((1, 310, 2), (3,))


@pytest.mark.parametrize(
    "raw",
    [
        {"text": {"dim": "2048"}},
        {"text": {"dim": 2048.0}},
        {"text": {"vocab_size": 10**30}},
        {"vision": {"in_channels": 1}},
        {"tokenizer": {"eos_id": None}},
        {"tokenizer": {"bos_id": -1}},
        {"tokenizer": {"coord_id": 60_000}},
        {"tokenizer": {"templates": {"query": {"prefix": [1], "suffix": []}}}},
        {"tokenizer": {"templates": {"caption": {"short": []}}}},
        {"tokenizer": {"templates": {"caption": {"short": ["1"]}}}},
    ],
    ids=str,
)
def test_a_value_that_cannot_be_is_a_mismatch(raw: dict[str, Any]) -> None:
    """Each was a traceback later on, or an answer that never ended."""
    with pytest.raises(WeightsMismatch, match="cannot be right"):
        MoondreamConfig.from_dict(raw)
