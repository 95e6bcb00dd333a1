"""Checkpoint folders with random weights of the real sizes: what loading and speed are measured on without a download.

The layout is the hub's: config.json, tokenizer.json, safetensors shards with their index. The tokenizer is the demo's,
with the words of the prompt templates added. What such a model answers is noise, mostly of the full length asked for.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from pipeline.errors import WeightsMismatch
from pipeline.moondream.checkpoint import PREFIX, Checkpoint
from pipeline.moondream.config import (
    MoondreamConfig,
    RegionConfig,
    Template,
    Templates,
    TextConfig,
    TokenizerConfig,
    VisionConfig,
)
from pipeline.moondream.hub import DEMO_FOLDER
from pipeline.moondream.model import Moondream

CONFIGS = {
    "2b": MoondreamConfig(),
    "0.5b": MoondreamConfig(
        TextConfig(dim=1024, ff_dim=4096, n_heads=16, n_kv_heads=16),
        VisionConfig(enc_dim=720, enc_ff_dim=2690, enc_n_heads=10, proj_out_dim=1024),
        RegionConfig(dim=1024),
    ),
    "tiny": MoondreamConfig(
        TextConfig(dim=64, ff_dim=128, n_layers=2, vocab_size=1024, max_context=256, n_heads=2, n_kv_heads=2),
        VisionConfig(
            enc_dim=64, enc_n_layers=2, enc_ff_dim=128, enc_n_heads=2, proj_out_dim=64, crop_size=112, overlap_margin=1,
            proj_inner_dim=128,
        ),
        RegionConfig(dim=64, inner_dim=64),
    ),
}  # fmt: skip
PROMPT_WORDS = ["query", "caption", "short", "normal", "long", "detect", "point"]
SHARD_BYTES = 10**9  # bounds the memory that making a folder takes
DTYPE = torch.bfloat16
NEVER = -1e4  # a logit; float16 has room for it


def holds_checkpoint(folder: Path, size: str) -> bool:
    """True for a folder with a checkpoint of this size, False for a new or empty one; else raises WeightsMismatch."""
    if not folder.exists() or not any(folder.iterdir()):
        return False
    config = folder / "config.json"
    if config.is_file() and replace(MoondreamConfig.from_file(config), tokenizer=TokenizerConfig()) == CONFIGS[size]:
        return True
    raise WeightsMismatch(f"{folder} holds something other than a whole {size} checkpoint. Give an empty folder.")


def add_options(parser: argparse.ArgumentParser) -> None:
    """What every program asks that runs on random weights: of which size, and where they are."""
    parser.add_argument(
        "--random-weights",
        choices=tuple(CONFIGS),
        required=True,
        metavar="SIZE",
        help="2b (3.9 GB, the real model's size), 0.5b (1.3 GB) or tiny (1 MB, for tests)",
    )
    parser.add_argument(
        "--folder",
        type=Path,
        metavar="DIR",
        help="make the checkpoint here, or use the one of this size that is here (default: a temporary folder)",
    )


@contextmanager
def random_checkpoint(folder: Path | None, size: str) -> Iterator[Path]:
    """A folder that holds a checkpoint of this size: this one, where it is made if it is not there, or a temporary one.
    Raises WeightsMismatch."""
    with tempfile.TemporaryDirectory(prefix="moonreel-") as temporary:
        folder = folder or Path(temporary)
        if not holds_checkpoint(folder, size):
            for num_bytes in make_checkpoint(folder, size):
                print(f"random weights: {num_bytes / 1e9:.1f} GB written to {folder}", file=sys.stderr, flush=True)
        yield folder


def never_end(checkpoint: Checkpoint) -> None:
    """Have answers of full length only: the end of a text never comes."""
    checkpoint.model.text.lm_head.bias[checkpoint.config.tokenizer.eos_id] = NEVER


def make_checkpoint(folder: Path, size: str, seed: int = 0) -> Iterator[int]:
    """Write a checkpoint of this size into a folder, shard by shard. Yields the bytes of weights written so far."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer.from_file(str(DEMO_FOLDER / "tokenizer.json"))
    tokenizer.add_tokens(PROMPT_WORDS)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = replace(CONFIGS[size], tokenizer=TokenizerConfig(templates=_templates(tokenizer)))
    generator = torch.Generator().manual_seed(seed)
    shards = list(_shards(config))
    weight_map: dict[str, str] = {}
    num_bytes = 0
    for number, shapes in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file({key: random_tensor(key, shape, generator) for key, shape in shapes.items()}, folder / name)
        weight_map |= dict.fromkeys(shapes, name)
        num_bytes += sum(map(_num_bytes, shapes.values()))
        yield num_bytes
    _write_json(
        folder / "model.safetensors.index.json", {"metadata": {"total_size": num_bytes}, "weight_map": weight_map}
    )
    _write_json(folder / "config.json", {"config": asdict(config)})  # last: it marks the folder as whole


def random_tensor(key: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Weights that keep activations near 1: LayerNorms start as the identity, biases at 0."""
    if len(shape) == 1:
        return torch.full(shape, 1.0 if key.endswith(".weight") else 0.0, dtype=DTYPE)
    return torch.empty(shape, dtype=DTYPE).normal_(std=shape[-1] ** -0.5, generator=generator)


def _shards(config: MoondreamConfig) -> Iterator[dict[str, torch.Size]]:
    """The keys and shapes of each file."""
    with torch.device("meta"):
        parameters = Moondream(config).named_parameters()
    shard: dict[str, torch.Size] = {}
    for name, parameter in parameters:
        if shard and sum(map(_num_bytes, shard.values())) + _num_bytes(parameter.shape) > SHARD_BYTES:
            yield shard
            shard = {}
        shard[PREFIX + name] = parameter.shape
    yield shard


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _num_bytes(shape: torch.Size) -> int:
    return shape.numel() * DTYPE.itemsize


def _templates(tokenizer: Tokenizer) -> Templates:
    """The real templates, with the ids that the words have here."""
    vocab = tokenizer.get_vocab()
    query, caption, short, normal, long, detect, point = (vocab[word] for word in PROMPT_WORDS)
    return Templates(
        caption={
            "short": (1, caption, 2, short, 3),
            "normal": (1, caption, 2, normal, 3),
            "long": (1, caption, 2, long, 3),
        },
        query=Template((1, query, 2), (3,)),
        detect=Template((1, detect, 2), (3,)),
        point=Template((1, point, 2), (3,)),
    )
