"""Measure what the pool makes of several jobs at once: `python -m benchmark.pool --random-weights 0.5b`.

Two questions, with random weights of a real size. How many frames per second do jobs get that run together in a pool
of instances with many slots, against one after the other in a pool of one instance with one slot (in turns, medians)?
How long does one more job wait for its first answer, submitted when the others have their first and are in full flow,
against a single frame in an idle pool?

Frames are drawn scenes of 640 x 360, no two alike. All answers have the same length: the end of a text is made
impossible. Engines have the context that the app gives them. The last line is a JSON object, which goes to a file, too.
Exit codes: 0, 1 if a figure is not as required, 2 if nothing could be measured. A tiny checkpoint is not judged.
Test: pytest tests/test_benchmark_pool.py
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError

from benchmark.random_weights import add_options, never_end, random_checkpoint
from benchmark.server import ROOT
from benchmark.table import progress, show
from pipeline.demo.scenes import draw_scene, random_scene
from pipeline.describe import describe_frames
from pipeline.errors import DescriberError, ModelError
from pipeline.moondream.capacity import device_name, device_slug, plan
from pipeline.moondream.checkpoint import Checkpoint, load_checkpoint
from pipeline.moondream.engine import Engine
from pipeline.moondream.prompts import Query
from pipeline.pool import Pool
from pipeline.results import RunStats
from pipeline.sampling import Frame

MIN_SPEED_UP = 1.15
MAX_WAIT = 3.0  # the newcomer's first answer, as a multiple of what a frame takes in an idle pool
FRAME_SIZE_PX = (640, 360)
EXIT_MISSED, EXIT_NOT_MEASURED = 1, 2

Job = list[Frame]


@dataclass(frozen=True)
class FirstAnswer:
    """How long a job waits for its first answer, and of that, before an engine takes the frame, and in a slot."""

    total_s: float
    queued_s: float
    in_slot_s: float


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmark.pool", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser)
    parser.add_argument("--instances", type=int, help="of the pool (default: as the app chooses)")
    parser.add_argument("--slots", type=int, help="of an instance (default: as the app chooses)")
    parser.add_argument("--jobs", type=int, default=4, help="that run together (default: %(default)s)")
    parser.add_argument("--frames", type=int, default=8, help="of a job (default: %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=24, help="of an answer (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each kind (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="(default: %(default)s)")
    parser.add_argument("--dtype", default="auto", help="(default: %(default)s)")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "benchmark" / "results", metavar="DIR", help="(default: %(default)s)"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse_arguments(arguments)
    try:
        with random_checkpoint(args.folder, args.random_weights) as folder:
            checkpoint = load_checkpoint(str(folder), device=args.device, dtype=args.dtype)
            never_end(checkpoint)
            setting = plan(checkpoint, args.instances, args.slots, checkpoint.config.text.max_context, args.output)
            args.instances, args.slots = setting.instances, setting.slots
            found = measure(checkpoint, args)
    except (DescriberError, OSError, SafetensorError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_NOT_MEASURED
    options = {name: value for name, value in vars(args).items() if not isinstance(value, Path | None)}
    result = {
        "device": device_name(checkpoint.device),
        "dtype": checkpoint.dtype_name,
        "torch": torch.__version__,
        "options": options,
        **found,
    }
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / f"pool-{device_slug(checkpoint.device)}.json"
    path.write_text(json.dumps(result) + "\n", encoding="utf-8")
    print(json.dumps(result))
    is_met = found["speed_up"] >= MIN_SPEED_UP and found["wait"] <= MAX_WAIT
    return 0 if is_met or args.random_weights == "tiny" else EXIT_MISSED


def measure(checkpoint: Checkpoint, args: argparse.Namespace) -> dict[str, Any]:
    """-> medians of the runs. Raises what describing a frame raises, and ModelError if it fails."""
    rng = np.random.default_rng(0)
    *jobs, newcomer = [draw_job(rng, args.frames) for _ in range(args.jobs + 1)]
    task = Query(max_tokens=args.max_tokens)
    context_len = checkpoint.config.text.max_context
    load_before = os.getloadavg()[0]
    together: list[float] = []
    one_by_one: list[float] = []
    busy: list[float] = []
    with (
        closing(Pool(lambda: Engine(checkpoint, args.slots, context_len), args.instances)) as pool,
        closing(Pool(lambda: Engine(checkpoint, 1, context_len))) as single,
    ):
        warm_up(pool, single, jobs, task)
        for number in range(1, args.repeats + 1):
            progress(f"{args.jobs} jobs at once, and one by one: run {number} of {args.repeats}")
            cpu_before_s, begun_s = time.process_time(), time.perf_counter()
            run_together(pool, jobs, task)
            together.append(time.perf_counter() - begun_s)
            busy.append((time.process_time() - cpu_before_s) / together[-1] / len(os.sched_getaffinity(0)))
            begun_s = time.perf_counter()
            for job in jobs:
                describe(single, job, task)
            one_by_one.append(time.perf_counter() - begun_s)
        progress("one frame alone, and one job more beside the others")
        alone = [describe(pool, newcomer[:1], task) for _ in range(args.repeats)]
        first = [describe_beside(pool, jobs, newcomer, task) for _ in range(args.repeats)]
    runs = {
        "together_s": together,
        "one_by_one_s": one_by_one,
        "alone_s": [answer.total_s for answer in alone],
        "first_answer_s": [answer.total_s for answer in first],
        "first_answer_queued_s": [answer.queued_s for answer in first],
        "first_answer_in_slot_s": [answer.in_slot_s for answer in first],
    }
    typical = {name: statistics.median(values) for name, values in runs.items()}
    num_frames = args.jobs * args.frames
    found = {
        **typical,
        "frames_per_second": num_frames / typical["together_s"],
        "frames_per_second_one_by_one": num_frames / typical["one_by_one_s"],
        "speed_up": typical["one_by_one_s"] / typical["together_s"],
        "busy_share_of_cores": statistics.median(busy),
        "wait": typical["first_answer_s"] / typical["alone_s"],
    }
    tell(found, args)
    load = {"load_before": load_before, "load_after": os.getloadavg()[0]}
    return {
        **load,
        **{name: round(value, 3) for name, value in found.items()},
        "runs": {name: [round(seconds, 3) for seconds in values] for name, values in runs.items()},
    }


def tell(found: dict[str, float], args: argparse.Namespace) -> None:
    what, is_judged = f"{args.jobs} jobs of {args.frames} frames", args.random_weights != "tiny"
    show(f"{what}, one by one in one slot", f"{found['frames_per_second_one_by_one']:.3f} fps")
    beside = f"{args.instances} x {args.slots} slots"
    show(f"{what}, at once in the pool", f"{found['frames_per_second']:.3f} fps", beside=beside)
    is_met = found["speed_up"] >= MIN_SPEED_UP if is_judged else None
    show("the pool against one slot", f"{found['speed_up']:.2f} x", f">= {MIN_SPEED_UP:g}", is_met)
    show("busy share of the cores meanwhile", f"{found['busy_share_of_cores']:.0%}")
    show("one frame alone in the pool", f"{found['alone_s']:.2f} s")
    is_met = found["wait"] <= MAX_WAIT if is_judged else None
    show("first answer of one job more", f"{found['wait']:.2f} x", f"<= {MAX_WAIT:g}", is_met, "of one frame alone")
    show("  in all", f"{found['first_answer_s']:.2f} s")
    show("  before an engine took it", f"{found['first_answer_queued_s']:.2f} s")
    show("  in a slot, from its prefill on", f"{found['first_answer_in_slot_s']:.2f} s")


def draw_job(rng: np.random.Generator, num_frames: int) -> Job:
    return [
        Frame(index, 1000 * index, draw_scene(random_scene(rng), rng, size_px=FRAME_SIZE_PX).astype(np.uint8))
        for index in range(num_frames)
    ]


def warm_up(pool: Pool, single: Pool, jobs: list[Job], task: Query) -> None:
    """Have every slot used once."""
    run_together(pool, [job[:1] for job in jobs], task)
    describe(single, jobs[0][:1], task)


def run_together(pool: Pool, jobs: list[Job], task: Query) -> None:
    with ThreadPoolExecutor(len(jobs)) as threads:
        for described in [threads.submit(describe, pool, job, task) for job in jobs]:
            described.result()


def describe_beside(pool: Pool, jobs: list[Job], newcomer: Job, task: Query) -> FirstAnswer:
    """Describe a job beside others: it comes when the first of their answers is there."""
    with ThreadPoolExecutor(len(jobs)) as threads:
        num_tokens = pool.num_tokens
        others = [threads.submit(describe, pool, job, task) for job in jobs]
        while pool.num_tokens == num_tokens and not any(other.done() for other in others):
            wait(others, timeout=0.005)
        first = describe(pool, newcomer, task)
        for other in others:
            other.result()
    return first


def describe(pool: Pool, job: Job, task: Query) -> FirstAnswer:
    """Describe a job's frames in a lane of its own. Raises ModelError for one that fails, or ends before max_tokens."""
    begun_s, first = time.perf_counter(), None
    with pool.lane() as lane:
        for result in describe_frames(job, lane, task, RunStats()):
            if result.num_tokens != task.max_tokens:
                raise ModelError(f"Frame {result.frame_idx} has {result.num_tokens} tokens. {result.error_message}")
            total_s = time.perf_counter() - begun_s
            first = first or FirstAnswer(total_s, total_s - result.total_ms / 1000, result.llm_inference_ms / 1000)
    assert first
    return first


if __name__ == "__main__":
    sys.exit(main())
