"""Load a checkpoint: the model on its device, its config and its tokenizer.

The model is built on the meta device and takes over the tensors as they are read, so that memory peaks at the weights.
Strict: a missing, extra or misshapen tensor is an error that names the first ones.
"""

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from pipeline.errors import WeightsMismatch
from pipeline.moondream import hub
from pipeline.moondream.config import MoondreamConfig
from pipeline.moondream.device import choose_device, choose_dtype, explained_memory
from pipeline.moondream.model import Moondream

logger = logging.getLogger(__name__)

PREFIX = "model."
# Left in checkpoints by the reference implementation's buffers; they are computed here.
IGNORED_KEYS = re.compile(r"\.kv_cache\.|freqs_cis$|attn_mask$")
REAL_VOCAB_SIZE = 51200
NUM_NAMED = 5  # keys that an error names


@dataclass(frozen=True)
class Checkpoint:
    """A loaded model and what it takes to talk to it."""

    model: Moondream
    tokenizer: PreTrainedTokenizerFast
    name: str
    revision: str | None
    device: torch.device
    dtype: torch.dtype

    @property
    def config(self) -> MoondreamConfig:
        return self.model.config

    @property
    def dtype_name(self) -> str:
        """As the option --dtype has it: "bfloat16"."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def kv_bytes_per_position(self) -> int:
        """Keys and values of all layers for one position of one slot."""
        text = self.config.text
        return 2 * text.n_layers * text.n_kv_heads * text.head_dim * self.dtype.itemsize

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without special ones added."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    def decode(self, ids: list[int]) -> str:
        """The visible text of token ids: without special ones, stripped."""
        c = self.config.tokenizer
        hidden = {c.bos_id, c.eos_id, c.answer_id, c.thinking_id, c.coord_id, c.size_id}
        hidden |= {c.start_ground_points_id, c.end_ground_id}
        text = self.tokenizer.decode([i for i in ids if i not in hidden], skip_special_tokens=True)
        assert isinstance(text, str)
        return text.strip()


def load_checkpoint(
    model: str = hub.MODEL_ID,
    revision: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    compile: bool = False,
    on_progress: hub.OnProgress | None = None,
) -> Checkpoint:
    """Load "demo", a local folder or a hub id. `dtype` is auto, bfloat16, float16 or float32; `compile` runs the heavy
    layers through torch.compile, which takes minutes at first use. With on_progress, no progress bar is shown.

    Raises WeightsNotFound, WeightsMismatch, DeviceUnavailable or InvalidOption.
    """
    torch_device = choose_device(device)
    torch_dtype = choose_dtype(dtype, torch_device, is_demo=model == hub.DEMO)
    files = hub.find_checkpoint(model, revision, on_progress)
    config = MoondreamConfig.from_file(files.config)
    tokenizer = load_tokenizer(files.tokenizer, config, on_progress)
    with torch.device("meta"):
        module = Moondream(config)
    num_bytes = sum(parameter.numel() for parameter in module.parameters()) * torch_dtype.itemsize
    with explained_memory("The model", torch_device, num_bytes):
        fill(module, files.weights, torch_device, torch_dtype, on_progress)
    if compile:
        compile_layers(module)
    logger.info("loaded %s (%s) on %s in %s", files.model, files.revision or "local", torch_device, torch_dtype)
    return Checkpoint(module.eval(), tokenizer, files.model, files.revision, torch_device, torch_dtype)


def fill(
    module: nn.Module,
    paths: tuple[Path, ...],
    device: torch.device,
    dtype: torch.dtype,
    on_progress: hub.OnProgress | None = None,
) -> None:
    """Give every parameter of a module on the meta device its tensor. Raises WeightsMismatch."""
    wanted = {PREFIX + name: parameter for name, parameter in module.named_parameters()}
    tensors: dict[str, Tensor] = {}
    problems: list[str] = []
    total_bytes, num_bytes = sum(path.stat().st_size for path in paths), 0
    for key, tensor in _tensors(paths):
        num_bytes += tensor.nbytes
        if on_progress:
            on_progress(hub.Progress("loaded", num_bytes, total_bytes))
        if key not in wanted:
            problems += [] if IGNORED_KEYS.search(key) else [f"unexpected {key}"]
        elif tensor.shape != wanted[key].shape:
            problems.append(f"{key} is {tuple(tensor.shape)}, not {tuple(wanted[key].shape)}")
        else:
            tensors[key.removeprefix(PREFIX)] = tensor.to(device, dtype)
        if not tensor.is_floating_point():
            problems.append(f"{key} is {tensor.dtype}, not floating point")
    problems += [
        f"missing {key}" for key in wanted if key.removeprefix(PREFIX) not in tensors and not _is_named(key, problems)
    ]
    if problems:
        more = f" and {len(problems) - NUM_NAMED} more" if len(problems) > NUM_NAMED else ""
        raise WeightsMismatch(
            f"The weights in {paths[0].parent} are not those its config.json asks for: "
            f"{'; '.join(problems[:NUM_NAMED])}{more}. Use a Moondream2 checkpoint such as {hub.MODEL_ID}."
        )
    module.load_state_dict(tensors, assign=True)
    module.requires_grad_(False)


def compile_layers(module: Moondream) -> None:
    """Compile what takes the time and has no side effects; attention over the cache stays as it is."""
    for block in module.vision.blocks:
        block.compile(dynamic=True)
    for block in module.text.blocks:
        assert isinstance(block.mlp, nn.Module)
        block.mlp.compile(dynamic=True)


def load_tokenizer(
    path: Path | None, config: MoondreamConfig, on_progress: hub.OnProgress | None = None
) -> PreTrainedTokenizerFast:
    """The folder's own tokenizer if it fits the config, else the one of the real checkpoints, from the hub.

    The real snapshot still contains an older GPT-2 tokenizer.json, which gives garbage: hence the check.
    """
    if path is not None:
        tokenizer = _read_tokenizer(path)
        if fits(tokenizer, config):
            return tokenizer
        logger.info("%s does not fit the checkpoint's config; using %s instead", path, hub.TOKENIZER_ID)
    return _read_tokenizer(hub.download_tokenizer(on_progress))


def fits(tokenizer: PreTrainedTokenizerFast, config: MoondreamConfig) -> bool:
    """Whether bos exists and, at the real vocabulary's size, the word of the query template is where it should be."""
    if tokenizer.convert_ids_to_tokens(config.tokenizer.bos_id) is None:
        return False
    if config.text.vocab_size != REAL_VOCAB_SIZE:
        return True
    return any(
        tokenizer.encode(word, add_special_tokens=False) == list(config.tokenizer.templates.query.prefix[1:2])
        for word in ("query", " query")
    )


def _read_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    try:
        return PreTrainedTokenizerFast(tokenizer_file=str(path))
    except Exception as error:  # tokenizers raises nothing narrower
        raise WeightsMismatch(f"{path} cannot be read as a tokenizer: {error}. Download it again.") from error


def _tensors(paths: tuple[Path, ...]) -> Iterator[tuple[str, Tensor]]:
    for path in paths:
        try:
            # Read, not mapped (the default): a file overwritten in place must not change a loaded model, and where
            # tensors are converted, the mapped file counts beside the copies (0.5B to float32: 4.1 GB, not 2.9).
            with safe_open(path, framework="pt", backend="pread") as file:
                for key in file.keys():  # noqa: SIM118 - not a dict
                    yield key, file.get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise WeightsMismatch(f"{path} cannot be read as safetensors: {error}. Download it again.") from error


def _is_named(key: str, problems: list[str]) -> bool:
    return any(problem.startswith(f"{key} is ") for problem in problems)
