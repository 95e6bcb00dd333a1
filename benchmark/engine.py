"""Measure what it gains to have frames in flight together: `python -m benchmark.engine --random-weights 2b`.

At each size, describes 8 drawn frames all in flight, and some of them one at a time, in turns, without eos. Prints
frames per second of both, where the time goes, which share of this machine's ceilings each phase reaches, and how much
faster a frame is than with the reference implementation. The ceilings are measured anew before each run, as a machine
that others share may multiply three times as fast a minute later. Then compares the ids: one at a time, a frame is told
the ids that it got in flight, so that each of its tokens is compared; for those that differ, the gap between the two
likeliest logits is printed. The last line is a JSON object. Exit code 1 if a requirement is missed. Test:
pytest tests/test_benchmark_engine.py
"""

import argparse
import json
import statistics
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmark.hardware import cpu_name, num_cores
from benchmark.phases import PHASES, PhaseWatch
from benchmark.random_weights import add_options, never_end, random_checkpoint
from benchmark.roofline import Ceilings, measure_ceilings
from benchmark.table import progress, show
from pipeline.demo.scenes import draw_scene, random_scene
from pipeline.moondream.checkpoint import Checkpoint, load_checkpoint
from pipeline.moondream.decoding import TextDecoding
from pipeline.moondream.engine import Engine, positions_needed
from pipeline.moondream.prompts import Query

SIZES = {"360p": (640, 360), "720p": (1280, 720)}  # width, height
QUESTION = "Describe this scene."
EXIT_MISSED = 1
# To reach, with the 2b model: shares of the ceilings, ratios of medians.
MIN_ENCODE, MIN_PREFILL, MIN_DECODE_RATIO = 0.60, 0.55, 3.0
MIN_IN_FLIGHT_RATIO = {"360p": 1.4}
MIN_REFERENCE_RATIO = {"360p": 2.0, "720p": 1.25}
# What the reference implementation took for one frame of the 2b model in bfloat16, alone on 2 cores that multiply 708
# GFLOP/s and read 31 GB/s: to encode it (at 360p, two equal crops), to prefill, and for a token.
REFERENCE_ENCODE_S = {"360p": 3.1, "720p": 13.0}
REFERENCE_PREFILL_S, REFERENCE_TOKEN_S = 5.5, 0.23
REFERENCE_CEILINGS = Ceilings(708e9, 0, 31e9)
UNKNOWN = Ceilings(float("inf"), float("inf"), float("inf"))


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmark.engine", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser)
    parser.add_argument("--device", default="auto", help="(default: %(default)s)")
    parser.add_argument("--dtype", default="bfloat16", help="bfloat16, float16 or float32 (default: %(default)s)")
    parser.add_argument("--sizes", nargs="+", choices=tuple(SIZES), default=tuple(SIZES), help="(default: all)")
    parser.add_argument("--frames", type=int, default=8, help="in flight together (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=32, help="of each answer (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each kind, in turns (default: %(default)s)")
    parser.add_argument(
        "--alone", type=int, default=2, help="frames of each run that goes one at a time (default: %(default)s)"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse_arguments(arguments)
    with random_checkpoint(args.folder, args.random_weights) as folder:
        checkpoint = load_checkpoint(str(folder), device=args.device, dtype=args.dtype)
    never_end(checkpoint)
    is_judged = args.random_weights == "2b"
    rows, verdicts = [], []
    for size in args.sizes:
        row = measure(size, checkpoint, args)
        verdicts += tell(row, is_judged)
        rows.append(row)
    result = {
        "hardware": {"device": str(checkpoint.device), "cpu": cpu_name(), "num_cores": num_cores()},
        "torch": torch.__version__,
        "num_threads": torch.get_num_threads(),
        "size": args.random_weights,
        "dtype": checkpoint.dtype_name,
        "num_frames": args.frames,
        "repeats": args.repeats,
        "rows": rows,
    }
    print(json.dumps(result))
    return 0 if all(verdicts) else EXIT_MISSED


@dataclass
class Runs:
    """The runs of one kind: how long a frame took in each, and where the time of all of them went."""

    num_slots: int
    watch: PhaseWatch
    frame_s: list[float] = field(default_factory=list)
    num_frames: int = 0
    num_tokens: int = 0

    def __post_init__(self) -> None:
        self.watch.start()

    def row(self) -> dict[str, Any]:
        run_s = sum(self.watch.phases[name].spent_s for name in PHASES)
        decode_s = self.watch.phases["decode"].spent_s
        return {
            "frame_s": statistics.median(self.frame_s),
            "runs_frame_s": self.frame_s,
            # The first token of an answer comes of the prefill.
            "tokens_per_s": (self.num_tokens - self.num_frames) / decode_s,
            "phases": self.watch.report(1, self.num_frames, run_s),
        }


def measure(size: str, checkpoint: Checkpoint, args: argparse.Namespace) -> dict[str, Any]:
    """Both kinds of runs, in turns, at one frame size. -> its row of the result"""
    images = list(draw_frames(args.frames, SIZES[size]))
    looks: list[Ceilings] = []

    def look() -> Ceilings:
        looks.append(measure_ceilings(checkpoint.device, checkpoint.dtype))
        return looks[-1]

    in_flight, alone, warm_up = (Runs(num_slots, PhaseWatch(checkpoint, UNKNOWN)) for num_slots in (args.frames, 1, 1))
    describe(warm_up, images[:1], checkpoint, 2)
    ids: list[tuple[int, ...]] = []
    gaps: list[float] = []
    num_compared = 0
    for repeat in range(args.repeats):
        progress(f"{size}: {args.frames} frames in flight, run {repeat + 1} of {args.repeats}")
        in_flight.watch.ceilings = look()
        ids = describe(in_flight, images, checkpoint, args.tokens)
        chosen = [(repeat * args.alone + i) % args.frames for i in range(args.alone)]
        progress(f"{size}: {args.alone} frames one at a time, run {repeat + 1} of {args.repeats}")
        alone.watch.ceilings = look()
        teacher = Teacher([ids[i] for i in chosen])
        describe(alone, [images[i] for i in chosen], checkpoint, args.tokens, teacher)
        gaps += teacher.gaps
        num_compared += args.alone * args.tokens
    return {
        "size": size,
        "num_tokens": args.tokens,
        "ceilings": asdict(median_of(looks)),
        "ceilings_before_each_run": [asdict(each) for each in looks],
        "in_flight": in_flight.row(),
        "alone": alone.row(),
        "ids_compared": num_compared,
        "ids_equal": num_compared - len(gaps),
        "gaps": gaps,
    }


def median_of(looks: Sequence[Ceilings]) -> Ceilings:
    """Of each figure by itself."""
    return Ceilings(*(statistics.median(figures) for figures in zip(*map(astuple, looks), strict=True)))


def draw_frames(num_frames: int, size_px: tuple[int, int]) -> Iterator[np.ndarray]:
    for seed in range(num_frames):
        rng = np.random.default_rng(seed)
        yield draw_scene(random_scene(rng), rng, size_px=size_px)


class Teacher:
    """Sees to it that frames, one at a time, are fed given ids, and keeps the gaps between the two likeliest logits
    where the model itself would have chosen another id."""

    def __init__(self, ids: list[tuple[int, ...]]) -> None:
        self.gaps: list[float] = []
        self._ids = deque(ids)  # of each frame to come

    @contextmanager
    def teaching(self, engine: Engine) -> Iterator[None]:
        """For one frame, which has been submitted."""
        (sequence,) = next(iter(engine._images.values())).sequences
        decoding, runner = sequence.decoding, engine._runner
        assert isinstance(decoding, TextDecoding)
        ids, choose_tokens = self._ids.popleft(), runner.choose_tokens

        def choose_and_correct(logits: Tensor, *args: Any, **kwargs: Any) -> list[int]:
            (chosen,) = choose_tokens(logits, *args, **kwargs)
            (taught,) = ids[len(decoding.answer_ids) :][:1]
            if chosen != taught:
                best, second = logits[0].topk(2).values.tolist()
                self.gaps.append(best - second)
            return [taught]

        runner.choose_tokens = choose_and_correct
        yield
        runner.choose_tokens = choose_tokens


def describe(
    runs: Runs, images: Sequence[np.ndarray], checkpoint: Checkpoint, num_tokens: int, teacher: Teacher | None = None
) -> list[tuple[int, ...]]:
    """One run: all images in flight together, or one after the other with a teacher. -> the ids of each answer"""
    task = Query(QUESTION, max_tokens=num_tokens)
    engine = Engine(checkpoint, runs.num_slots, positions_needed(task, checkpoint))
    runs.watch.watch(engine)
    started_s = time.monotonic()
    ids: dict[Any, tuple[int, ...]] = {}
    for index, image in enumerate(images):
        engine.submit(index, image, [task])
        if teacher:
            with teacher.teaching(engine):
                ids |= finish(engine)
    ids |= finish(engine)
    runs.frame_s.append((time.monotonic() - started_s) / len(images))
    runs.num_frames += len(images)
    runs.num_tokens += sum(map(len, ids.values()))
    return [ids[index] for index in range(len(images))]


def finish(engine: Engine) -> dict[Any, tuple[int, ...]]:
    ids: dict[Any, tuple[int, ...]] = {}
    while engine.num_in_flight:
        for completed in engine.step():
            if completed.error:
                raise completed.error
            ids[completed.key] = completed.answers[0].answer_ids
    return ids


def tell(row: dict[str, Any], is_judged: bool) -> list[bool]:
    """Print a row, with what is required of it. -> whether each requirement is met"""
    size, in_flight, alone, ceilings = row["size"], row["in_flight"], row["alone"], Ceilings(**row["ceilings"])
    verdicts: list[bool] = []

    def require(what: str, found: float, least: float | None, form: str, beside: str = "") -> None:
        is_met = found >= least if is_judged and least is not None else None
        required = "" if is_met is None or least is None else f">= {format(least, form)}"
        show(f"{size}: {what}", format(found, form), required, is_met, beside)
        if is_met is not None:
            verdicts.append(is_met)

    for name, figure, unit in (
        ("multiplied, in the model's format", "matmul_flops", "GFLOP/s"),
        ("multiplied, in float32", "float32_flops", "GFLOP/s"),
        ("read from memory", "bandwidth_bytes", "GB/s"),
    ):
        found = sorted(each[figure] / 1e9 for each in row["ceilings_before_each_run"])
        typical, beside = f"{getattr(ceilings, figure) / 1e9:,.0f} {unit}", f"{found[0]:,.0f} to {found[-1]:,.0f}"
        show(f"{size}: {name}", typical, beside=beside)
    for name, kind in (("in flight", in_flight), ("one at a time", alone)):
        parts = ", ".join(f"{phase} {kind['phases'][phase]['s_per_frame']:.2f}" for phase in PHASES)
        show(f"{size}: seconds a frame, {name}", f"{kind['frame_s']:.2f} s", beside=parts)
    phases = in_flight["phases"]
    require("encode, of the ceiling", phases["encode"]["reached"], MIN_ENCODE, ".0%", phases["encode"]["bound_by"])
    require("prefill, of the ceiling", phases["prefill"]["reached"], MIN_PREFILL, ".0%", phases["prefill"]["bound_by"])
    show(f"{size}: decode, of the ceiling", f"{phases['decode']['reached']:.0%}", beside=phases["decode"]["bound_by"])
    tokens = f"{in_flight['tokens_per_s']:.1f} against {alone['tokens_per_s']:.1f} tokens/s"
    row["decode_ratio"] = in_flight["tokens_per_s"] / alone["tokens_per_s"]
    require("decode in flight / one at a time", row["decode_ratio"], MIN_DECODE_RATIO, ".2f", tokens)
    row["ratio"] = alone["frame_s"] / in_flight["frame_s"]
    require("frames/s in flight / one at a time", row["ratio"], MIN_IN_FLIGHT_RATIO.get(size), ".2f")
    if is_judged:
        row["reference_frame_s"] = reference_frame_s(size, ceilings, row["num_tokens"])
        row["reference_ratio"] = row["reference_frame_s"] / in_flight["frame_s"]
        beside = f"which would take {row['reference_frame_s']:.1f} s at this machine's ceilings"
        require("faster than the reference", row["reference_ratio"], MIN_REFERENCE_RATIO[size], ".2f", beside)
    share = row["ids_equal"] / row["ids_compared"]
    gaps = ", ".join(f"{gap:.3f}" for gap in sorted(row["gaps"]))
    show(f"{size}: equal ids", f"{share:.1%}", beside=f"gaps of the others: {gaps}" if gaps else "")
    return verdicts


def reference_frame_s(size: str, ceilings: Ceilings, num_tokens: int) -> float:
    """What the reference implementation would take for a frame here: as recorded, in proportion to the ceilings."""
    arithmetic_s = REFERENCE_ENCODE_S[size] + REFERENCE_PREFILL_S
    slower = REFERENCE_CEILINGS.matmul_flops / ceilings.matmul_flops
    reads_slower = REFERENCE_CEILINGS.bandwidth_bytes / ceilings.bandwidth_bytes
    return arithmetic_s * slower + num_tokens * REFERENCE_TOKEN_S * reads_slower


if __name__ == "__main__":
    sys.exit(main())
