"""Find the best setting for this machine: `python -m benchmark --max-models 20 --fps 2`.

Describes frames of a video with 1, 2, 3, 4, 6, 8 ... instances of 1, 2, 4 ... 64 slots each, through the pool that the
app uses, all at the same time (closed_loop.py), as long as more of them make it faster by 3% and fit the memory. Prints
frames and tokens per second, latency, memory and use of the device; the best setting, the best one under a bound on
latency, and where the time goes beside the least that the device could take (roofline.py). Saves all that as
`DIR/<device>.json`, which the app reads for its own setting, and a picture beside it. Exit codes: 0, 2 for bad input,
3 for no model or one that does not fit, 130 after Ctrl-C.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmark import closed_loop, plot, report, saved
from benchmark.closed_loop import Load
from benchmark.grid import AnyRow, Row, best, best_under_latency, instance_counts, search
from benchmark.phases import PhaseWatch
from benchmark.random_weights import CONFIGS, never_end, random_checkpoint
from benchmark.roofline import Ceilings, measure_ceilings
from pipeline.__main__ import BAR, EXIT_BAD_INPUT, EXIT_INTERRUPTED, EXIT_NO_MODEL
from pipeline.demo import SAMPLE_VIDEO
from pipeline.errors import DescriberError, InvalidOption, ModelError, OutOfMemory
from pipeline.frames import sample_frames
from pipeline.moondream.capacity import device_name, device_slug
from pipeline.moondream.checkpoint import Checkpoint, load_checkpoint
from pipeline.moondream.config import TokenizerConfig
from pipeline.moondream.hub import MODEL_ID
from pipeline.moondream.prompts import DEFAULT_MAX_TOKENS, DEFAULT_QUESTION, Query, check
from pipeline.moondream.scheduler import MAX_INSTANCES, MAX_SLOTS

RESULTS = Path(__file__).parent / "results"
SLOT_COUNTS = (
    1,
    2,
    4,
    8,
    16,
    32,
    64,
)  # with more, frames wait for seconds, and reading the weights is no burden any more
MAX_IMAGES = 64  # kept in memory
RANDOM_TOKENS = 64  # of an answer by random weights, which has no end of its own; about as long as a description
BOUND_FACTOR = 2  # the bound on latency, in terms of the first setting's
GIB = 1024**3


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmark",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Options may be written with - or _.",
        allow_abbrev=False,
    )

    def option(name: str, group: Any = parser, **settings: Any) -> None:
        group.add_argument(name, *([name[:2] + name[2:].replace("-", "_")] if "-" in name[2:] else []), **settings)

    option("--max-models", type=int, default=8, metavar="N", help="most instances of the model (default: %(default)s)")
    option("--fps", type=float, default=1.0, help="frames to take per second of video (default: %(default)g)")
    option("--video", type=Path, default=SAMPLE_VIDEO, help="a video file (default: the sample video)")
    model = parser.add_mutually_exclusive_group()
    option("--model", model, default=MODEL_ID, help="hub id, checkpoint folder, or demo (default: %(default)s)")
    option("--random-weights", model, choices=tuple(CONFIGS), help="instead, noise of the real size, or a smaller one")
    option("--folder", type=Path, help="keep random weights here, or use those that are here (default: temporary)")
    option("--slots", type=slot_counts, default=SLOT_COUNTS, metavar="1,2,...", help="(default: 1,2,4 ... 64)")
    option("--question", default=DEFAULT_QUESTION, help="what to ask of each frame (default: %(default)s)")
    option(
        "--max-tokens",
        type=int,
        help=f"longest answer, in tokens (default: {DEFAULT_MAX_TOKENS}; random weights, which answer noise and always "
        f"at full length: {RANDOM_TOKENS})",
    )
    option("--latency-bound-s", type=float, help="(default: twice what the first setting takes for 95%% of its frames)")
    option("--min-s", type=float, default=2.0, help="shortest time for a setting, warm-up aside (default: %(default)g)")
    option("--max-s", type=float, default=10.0, help="then one answer per slot is enough (default: %(default)g)")
    option("--device", default="auto", help="auto, cuda, cuda:N, mps or cpu (default: auto)")
    option("--dtype", default="auto", help="auto, bfloat16, float16 or float32 (default: auto)")
    option("--output", type=Path, default=RESULTS, metavar="DIR", help="(default: benchmark/results)")
    return parser.parse_args(arguments)


def slot_counts(text: str) -> list[int]:
    counts = sorted({int(part) for part in text.split(",")})
    if not 1 <= counts[0] <= counts[-1] <= MAX_SLOTS:
        raise argparse.ArgumentTypeError(f"from 1 to {MAX_SLOTS}, not {text}")
    return counts


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse_arguments(arguments)
    try:
        return run(args)
    except DescriberError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_NO_MODEL if isinstance(error, ModelError) else EXIT_BAD_INPUT
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return EXIT_INTERRUPTED


def run(args: argparse.Namespace) -> int:
    task = task_of(args)
    images = [frame.image for frame in sample_frames(args.video, args.fps, max_frames=MAX_IMAGES)]
    with loaded(args) as (checkpoint, name):
        device, dtype = device_name(checkpoint.device), checkpoint.dtype_name
        height_px, width_px = images[0].shape[:2]
        print(f"{name} on {device}, {dtype}. {len(images)} frames of {width_px} x {height_px}.", file=sys.stderr)
        ceilings = measure_ceilings(checkpoint.device, checkpoint.dtype)
        load = Load(checkpoint, images, task, args.min_s, args.max_s)
        all_rows = measure_all(load, args.max_models, args.slots)
        rows = [row for row in all_rows if isinstance(row, Row)]
        chosen = best(rows)
        if chosen is None:
            raise OutOfMemory("No setting fits the memory. Free some, or use another device.")
        bound_s = args.latency_bound_s or BOUND_FACTOR * rows[0].latency_p95_s
        quick = best_under_latency(rows, bound_s)
        roofline = look_closer(load, chosen, ceilings)
    report.print_choice(chosen, quick, bound_s)
    report.print_roofline(roofline)
    entry = {
        "name": name,
        "num_parameters": sum(parameter.numel() for parameter in checkpoint.model.parameters()),
        "dtype": dtype,
        "measured_at": datetime.now(UTC).date().isoformat(),
        "best": setting_of(chosen),
        "best_under_latency": {**setting_of(quick), "latency_bound_s": bound_s} if quick else None,
        "video": {"name": args.video.name, "fps": args.fps, "size": f"{width_px}x{height_px}"},
        "question": args.question,
        "max_tokens": task.max_tokens,
        "torch": torch.__version__,
        "num_threads": torch.get_num_threads(),
        "rows": saved.rows_to_json(all_rows),
        "roofline": roofline,
    }
    path = args.output / f"{device_slug(checkpoint.device)}.json"
    saved.save(path, device, entry)
    picture = path.with_name(f"{path.stem}-{saved.slug(name)}.png")
    plot.draw(picture, f"{name} on {device}, {dtype}", rows, chosen, bound_s)
    print(f"Saved as {path} and {picture.name}.", file=sys.stderr)
    return 0


def task_of(args: argparse.Namespace) -> Query:
    """Raises InvalidOption for options that cannot be measured with."""
    if not 1 <= args.max_models <= MAX_INSTANCES:
        raise InvalidOption(f"max_models must be from 1 to {MAX_INSTANCES}, not {args.max_models}.")
    if args.folder and not args.random_weights:
        raise InvalidOption("folder is for random_weights. For a checkpoint of your own, give it as model.")
    default = RANDOM_TOKENS if args.random_weights else DEFAULT_MAX_TOKENS
    task = Query(args.question, max_tokens=default if args.max_tokens is None else args.max_tokens)
    check(task, TokenizerConfig())
    return task


@contextmanager
def loaded(args: argparse.Namespace) -> Iterator[tuple[Checkpoint, str]]:
    """The checkpoint, and what to call it."""
    if args.random_weights is None:
        print(f"Loading {args.model} ...", file=sys.stderr)
        checkpoint = load_checkpoint(args.model, None, args.device, args.dtype)
        yield checkpoint, checkpoint.name
        return
    size = args.random_weights
    with random_checkpoint(args.folder, size) as folder:
        checkpoint = load_checkpoint(str(folder), None, args.device, args.dtype)
    never_end(checkpoint)
    yield checkpoint, f"random weights {size}"


def measure_all(load: Load, max_instances: int, slot_counts: Sequence[int]) -> list[AnyRow]:
    """The rows of the search, printed as they come."""
    counts, rows = instance_counts(max_instances), []
    report.print_header()
    with tqdm(total=len(counts) * len(slot_counts), file=sys.stderr, **{**BAR, "unit": "settings"}) as bar:

        def measure(instances: int, slots: int) -> AnyRow:
            bar.set_description(f"{instances} x {slots}")
            return closed_loop.measure(load, instances, slots)

        for row in search(counts, slot_counts, measure):
            rows.append(row)
            bar.write(report.line(row), file=sys.stdout)
            bar.update(counts.index(row.instances) * len(slot_counts) + slot_counts.index(row.slots) + 1 - bar.n)
    return rows


def look_closer(load: Load, chosen: Row, ceilings: Ceilings) -> dict[str, Any]:
    """Run the best setting once more, and say where its time goes."""
    watch = PhaseWatch(load.checkpoint, ceilings)
    row = closed_loop.measure(load, chosen.instances, chosen.slots, watch)
    if not isinstance(row, Row):
        raise OutOfMemory("The best setting did not fit the memory a second time. Free some, and run it again.")
    phases = watch.report(row.instances, row.num_frames, row.run_s)
    return {**setting_of(row), "ceilings": vars(ceilings), "frames_per_s": row.frames_per_s, "phases": phases}


def setting_of(row: Row) -> dict[str, int]:
    return {"instances": row.instances, "slots": row.slots}


if __name__ == "__main__":
    sys.exit(main())
