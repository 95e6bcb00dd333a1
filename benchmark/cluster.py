"""Measure what a Ray cluster costs the pool, and how far one app goes: `python -m benchmark.cluster`.

Three questions, each for engines in threads here, in actors of a Ray cluster, and in actors that get frames as JPEG.
What does a batch of 8 frames take through the pool (in turns, medians), if engines cost nothing? How long does a job
wait for its first answer: in a pool that is idle, and, with the demo model, from nothing? And how many frames can one
app decode, ship and store in a second, whatever the model takes: whole jobs of uploaded videos, no answer reused, with
the processor time that a frame takes of the app and its decoders, the bound where actors have cores of their own?

The cluster is RAY_ADDRESS, or one that is started here and shares the app's cores. Not measured: HTTP and the page. The
last line is a JSON object, which goes to a file, too. Exit codes: 0, 2 if nothing could be measured. Needs
requirements-ray.txt, but for `--sides threads`. Test: pytest tests/test_benchmark_cluster.py
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np

from benchmark.free_engine import MODEL, NUM_SLOTS, FreeEngine, FreeHost
from benchmark.ingest import make_clip
from benchmark.server import ROOT
from benchmark.table import show
from jobs.job_run import RunOptions
from jobs.job_store import JobStore
from jobs.record import Upload
from jobs.schema import UPLOAD, JobRequest
from jobs.worker import Worker
from pipeline.cluster import Cluster, EngineLost
from pipeline.cluster_host import EngineHost, Wanted
from pipeline.demo.scenes import draw_scene, random_scene
from pipeline.describe import describe_frames
from pipeline.errors import DescriberError
from pipeline.moondream.prompts import Query
from pipeline.pool import Pool
from pipeline.results import RunStats
from pipeline.sampling import Frame

SIDES = ("threads", "ray", "ray-jpeg")
SIZES_PX = {"360p": (640, 360), "720p": (1280, 720)}
QUERY = Query(max_tokens=24)
NUM_IMAGES, NUM_FIRST = 16, 20
TIMEOUT_S = 600.0
EXIT_NOT_MEASURED = 2

Runs = dict[str, list[float]]  # by side


class NotMeasured(Exception):
    """A job did not do what is measured."""


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmark.cluster", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES, help="(default: all)")
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES_PX), default=list(SIZES_PX), help="(default: all)")
    parser.add_argument("--workers", type=int, default=2, help="engines of a pool (default: %(default)s)")
    parser.add_argument("--batches", type=int, default=25, help="of 8 frames in a run (default: %(default)s)")
    parser.add_argument("--fps", type=float, default=2.0, help="sampled of a video (default: %(default)s)")
    parser.add_argument("--seconds", type=int, default=300, help="of a video, tens of them (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=2, help="at once (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each kind (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="keep the videos here (default: a temporary folder)")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "benchmark" / "results", metavar="DIR", help="(default: %(default)s)"
    )
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)  # a fresh process
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse_arguments(arguments)
    if args.child:
        first_answer_s(pool_here_with_demo)
        print(time.time())
        return 0
    try:
        found = measure(args)
    except (DescriberError, EngineLost, NotMeasured, OSError, subprocess.CalledProcessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_NOT_MEASURED
    import torch

    from pipeline.moondream.capacity import device_name, device_slug

    cpu = torch.device("cpu")
    options = {name: value for name, value in vars(args).items() if not isinstance(value, Path | None)}
    result = {"device": device_name(cpu), "options": options, **found}
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / f"cluster-{device_slug(cpu)}.json").write_text(json.dumps(result) + "\n", encoding="utf-8")
    print(json.dumps(result))
    return 0


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All that is asked for, printed as it is found. Raises what making a pool raises, and NotMeasured."""
    found: dict[str, Any] = {"load_before": os.getloadavg()[0]}
    if set(args.sides) != {"threads"}:
        begun_s = time.perf_counter()
        Cluster(Wanted("free"))
        found["connect_s"] = round(time.perf_counter() - begun_s, 3)
        show("starting or joining the cluster", f"{found['connect_s']:.2f} s")
    for size in args.sizes:
        batches, first = measure_batches(size, args)
        found[size] = {"batch_ms": tell(f"a batch of {NUM_SLOTS} at {size}", batches, "ms")}
        found[size]["first_answer_ms"] = tell(f"first answer at {size}, idle pool", first, "ms")
    cold: Runs = {side: [] for side in args.sides}
    for side in turns(args):
        cold[side].append(measure_cold_start(side))
    found["cold_first_answer_s"] = tell("first answer of the demo model, from nothing", cold, "s")
    with tempfile.TemporaryDirectory(prefix="moonreel-") as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for size in args.sizes:
            clip = make_clip(folder, "h264", SIZES_PX[size][1], args.seconds)
            rates, app, decoders = measure_jobs(clip, Path(temporary), args)
            found[size]["frames_per_second"] = tell(f"frames/s of jobs at {size}, {args.fps:g} fps", rates, "/s")
            found[size]["app_cpu_ms"] = tell("  processor time a frame, the app", app, "ms")
            found[size]["decoders_cpu_ms"] = tell("  processor time a frame, its decoders", decoders, "ms")
    return {**found, "load_after": os.getloadavg()[0]}


def turns(args: argparse.Namespace) -> list[str]:
    """The sides, again and again."""
    return [side for _ in range(args.repeats) for side in args.sides]


def tell(what: str, runs: Runs, unit: str) -> dict[str, float]:
    """Print the medians. -> them"""
    medians = {side: round(statistics.median(values), 3) for side, values in runs.items()}
    for side, median in medians.items():
        show(f"{what}: {side}", f"{median:.1f} {unit}", beside=f"{min(runs[side]):.1f} to {max(runs[side]):.1f}")
    return medians


@contextmanager
def free_pool(side: str, num_workers: int) -> Iterator[Pool]:
    """All of its engines are there, and cost nothing."""
    if side == "threads":
        pool = Pool(cast(Any, FreeEngine), num_workers)
    else:
        cluster = Cluster(Wanted("free"), gpus_per_instance=0, is_jpeg=side == "ray-jpeg", host=FreeHost)
        pool = Pool(cluster.make_engine, num_workers, num_needed=num_workers, on_close=cluster.close)
    with closing(pool):
        yield pool


def describe(pool: Pool, frames: Sequence[Frame]) -> None:
    """Raises NotMeasured if a frame has no answer."""
    with pool.lane() as lane:
        for result in describe_frames(frames, lane, QUERY, RunStats()):
            if result.status == "error":
                raise NotMeasured(result.error_message)


def measure_batches(size: str, args: argparse.Namespace) -> tuple[Runs, Runs]:
    """-> of each side, ms a batch and ms until a job's first answer"""
    batches, first = ({side: [] for side in args.sides} for _ in range(2))
    rng = np.random.default_rng(0)
    images = [draw_scene(random_scene(rng), rng, size_px=SIZES_PX[size]).astype(np.uint8) for _ in range(NUM_IMAGES)]
    frames = [Frame(index, index, images[index % NUM_IMAGES]) for index in range(NUM_SLOTS * args.batches)]
    for side in turns(args):
        with free_pool(side, args.workers) as pool:
            describe(pool, frames[: 2 * NUM_SLOTS * args.workers])  # warm up
            begun_s = time.perf_counter()
            describe(pool, frames)
            batches[side].append(1000 * (time.perf_counter() - begun_s) / args.batches)
            for frame in frames[:NUM_FIRST]:
                begun_s = time.perf_counter()
                describe(pool, [frame])
                first[side].append(1000 * (time.perf_counter() - begun_s))
    return batches, first


# From nothing


def measure_cold_start(side: str) -> float:
    """Seconds until the demo model has answered. Of threads: with the start of their process; of actors: with that of
    theirs, but with the connection that is there. Raises CalledProcessError."""
    if side == "threads":
        begun_s = time.time()
        return (
            float(subprocess.check_output([sys.executable, "-m", "benchmark.cluster", "--child"], cwd=ROOT)) - begun_s
        )

    def make_pool() -> Pool:
        wanted = Wanted("demo", device="cpu", slots=NUM_SLOTS)
        cluster = Cluster(wanted, gpus_per_instance=0, is_jpeg=side == "ray-jpeg", host=EngineHost)
        return Pool(cluster.make_engine, 1, num_needed=1, on_close=cluster.close)

    return first_answer_s(make_pool)


def pool_here_with_demo() -> Pool:
    from pipeline.moondream.checkpoint import load_checkpoint
    from pipeline.moondream.engine import Engine

    checkpoint = load_checkpoint("demo", device="cpu")
    return Pool(lambda: Engine(checkpoint, NUM_SLOTS))


def first_answer_s(make_pool: Callable[[], Pool]) -> float:
    begun_s = time.perf_counter()
    with closing(make_pool()) as pool:
        describe(pool, [Frame(0, 0, np.zeros((720, 1280, 3), np.uint8))])
        return time.perf_counter() - begun_s


# Whole jobs


def measure_jobs(clip: Path, folder: Path, args: argparse.Namespace) -> tuple[Runs, Runs, Runs]:
    """-> of each side, frames per second, and ms of processor time that a frame takes of the app and of its decoders"""
    rates, app, decoders = ({side: [] for side in args.sides} for _ in range(3))
    for number, side in enumerate(turns(args)):
        data_dir = folder / f"data-{clip.stem}-{side}-{number}"
        with free_pool(side, args.workers) as pool, closing(JobStore(data_dir)) as store:
            job_ids = [submit(store, clip, args.fps) for _ in range(args.jobs)]
            worker = Worker(store, pool, MODEL, RunOptions(), max_running_jobs=args.jobs)
            begun_s, *before_s = time.perf_counter(), *cpu_s()
            worker.start()
            try:
                wait_for(store, job_ids)
                wall_s, *after_s = time.perf_counter() - begun_s, *cpu_s()
            finally:
                worker.stop()
            num_frames = sum(num_results(store, job_id) for job_id in job_ids)
        shutil.rmtree(data_dir)
        rates[side].append(num_frames / wall_s)
        for found, before, after in zip((app, decoders), before_s, after_s, strict=True):
            found[side].append(1000 * (after - before) / num_frames)
    return rates, app, decoders


def submit(store: JobStore, clip: Path, fps: float) -> str:
    arrived = Path(shutil.copy(clip, store.files.incoming / clip.name))
    asked = {"video_url": f"{UPLOAD}{clip.name}", "target_fps": fps, "reuse_similar": 0, "max_tokens": QUERY.max_tokens}
    return store.add(JobRequest.model_validate(asked).model_dump(), "local", Upload(arrived, "mp4"))


def wait_for(store: JobStore, job_ids: list[str]) -> None:
    ends_s = time.monotonic() + TIMEOUT_S
    while {store.get(job_id)["status"] for job_id in job_ids} != {"completed"}:
        jobs = [store.get(job_id) for job_id in job_ids]
        failed = next((job for job in jobs if job["status"] == "failed"), None)
        if failed or time.monotonic() > ends_s:
            raise NotMeasured(failed["error_message"] if failed else f"The jobs take more than {TIMEOUT_S:g} s.")
        time.sleep(0.01)


def num_results(store: JobStore, job_id: str) -> int:
    with store.frames(job_id) as frames:
        return len(frames.results())


def cpu_s() -> tuple[float, float]:
    """Of this process, and of those that it has waited for, as it has for each decoder of a job that is done; the
    cluster's processes run still, and are not in it."""
    usages = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    own, children = (usage.ru_utime + usage.ru_stime for usage in usages)
    return own, children


if __name__ == "__main__":
    sys.exit(main())
