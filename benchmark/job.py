"""Measure what a job costs beside the model: `python -m benchmark.job --random-weights 0.5b`.

A whole job (from its submission to the `done` event of the listener that follows it: the download from a web server
here, decoding, the model, storing) runs in the real server, in a process of its own. Against that, in turns, an engine
alone in a process of its own describes the same frames, decoded beforehand and kept in memory, with as many slots and
threads, and the server's context. Both have loaded and run the model before the clock starts. Of the video, 360p and 30
frames per second unless another is named, one frame per second is described; none takes over an answer, or finds it in
the cache.

Random weights mostly answer in the full length; the medians are compared only if both sides gave equally many tokens.
The last line is a JSON object, which goes to a file, too. Exit codes: 0, 1 if the job takes too long, 2 if nothing
could be measured. A tiny checkpoint is not judged. Linux only. Test: pytest tests/test_benchmark_job.py
"""

import argparse
import http.client
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote

from safetensors import SafetensorError

from benchmark.ingest import LOOP_S, make_clip
from benchmark.random_weights import add_options, random_checkpoint
from benchmark.server import ROOT, Server, ask_once, cpu_time_s, serving
from benchmark.table import progress, show
from pipeline.describe import describe_frames
from pipeline.errors import DescriberError
from pipeline.frames import sample_frames
from pipeline.moondream.capacity import device_name, device_slug
from pipeline.moondream.checkpoint import load_checkpoint
from pipeline.moondream.device import choose_device
from pipeline.moondream.engine import Engine
from pipeline.moondream.prompts import Query
from pipeline.moondream.scheduler import DEFAULT_SLOTS
from pipeline.results import RunStats

MAX_RATIO = 1.05
HEIGHT_PX, TARGET_FPS = 360, 1.0
SETTINGS = {"page": False, "host": "127.0.0.1", "allow_private_urls": "127.0.0.1", "answer_cache_bytes": 0}
TIMEOUT_S = 3600.0  # between two events
EXIT_MISSED, EXIT_NOT_MEASURED = 1, 2

Figures = dict[str, float]


class NotMeasured(Exception):
    """A side did not do what is compared."""


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmark.job", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser)
    parser.add_argument("--video", type=Path, help="(default: one is made)")
    parser.add_argument("--frames", type=int, default=60, help="of the job (default: %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=16, help="of an answer (default: %(default)s)")
    parser.add_argument("--slots", type=int, default=DEFAULT_SLOTS, help="of the one instance (default: %(default)s)")
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count(), help="of the model, on each side (default: all cores)"
    )
    parser.add_argument("--repeats", type=int, default=3, help="runs of each side (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="(default: %(default)s)")
    parser.add_argument("--dtype", default="auto", help="(default: %(default)s)")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "benchmark" / "results", metavar="DIR", help="(default: %(default)s)"
    )
    parser.add_argument("--alone", type=Path, metavar="CLIP", help=argparse.SUPPRESS)  # the fresh process's video
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse_arguments(arguments)
    if args.alone:
        print(json.dumps(describe_alone(args.alone, args)))
        return 0
    try:
        with (
            random_checkpoint(args.folder, args.random_weights) as checkpoint,
            tempfile.TemporaryDirectory(prefix="moonreel-") as temporary,
        ):
            found = measure(checkpoint, Path(temporary), args)
        device = choose_device(args.device)
    except (DescriberError, NotMeasured, OSError, SafetensorError, subprocess.CalledProcessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_NOT_MEASURED
    options = {name: value for name, value in vars(args).items() if not isinstance(value, Path | None)}
    result = {"device": device_name(device), "options": options, **found}
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / f"job-{device_slug(device)}.json"
    path.write_text(json.dumps(result) + "\n", encoding="utf-8")
    print(json.dumps(result))
    return 0 if found["ratio"] <= MAX_RATIO or args.random_weights == "tiny" else EXIT_MISSED


def measure(checkpoint: Path, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Run both sides in turns. Raises NotMeasured, CalledProcessError."""
    clip = args.video
    if clip is None:
        (folder / "videos").mkdir()
        clip = make_clip(folder / "videos", "h264", HEIGHT_PX, math.ceil(args.frames / LOOP_S) * LOOP_S)
    sides: dict[str, list[Figures]] = {"job": [], "alone": []}
    load_before = os.getloadavg()[0]
    with web_server(clip.parent) as origin:
        for number in range(args.repeats):
            progress(f"a job in the server, and the engine alone: run {number + 1} of {args.repeats}")
            run = {
                "job": partial(run_in_server, checkpoint, folder / f"data-{number}", f"{origin}/{quote(clip.name)}"),
                "alone": partial(run_alone, checkpoint, clip),
            }
            # Each side begins every second time: a machine that speeds up meanwhile would favour who always ends.
            for name in list(run)[:: -1 if number % 2 else 1]:
                sides[name].append(run[name](args))
    job, alone = ({name: median_of(runs, name) for name in runs[0]} for runs in sides.values())
    if len(counts := {run["num_tokens"] for runs in sides.values() for run in runs}) > 1:
        raise NotMeasured(f"the two sides did not do the same work: their answers have {counts} tokens in all")
    load = {"load_before": load_before, "load_after": os.getloadavg()[0]}
    found = {**load, "ratio": round(job["wall_s"] / alone["wall_s"], 4), "job": job, "alone": alone, "runs": sides}
    tell(found["ratio"], job, alone, args)
    return found


def median_of(runs: list[Figures], name: str) -> float:
    return round(statistics.median(run[name] for run in runs), 3)


def tell(ratio: float, job: Figures, alone: Figures, args: argparse.Namespace) -> None:
    what, is_judged = f"{args.frames} frames", args.random_weights != "tiny"
    for name, side in ((f"{what}, the engine alone", alone), (f"{what}, a job in the server", job)):
        show(name, f"{side['wall_s']:.2f} s", beside=f"CPU {side['cpu_s']:.2f} s")
    show("the job against the engine", f"{ratio:.3f} x", f"<= {MAX_RATIO:g}", ratio <= MAX_RATIO if is_judged else None)
    parts = {
        "submitted until it runs": "queued_s",
        "downloading": "download_s",
        "waiting for the decoder, and storing pictures": "frames_s",
        "waiting for the model": "model_s",
        "probing, storing results, the rest": "rest_s",
        "from the last result to `done`": "ending_s",
    }
    for name, part in parts.items():
        show(f"  of the job: {name}", f"{job[part]:.2f} s")
    show("  of the job: until its first result", f"{job['first_result_s']:.2f} s")


# A job in the server


@contextmanager
def web_server(folder: Path) -> Iterator[str]:
    """Serve a folder's files. -> the origin"""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def run_in_server(checkpoint: Path, data_dir: Path, video_url: str, args: argparse.Namespace) -> Figures:
    model = {"model": checkpoint.resolve(), "device": args.device, "dtype": args.dtype}
    capacity = {"instances": 1, "slots": args.slots}
    with serving(data_dir, "/api/ready", args.threads, **SETTINGS, **model, **capacity) as server:
        follow_job(server, video_url, args.slots, args.max_tokens)  # warm up
        return follow_job(server, video_url, args.frames, args.max_tokens)


def follow_job(server: Server, video_url: str, num_frames: int, max_tokens: int) -> Figures:
    """Submit a job and listen to it until it is done. -> seconds, and the tokens of all its answers. Raises
    NotMeasured."""
    request = {"video_url": video_url, "target_fps": TARGET_FPS, "max_frames": num_frames, "max_tokens": max_tokens}
    cpu_before_s, begun_s = cpu_time_s(server.pid), time.perf_counter()
    job_id = submit(server, {**request, "reuse_similar": 0})
    results, at_s = [], []
    for name, data in events(server, job_id):
        if name == "frame":
            results.append(data)
        at_s += [time.perf_counter() - begun_s] if name != "progress" else []
    cpu_s = cpu_time_s(server.pid) - cpu_before_s
    status = json.loads(ask_once(server.port, f"/api/status/{job_id}")[1])
    if status["status"] != "completed" or len(results) != num_frames or status["frames_failed"]:
        raise NotMeasured(f"the job is {status['status']} with {len(results)} frames: {status['error_message']}")
    spent = status["results_payload"]["timings_seconds"]
    download_s, frames_s, model_s = (
        spent[name] for name in ("video_download", "frame_extraction", "distributed_frame_processing_map")
    )
    found = {
        "wall_s": at_s[-1],
        "cpu_s": cpu_s,
        "num_tokens": sum(result["num_tokens"] for result in results),
        "first_result_s": at_s[0],
        "queued_s": status["processing_started_at"] - status["submitted_at"],
        "download_s": download_s,
        "frames_s": frames_s,
        "model_s": model_s,
        "rest_s": spent["overall_pipeline_internal"] - download_s - frames_s - model_s,
        "ending_s": at_s[-1] - at_s[-2],
    }
    return {name: round(value, 3) for name, value in found.items()}


def submit(server: Server, request: dict[str, Any]) -> str:
    """-> the job's id"""
    with closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=TIMEOUT_S)) as connection:
        connection.request("POST", "/api/submit", json.dumps(request), {"Content-Type": "application/json"})
        answer = json.loads(connection.getresponse().read())
    if "job_id" not in answer:
        raise NotMeasured(f"the job was refused: {answer}")
    return answer["job_id"]


def events(server: Server, job_id: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The names and contents of a job's events, up to the last."""
    with closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=TIMEOUT_S)) as connection:
        connection.request("GET", f"/api/jobs/{job_id}/events")
        name = ""
        for line in connection.getresponse():
            field, _, value = line.decode().rstrip().partition(": ")
            if field == "event":
                name = value
            elif field == "data":
                yield name, json.loads(value)


# The engine alone


def run_alone(checkpoint: Path, clip: Path, args: argparse.Namespace) -> Figures:
    """Have a fresh process describe the clip's frames. Raises CalledProcessError."""
    names = ("random_weights", "frames", "max_tokens", "slots", "device", "dtype")
    options = [text for name in names for text in (f"--{name.replace('_', '-')}", str(getattr(args, name)))]
    command = [
        sys.executable,
        "-m",
        "benchmark.job",
        *options,
        "--folder",
        checkpoint.resolve(),
        "--alone",
        clip.resolve(),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
    return json.loads(subprocess.check_output(command, cwd=ROOT, env=environment))


def describe_alone(clip: Path, args: argparse.Namespace) -> Figures:
    """Describe the clip's frames in this process."""
    frames = list(sample_frames(clip, TARGET_FPS, max_frames=args.frames))
    checkpoint = load_checkpoint(str(args.folder), device=args.device, dtype=args.dtype)
    engine = Engine(checkpoint, args.slots, checkpoint.config.text.max_context)
    task = Query(max_tokens=args.max_tokens)
    for _ in describe_frames(frames[: args.slots], engine, task, RunStats()):  # warm up
        pass
    cpu_before_s, begun_s = time.process_time(), time.perf_counter()
    results = list(describe_frames(frames, engine, task, RunStats()))
    return {
        "wall_s": round(time.perf_counter() - begun_s, 3),
        "cpu_s": round(time.process_time() - cpu_before_s, 3),
        "num_tokens": sum(result.num_tokens for result in results),
    }


if __name__ == "__main__":
    sys.exit(main())
