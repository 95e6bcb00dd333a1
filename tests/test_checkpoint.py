"""Strict loading, and which tokenizer is taken. Where the files come from is test_hub.py's.

Run: pytest tests/test_checkpoint.py
"""

import dataclasses
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from pipeline.errors import DeviceUnavailable, InvalidOption, WeightsMismatch, WeightsNotFound
from pipeline.moondream import hub
from pipeline.moondream.checkpoint import Checkpoint, fits, load_checkpoint, load_tokenizer
from pipeline.moondream.config import MoondreamConfig, Template, Templates, TokenizerConfig
from pipeline.moondream.model import Moondream

BIAS = "model.text.lm_head.bias"


@pytest.fixture
def folder(tmp_path: Path, tiny_folder: Path) -> Path:
    """A copy of the tiny checkpoint, to be damaged."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "copy"))


def edit(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def load(folder: Path, dtype: str = "float32") -> Checkpoint:
    return load_checkpoint(str(folder), device="cpu", dtype=dtype)


def assert_same_weights(got: Checkpoint, expected: Checkpoint) -> None:
    parameters, others = dict(got.model.named_parameters()), dict(expected.model.named_parameters())
    assert parameters.keys() == others.keys()
    assert all(torch.equal(parameters[name], other) for name, other in others.items())


# --- weights


def test_a_saved_model_loads_as_it_was(tiny_folder: Path, tiny_checkpoint: Checkpoint) -> None:
    loaded = load(tiny_folder)

    assert_same_weights(loaded, tiny_checkpoint)
    assert loaded.config == tiny_checkpoint.config
    assert (loaded.name, loaded.revision) == (str(tiny_folder), None)
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_come_in_the_dtype_asked_for(tiny_folder: Path, dtype: str) -> None:
    loaded = load(tiny_folder, dtype)

    assert {parameter.dtype for parameter in loaded.model.parameters()} == {getattr(torch, dtype)} == {loaded.dtype}
    assert {parameter.device for parameter in loaded.model.parameters()} == {torch.device("cpu")} == {loaded.device}


def test_a_missing_tensor_is_named(folder: Path) -> None:
    edit(folder, lambda tensors: tensors.pop(BIAS))

    with pytest.raises(WeightsMismatch, match=rf"missing {BIAS}\. Use a Moondream2 checkpoint"):
        load(folder)


def test_an_extra_tensor_is_named(folder: Path) -> None:
    edit(folder, lambda tensors: tensors.update({"model.text.lora": torch.zeros(2)}))

    with pytest.raises(WeightsMismatch, match=r"unexpected model\.text\.lora\."):
        load(folder)


def test_a_misshapen_tensor_is_named_once_with_both_shapes(folder: Path) -> None:
    edit(folder, lambda tensors: tensors.update({BIAS: torch.zeros(7)}))

    with pytest.raises(WeightsMismatch, match=rf": {BIAS} is \(7,\), not \(512,\)\. Use"):
        load(folder)


def test_of_many_wrong_tensors_the_first_are_named_and_the_others_counted(folder: Path) -> None:
    edit(folder, lambda tensors: tensors.update({f"extra.{i}": torch.zeros(1) for i in range(8)}))

    with pytest.raises(WeightsMismatch, match=r"unexpected extra\.4 and 3 more"):
        load(folder)


def test_another_sizes_weights_do_not_fit(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["text"]["n_layers"] = 3
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")

    with pytest.raises(WeightsMismatch, match=r"missing model\.text\.blocks\.2\."):
        load(folder)


def test_what_the_reference_leaves_in_checkpoints_is_ignored(folder: Path, tiny_checkpoint: Checkpoint) -> None:
    buffers = ["text.blocks.0.kv_cache.k_cache", "text.freqs_cis", "text.attn_mask"]
    edit(folder, lambda tensors: tensors.update({f"model.{name}": torch.zeros(3) for name in buffers}))

    assert_same_weights(load(folder), tiny_checkpoint)


def test_shards_are_joined_by_their_index(folder: Path, tiny_checkpoint: Checkpoint) -> None:
    split(folder)

    assert_same_weights(load(folder), tiny_checkpoint)


def test_shards_without_an_index_are_joined_too(folder: Path, tiny_checkpoint: Checkpoint) -> None:
    split(folder)
    (folder / "model.safetensors.index.json").unlink()

    assert_same_weights(load(folder), tiny_checkpoint)


def test_a_missing_shard_is_named(folder: Path) -> None:
    split(folder)
    (folder / "model-2-of-2.safetensors").unlink()

    with pytest.raises(WeightsNotFound, match=r"incomplete: model-2-of-2\.safetensors missing"):
        load(folder)


@pytest.mark.parametrize("num_bytes", [0, 5, 5000, -1])
def test_a_truncated_file_is_named(folder: Path, num_bytes: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:num_bytes])

    with pytest.raises(WeightsMismatch, match=r"model\.safetensors cannot be read as safetensors.*Download it again"):
        load(folder)


def split(folder: Path) -> None:
    """Turn the weights into two shards with an index."""
    tensors = load_file(folder / "model.safetensors")
    names = {key: f"model-{1 + i % 2}-of-2.safetensors" for i, key in enumerate(tensors)}
    for shard in set(names.values()):
        save_file({key: tensors[key] for key, name in names.items() if name == shard}, folder / shard)
    index = {"metadata": {}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    (folder / "model.safetensors").unlink()


# --- options


def test_options_are_checked_before_any_file_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    with pytest.raises(DeviceUnavailable):
        load_checkpoint(str(tmp_path), device="cuda")
    with pytest.raises(InvalidOption):
        load_checkpoint(str(tmp_path), device="cpu", dtype="int8")


def test_compiling_wraps_the_heavy_layers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only that they are handed to torch.compile: the compilation itself takes minutes."""
    handed: list[str] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: handed.append(type(self).__name__))

    load_checkpoint(str(folder), device="cpu", dtype="float32", compile=True)

    assert handed == ["VisionBlock"] * 2 + ["Mlp"] * 2


# --- tokenizer


@pytest.fixture
def starmie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, golden: Path) -> Path:
    """Stands for the tokenizer on the hub."""
    path = Path(shutil.copy(golden / "base" / "tokenizer.json", tmp_path / "starmie.json"))
    monkeypatch.setattr(hub, "download_tokenizer", lambda on_progress: path)
    return path


def vocabulary(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    return dict(tokenizer.get_vocab())


def small_tokenizer(path: Path, size: int) -> Path:
    """A tokenizer of words t0, t1 ... and "query" as the last one."""
    words = {f"t{i}": i for i in range(size - 1)} | {"query": size - 1}
    content = {"version": "1.0", "added_tokens": [], "model": {"type": "WordLevel", "vocab": words, "unk_token": "t0"}}
    Tokenizer.from_str(json.dumps(content)).save(str(path))
    return path


def test_a_folders_own_tokenizer_is_taken_where_it_fits(tiny_folder: Path) -> None:
    assert load(tiny_folder).encode(" person") == [415]


def test_a_folder_without_a_tokenizer_gets_that_of_the_real_checkpoints(folder: Path, starmie: Path) -> None:
    (folder / "tokenizer.json").unlink()

    assert load(folder).encode(" person") == [415]


@pytest.mark.parametrize(
    ("size", "vocab_size", "query_id", "is_taken"),
    [
        (100, 512, 7, True),
        (3, 512, 7, False),  # bos, 5, does not exist
        (100, 51200, 99, True),  # the real size: the template's word is where it should be
        (100, 51200, 98, False),
    ],
)
def test_a_tokenizer_fits_by_bos_and_by_the_word_of_the_query_template(
    tmp_path: Path, starmie: Path, size: int, vocab_size: int, query_id: int, is_taken: bool
) -> None:
    path = small_tokenizer(tmp_path / "tokenizer.json", size)
    ids = TokenizerConfig(bos_id=5, templates=Templates(query=Template((1, query_id, 2), (3,))))
    raw = MoondreamConfig.from_dict({"text": {"vocab_size": vocab_size}})
    config = MoondreamConfig(raw.text, raw.vision, raw.region, ids)

    tokenizer = load_tokenizer(path, config)

    assert fits(PreTrainedTokenizerFast(tokenizer_file=str(path)), config) == is_taken
    assert ("query" in vocabulary(tokenizer)) == is_taken


def test_a_tokenizer_that_does_not_fit_is_reported(
    tmp_path: Path, starmie: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = small_tokenizer(tmp_path / "tokenizer.json", 100)

    with caplog.at_level(logging.INFO):  # no warning: it is so with the real checkpoint
        load_tokenizer(path, MoondreamConfig())

    assert f"{path} does not fit" in caplog.text and "starmie" in caplog.text


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"model": 3}', b"\xff\xfe"])
def test_a_file_that_is_no_tokenizer_is_named(folder: Path, content: bytes) -> None:
    """A truncated download ended in a bare Exception of tokenizers."""
    (folder / "tokenizer.json").write_bytes(content)

    with pytest.raises(WeightsMismatch, match=r"tokenizer\.json cannot be read as a tokenizer"):
        load(folder)


# --- text


def test_encoding_adds_no_special_tokens(tiny_checkpoint: Checkpoint) -> None:
    ids = tiny_checkpoint.encode("What is on the left?")

    assert ids == [64, 280, 278, 300, 268, 230, 296, 79, 93, 40]
    assert tiny_checkpoint.encode("") == []


def test_decoding_leaves_special_ids_out_and_strips(tiny_checkpoint: Checkpoint) -> None:
    words = tiny_checkpoint.encode(" a person ")

    assert tiny_checkpoint.decode([0, *words[:1], 3, 4, 5, 6, 7, 9, *words[1:], 0]) == "a person"
    assert tiny_checkpoint.decode([0, 7, 9]) == ""


def test_the_configs_ids_are_left_out_even_where_the_tokenizer_takes_them_for_words(
    tiny_checkpoint: Checkpoint,
) -> None:
    a, person = tiny_checkpoint.encode("a person")
    ids = dataclasses.replace(tiny_checkpoint.config.tokenizer, coord_id=a)
    model = Moondream(dataclasses.replace(tiny_checkpoint.config, tokenizer=ids))

    assert dataclasses.replace(tiny_checkpoint, model=model).decode([a, person]) == "person"
