"""Measure what loading a checkpoint takes: `python -m benchmark.load --random-weights 2b`.

Makes a checkpoint folder with random weights of the real size, loads it in a fresh process on the CPU, and compares
the peak memory of that process with the size of the file; then describes one 360p and one 720p frame, once each and
without a warm-up. The last line is a JSON object. Exit codes: 0, 1 if the peak exceeds 1.3 times the file, 2 if
nothing could be measured. A tiny checkpoint, or one converted to float32 on loading, is measured but not judged.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError

from benchmark.hardware import cpu_name, num_cores, peak_rss_bytes
from benchmark.random_weights import add_options, random_checkpoint
from benchmark.table import progress
from pipeline.demo.scenes import draw_scene, random_scene
from pipeline.errors import DescriberError
from pipeline.moondream.answer import Answer
from pipeline.moondream.checkpoint import Checkpoint, load_checkpoint
from pipeline.moondream.device import has_native_bfloat16
from pipeline.moondream.engine import Engine, positions_needed
from pipeline.moondream.hub import find_checkpoint
from pipeline.moondream.prompts import Query

MAX_RATIO = 1.3  # peak memory of loading / size of the weights' files: 1, plus the libraries and one tensor
FRAME_SIZES = ((640, 360), (1280, 720))
MAX_TOKENS = 32
EXIT_TOO_MUCH_MEMORY, EXIT_NOT_MEASURED = 1, 2
GB = 1e9


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmark.load", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser)
    parser.add_argument("--dtype", default="bfloat16", help="bfloat16, float16 or float32 (default: %(default)s)")
    parser.add_argument("--child", type=Path, metavar="DIR", help=argparse.SUPPRESS)  # the fresh process's folder
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse_arguments(arguments)
    try:
        if args.child:
            return measure(args.child, args.random_weights, args.dtype)
        with random_checkpoint(args.folder, args.random_weights) as folder:
            return measure_in_child(folder, args.random_weights, args.dtype)
    except (DescriberError, OSError, SafetensorError) as error:
        progress(f"error: {error}")
        return EXIT_NOT_MEASURED


def measure_in_child(folder: Path, size: str, dtype: str) -> int:
    """Measure the checkpoint in a process that has held nothing else. -> its exit code"""
    command = [sys.executable, "-m", "benchmark.load", "--random-weights", size, "--dtype", dtype]
    root = Path(__file__).parent.parent
    exit_code = subprocess.run([*command, "--child", str(folder.resolve())], cwd=root).returncode
    if exit_code < 0:
        progress(f"error: the measuring process was ended by signal {-exit_code}; with 9, the memory did not suffice.")
        return EXIT_NOT_MEASURED
    return exit_code


def measure(folder: Path, size: str, dtype: str) -> int:
    """Load the folder's checkpoint in this process, describe two frames, print it all. -> the exit code"""
    baseline_bytes = peak_rss_bytes()
    file_bytes = sum(path.stat().st_size for path in find_checkpoint(str(folder)).weights)
    progress(f"loading {file_bytes / GB:.2f} GB")
    started_s = time.monotonic()
    checkpoint = load_checkpoint(str(folder), device="cpu", dtype=dtype)
    load_s = time.monotonic() - started_s
    for parameter in checkpoint.model.parameters():
        parameter.sum()  # a loader that maps the file has read nothing yet: make it count
    peak_bytes = peak_rss_bytes()
    ratio = peak_bytes / file_bytes

    print(f"file {file_bytes / GB:.3f} GB; loaded in {load_s:.2f} s, {file_bytes / load_s / GB:.2f} GB/s")
    print(f"peak memory {peak_bytes / GB:.3f} GB = {ratio:.2f} x file ({baseline_bytes / GB:.3f} GB before loading)")
    frames = [describe(checkpoint, *frame_size) for frame_size in FRAME_SIZES]
    describing_bytes = peak_rss_bytes()
    print(f"peak memory {describing_bytes / GB:.3f} GB while describing one frame at a time")
    result = {
        "hardware": hardware(),
        "torch": torch.__version__,
        "size": size,
        "dtype": dtype,
        "file_bytes": file_bytes,
        "baseline_rss_bytes": baseline_bytes,
        "peak_rss_bytes": peak_bytes,
        "ratio": round(ratio, 3),
        "load_s": round(load_s, 3),
        "describing_peak_rss_bytes": describing_bytes,
        "frames": frames,
    }
    print(json.dumps(result))
    is_judged = size != "tiny" and checkpoint.dtype.itemsize == 2
    return EXIT_TOO_MUCH_MEMORY if is_judged and ratio > MAX_RATIO else 0


def describe(checkpoint: Checkpoint, width_px: int, height_px: int) -> dict[str, Any]:
    """Describe a drawn scene of this size, alone in the engine. -> its row of the result, printed too"""
    progress(f"describing a frame of {width_px}x{height_px}")
    rng, task = np.random.default_rng(0), Query(max_tokens=MAX_TOKENS)
    image = draw_scene(random_scene(rng), rng, size_px=(width_px, height_px))
    engine = Engine(checkpoint, num_slots=1, context_len=positions_needed(task, checkpoint))
    engine.submit(0, image, [task])
    answers: list[Answer] = []
    while engine.num_in_flight:
        for completed in engine.step():
            if completed.error:
                raise completed.error
            answers += completed.answers
    answer = answers[0]
    encode_ms, llm_ms, total_ms = map(round, (answer.image_encode_ms, answer.llm_inference_ms, answer.total_ms))
    print(
        f"{width_px}x{height_px}: encode {encode_ms} ms, prefill and decode {llm_ms} ms, total {total_ms} ms, "
        f"{answer.num_tokens} tokens"
    )
    return {
        "size": f"{width_px}x{height_px}",
        "encode_ms": encode_ms,
        "llm_ms": llm_ms,
        "total_ms": total_ms,
        "num_tokens": answer.num_tokens,
    }


def hardware() -> dict[str, Any]:
    """What the figures hold for."""
    return {
        "cpu": cpu_name(),
        "num_cores": num_cores(),
        "has_native_bfloat16": has_native_bfloat16(),
    }


if __name__ == "__main__":
    sys.exit(main())
