"""How many instances and slots a device takes: as many as were asked for, else what a benchmark found best on such a
device, else arithmetic over its free memory.

What a benchmark found is a file of the device's name; benchmark/saved.py writes it, and this reads it. Knows no engine.
Test: pytest tests/test_capacity.py

The arithmetic, for vikhyatk/moondream2 in 2 bytes a number and with its whole context: a slot holds 2 x 24 layers x 32
heads x 64 x 2048 positions x 2 bytes = 403 MB of keys and values, and 54 MB of activations while its image is
prefilled; an instance's encoder takes 1.05 GB for a pass of 32 crops; the weights are 3.85 GB, CUDA itself 0.5 GB, and
a tenth stays free. So 15.8 usable GB have room for 2 instances of (0.9 x (15.8 - 3.85 - 0.5) / 2 - 1.05) / 0.457 = 9
slots, 23.7 GB for 2 of 16, 42.4 GB for 2 of 35.

More than 32 slots are not worth their memory: a decode step reads 2.8 GB of weights, and 170 MB for each slot of 850
positions, so that 2 x 32 slots come to 80% of what any number could answer, if reading is what takes the time. Two
instances, because one encodes while the other decodes. On a CPU both take the same cores: one.
"""

import json
import logging
import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from pipeline.moondream.checkpoint import Checkpoint
from pipeline.moondream.config import MoondreamConfig
from pipeline.moondream.device import GIB, cpu_name, free_bytes, num_cores
from pipeline.moondream.scheduler import DEFAULT_SLOTS, MAX_INSTANCES, MAX_SLOTS

CROPS_PER_PASS = 32  # bounds the encoder's activations; a larger pass gains nothing
# The most instances, and slots of each, by a word of the device's name: computed as above, not measured.
STARTING_POINTS = {
    "T4": (2, 8),
    "A10G": (2, 16),
    "L4": (2, 16),
    "L40S": (2, 32),
    "A100": (2, 32),
    "H100": (2, 32),
}
MOST = {"cuda": (2, 32), "mps": (1, DEFAULT_SLOTS), "cpu": (1, DEFAULT_SLOTS)}
WORTH_ANOTHER = 8  # slots that each of two instances must have, to be better than one with all of them
RESERVE = {"cuda": 0.1, "mps": 0.25, "cpu": 0.25}  # the part of the free memory that stays free

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Setting:
    """How a pool is to be made on one device; `why`, in a sentence for the log."""

    instances: int
    slots: int
    why: str


def plan(
    checkpoint: Checkpoint, instances: int | None, slots: int | None, context_len: int, results: Path | None
) -> Setting:
    """The instances and slots for a checkpoint that is loaded. Numbers that are given win; None leaves them to the
    benchmark's results in the folder `results`, where there are any and they fit, or to the free memory."""
    device = checkpoint.device
    if instances and slots:
        return Setting(instances, slots, f"{_shown(instances, slots)} on {device}, as set")
    room = _Room.on(checkpoint, context_len)
    tuned = read_tuned(results, checkpoint) if results else None
    if tuned and room.barely_holds(instances or tuned.instances, slots or tuned.slots):
        chosen = instances or tuned.instances, slots or tuned.slots
        why = f"{_shown(*chosen)} on {device}, one of them as set; {tuned.why}" if instances or slots else tuned.why
        return Setting(*chosen, why)
    most, of = _most(device)
    chosen = room.fit(instances, slots, *most)
    why = f"{_shown(*chosen)} on {device}, computed, not measured: {room}; {_shown(*most)} at most on {of}"
    if tuned:
        why += f"; {tuned.why}, which do not fit now"
    return Setting(*chosen, why)


def read_tuned(folder: Path, checkpoint: Checkpoint) -> Setting | None:
    """What a benchmark found best for a model of this size, in this number format, on such a device; None if there is
    nothing, or nothing that can be read."""
    path = folder / f"{device_slug(checkpoint.device)}.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        num_parameters = sum(parameter.numel() for parameter in checkpoint.model.parameters())
        for model in found["models"]:
            if (model["num_parameters"], model["dtype"]) == (num_parameters, checkpoint.dtype_name):
                instances, slots = int(model["best"]["instances"]), int(model["best"]["slots"])
                if not (1 <= instances <= MAX_INSTANCES and 1 <= slots <= MAX_SLOTS):
                    raise ValueError(f"{instances} x {slots}")
                where = f"{found['device']} on {model['measured_at']} ({'/'.join(path.parts[-3:])})"
                return Setting(instances, slots, f"{instances} x {slots} measured on {where}")
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("%s is no result of a benchmark (%s: %s): ignored", path, type(error).__name__, error)
    return None


def device_name(device: torch.device) -> str:
    """The name of the hardware: NVIDIA A10G; AMD EPYC, 2 cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return f"{cpu_name() or 'Apple'}, GPU"
    return f"{cpu_name() or 'CPU'}, {num_cores()} cores"


def device_slug(device: torch.device) -> str:
    """The name as a file's: nvidia-a10g; amd-epyc-2-cores."""
    return re.sub("[^a-z0-9]+", "-", device_name(device).lower()).strip("-")


def encode_bytes(config: MoondreamConfig, num_crops: int, dtype: torch.dtype) -> int:
    """An estimate of the largest set of tensors alive at once while crops are encoded."""
    vision = config.vision
    return 2 * num_crops * vision.num_patches * (vision.enc_ff_dim + 6 * vision.enc_dim) * dtype.itemsize


def prefill_bytes(config: MoondreamConfig, dtype: torch.dtype) -> int:
    """The same while an image is prefilled."""
    text = config.text
    return 2 * config.prefix_len * (text.ff_dim + 2 * text.dim + text.qkv_dim) * dtype.itemsize


@dataclass(frozen=True)
class _Room:
    """What memory there is for instances and slots, and what they take."""

    free_bytes: int
    usable_bytes: int
    instance_bytes: int
    slot_bytes: int

    @classmethod
    def on(cls, checkpoint: Checkpoint, context_len: int) -> "_Room":
        config, dtype, num_bytes = checkpoint.config, checkpoint.dtype, free_bytes(checkpoint.device)
        return cls(
            num_bytes,
            int((1 - RESERVE[checkpoint.device.type]) * num_bytes),
            encode_bytes(config, CROPS_PER_PASS, dtype),
            context_len * checkpoint.kv_bytes_per_position + prefill_bytes(config, dtype),
        )

    def slots(self, instances: int) -> int:
        """The slots of each; possibly none."""
        return max(0, (self.usable_bytes // instances - self.instance_bytes) // self.slot_bytes)

    def holds(self, instances: int, slots: int) -> bool:
        return slots <= self.slots(instances)

    def barely_holds(self, instances: int, slots: int) -> bool:
        """Without a reserve: for what was seen to work."""
        return replace(self, usable_bytes=self.free_bytes).holds(instances, slots)

    def fit(self, instances: int | None, slots: int | None, most_instances: int, most_slots: int) -> tuple[int, int]:
        """As many as fit, of what is not given, up to the most; at least one of each."""
        if instances is None:
            enough = slots or min(WORTH_ANOTHER, most_slots)
            instances = max((n for n in range(1, most_instances + 1) if self.holds(n, enough)), default=1)
        return instances, slots or max(1, min(most_slots, self.slots(instances)))

    def __str__(self) -> str:
        slot, instance = self.slot_bytes / GIB, self.instance_bytes / GIB
        return f"{self.free_bytes / GIB:.1f} GiB free, a slot takes {slot:.2g} GiB, an instance {instance:.2g} GiB more"


def _most(device: torch.device) -> tuple[tuple[int, int], str]:
    """The most instances and slots, and what they hold for."""
    if device.type == "cuda":
        for word in re.split("[^A-Za-z0-9]+", device_name(device)):
            if word in STARTING_POINTS:
                return STARTING_POINTS[word], word
    return MOST[device.type], f"any {device.type}"


def _shown(instances: int, slots: int) -> str:
    return f"{instances} {'instance' if instances == 1 else 'instances'} x {slots} slots"
