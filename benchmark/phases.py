"""Where the time of a run goes, by phase, and how near each phase is to the least that its work can take.

Wraps the runner of an engine: each call is timed until the device is done, and its arithmetic and traffic are added up
by roofline.py. Waiting for the device costs a little, so rates are measured without this. Several instances share the
device: their times are added up and divided by their number, which makes the phases parts of the run's time.
"""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmark import roofline
from benchmark.roofline import Ceilings
from pipeline.moondream.checkpoint import Checkpoint
from pipeline.moondream.decoding import Feed
from pipeline.moondream.device import synchronize
from pipeline.moondream.engine import Engine
from pipeline.moondream.image_crops import Crops
from pipeline.moondream.runner import ModelRunner

PHASES = ("encode", "prefill", "decode")  # prefill: prefix and prompt; decode: steps, logits and the choice of tokens


@dataclass
class Phase:
    """What a phase took and did, over all instances."""

    spent_s: float = 0.0
    flops: int = 0
    num_bytes: int = 0  # of weights, keys and values read
    least_s: float = 0.0
    arithmetic_s: float = 0.0  # the part of least_s in calls that arithmetic bounds

    @property
    def bound_by(self) -> str:
        return "arithmetic" if self.arithmetic_s * 2 >= self.least_s else "bandwidth"


class PhaseWatch:
    """Watches the engines of one run, from start() to stop(), which another thread may call meanwhile: a call counts if
    it ends in between."""

    def __init__(self, checkpoint: Checkpoint, ceilings: Ceilings) -> None:
        self.phases = {name: Phase() for name in PHASES}
        self.ceilings = ceilings  # of the calls from now on
        self._config, self._device = checkpoint.config, checkpoint.device
        self._itemsize = checkpoint.dtype.itemsize
        self._changes, self._is_on = threading.Lock(), False

    def start(self) -> None:
        with self._changes:
            self.phases, self._is_on = {name: Phase() for name in PHASES}, True

    def stop(self) -> None:
        with self._changes:
            self._is_on = False

    def watch(self, engine: Engine) -> None:
        runner = engine._runner
        works: dict[str, tuple[str, Callable[..., tuple[int, int]]]] = {
            ModelRunner.encode_images.__name__: ("encode", self._encode_work),
            ModelRunner.prefill_images.__name__: ("prefill", self._prefix_work),
            ModelRunner.prefill_prompts.__name__: ("prefill", self._prompt_work),
            ModelRunner.decode.__name__: ("decode", self._step_work),
            ModelRunner.logits.__name__: ("decode", _no_work),  # counted with the step
            ModelRunner.choose_tokens.__name__: ("decode", _no_work),
        }
        for method, (phase, work) in works.items():
            setattr(runner, method, self._timed(phase, work, getattr(runner, method)))

    def report(self, instances: int, num_frames: int, run_s: float) -> dict[str, Any]:
        """By phase, seconds a frame, of them the least, the share of the run, and the share of the ceiling reached."""
        rows: dict[str, Any] = {}
        for name, phase in self.phases.items():
            spent_s = phase.spent_s / instances
            rows[name] = {
                "s_per_frame": spent_s / num_frames,
                "share": spent_s / run_s,
                "least_s_per_frame": phase.least_s / num_frames,
                "reached": phase.least_s / spent_s if spent_s else 0.0,
                "bound_by": phase.bound_by,
                "tflop_per_frame": phase.flops / num_frames / 1e12,
                "gb_per_frame": phase.num_bytes / num_frames / 1e9,
            }
        other = 1 - sum(row["share"] for row in rows.values())  # scheduling, submitting, cropping, waiting
        return {**rows, "other": {"s_per_frame": other * run_s / num_frames, "share": other}}

    def _timed(self, name: str, work: Callable[..., tuple[int, int]], run: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **named: Any) -> Any:
            started_s = time.perf_counter()
            result = run(*arguments, **named)
            synchronize(self._device)
            spent_s = time.perf_counter() - started_s
            flops, num_bytes = work(*arguments, **named)
            least_s = self.ceilings.least_s(flops, num_bytes)
            is_arithmetic = least_s > self.ceilings.least_s(0, num_bytes)
            with self._changes:
                if self._is_on:
                    phase = self.phases[name]
                    phase.spent_s += spent_s
                    phase.flops += flops
                    phase.num_bytes += num_bytes
                    phase.least_s += least_s
                    phase.arithmetic_s += least_s if is_arithmetic else 0.0
            return result

        return timed

    def _encode_work(self, images: Sequence[Crops]) -> tuple[int, int]:
        return roofline.encode_flops(self._config, sum(len(crops.pixels) for crops in images), len(images)), 0

    def _prefix_work(self, slots: list[int], tokens: Sequence[torch.Tensor]) -> tuple[int, int]:
        flops = len(slots) * roofline.prefill_flops(self._config, self._config.prefix_len)
        return flops, roofline.prefill_bytes(self._config, self._itemsize)

    def _prompt_work(self, slots: list[int], prompts: Sequence[list[int]]) -> tuple[int, int]:
        prefix_len = self._config.prefix_len
        flops = sum(roofline.prefill_flops(self._config, len(prompt), prefix_len) for prompt in prompts)
        return flops, roofline.prefill_bytes(self._config, self._itemsize)

    def _step_work(self, first_slot: int, feeds: Sequence[Feed | None], positions: list[int]) -> tuple[int, int]:
        busy = [position + 1 for feed, position in zip(feeds, positions, strict=True) if feed]
        flops = sum(roofline.decode_flops(self._config, 1, num_positions) for num_positions in busy)
        return flops, roofline.decode_bytes(self._config, self._itemsize, 1, sum(busy))


def _no_work(*_: object, **__: object) -> tuple[int, int]:
    return 0, 0
