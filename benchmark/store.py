"""Measure what a long history costs: `python -m benchmark.store`.

Four questions. Does storing a frame's result get slower while a job gets longer? How long do requests take beside
10,000 finished jobs? How long does a server take to start with them, and how much memory do they need?

The jobs are written as the worker leaves them: a record (two journal lines each, the most that compaction lets be), a
folder, 25 frame results. Half belong to the caller who asks, the others to an owner each, as programs without cookies
leave them. The servers are processes of their own that serve the API alone, as the page's library takes seconds to
import, and whose model is a folder that does not exist: submitted jobs are stored, and wait, while no worker touches
them. The clients are processes too, each with one connection kept alive, and
ask the next thing once they have the answer: with several of them the server is never idle, so the times include the
wait for the others' turns. The last line is a JSON object. Not measured: files that are not in the system's cache, and
jobs that run meanwhile. Test: pytest tests/test_benchmark_store.py
"""

import argparse
import http.client
import json
import multiprocessing
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any

from benchmark.hardware import cpu_name, num_cores
from benchmark.server import TIMEOUT_S, Server, ask_once, cpu_time_s, rss_bytes, serving
from benchmark.table import show
from jobs.frame_store import FrameStore
from jobs.job_store import JobStore
from jobs.journal import Change, encode
from jobs.record import Record, new_record
from jobs.schema import JobRequest
from pipeline.results import FrameResult

OWNER, KEY = "key:bench", "bench:0123456789abcdef"
FRAMES_PER_JOB, FRAMES_PER_BATCH = 25, 8
NO_MODEL = "/nowhere"
SETTINGS = {"model": NO_MODEL, "page": False, "host": "127.0.0.1", "api_keys": KEY, "rate_limit_per_minute": 10**6}
SETTINGS |= {"max_queued_jobs": 10**6, "max_queued_jobs_per_caller": 10**6}
DESCRIPTION = "A person in a red jacket walks along a wet street at night, past a row of parked cars. " * 2
PATHS = {
    "health": "/api/health",  # what a request takes at least
    "status": "/api/status/{job_id}",
    "status, no results": "/api/status/{job_id}?include_results=false",
    "list": "/api/jobs/list?limit=50",
    "list, 1 in 10": "/api/jobs/list?limit=50&status_filter=failed",
    "list, 1 in 1,000": "/api/jobs/list?limit=50&status_filter=canceled",
    "list, deep": "/api/jobs/list?limit=50&cursor={cursor}",  # among the oldest twentieth
    "submit": "/api/submit",
}
MIXED = ("status",) * 5 + ("list", "list, 1 in 10", "list, 1 in 1,000", "list, deep", "submit")
MAX_APPEND_RATIO, MAX_STATUS_P99_MS, MAX_START_S = 1.2, 20.0, 2.0
MB = 1e6

Figures = dict[str, dict[str, float]]
Asked = tuple[str, str]  # a kind, and its path


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmark.store", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", type=int, default=10_000, help="finished jobs (default: %(default)s)")
    parser.add_argument("--frames", type=int, default=20_000, help="frames of the long job (default: %(default)s)")
    parser.add_argument("--appends", type=int, default=500, help="appends of each kind (default: %(default)s)")
    parser.add_argument("--requests", type=int, default=2000, help="requests of each kind (default: %(default)s)")
    parser.add_argument("--clients", type=int, default=4, help="clients at a time (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="starts of each server (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="work in a temporary folder in this one (default: the system's)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse_arguments(arguments)
    with tempfile.TemporaryDirectory(prefix="moonreel-", dir=args.folder) as temporary:
        folder = Path(temporary)
        print(f"in {folder}, on {filesystem(folder)}", flush=True)
        hardware = {"cpu": cpu_name(), "num_cores": num_cores(), "filesystem": filesystem(folder)}
        hardware |= {"python": platform.python_version(), "load_before": os.getloadavg()[0]}
        options = {name: value for name, value in vars(args).items() if name != "folder"}
        appends = measure_appends(folder, args.frames, args.appends)
        job_ids = write_history(folder / "full", args.jobs)
        starts = measure_starts(folder, args.repeats)
        requests = measure_requests(folder / "full", job_ids, args.clients, args.requests)
    hardware["load_after"] = os.getloadavg()[0]
    found = {"appends": appends, "starts": starts, "requests": requests}
    print(json.dumps({"hardware": hardware, "options": options, **found}))
    return 0


# A job that gets longer


def measure_appends(folder: Path, num_frames: int, num_appends: int) -> Figures:
    """Append to a new store and to one that holds num_frames, in turns. -> by batch size, what an append takes in ms:
    medians, the p99s, the CPU time in it, and the medians' ratio."""
    found = {}
    for batch_size in (1, FRAMES_PER_BATCH):
        short, long = (FrameStore(folder / f"{name}-{batch_size}.jsonl") for name in ("short", "long"))
        with closing(short), closing(long):
            for first in range(0, num_frames, FRAMES_PER_BATCH):
                long.append(frames("job", first, min(FRAMES_PER_BATCH, num_frames - first)))
            spent: dict[str, list[float]] = defaultdict(list)
            for turn in range(num_appends):
                new = frames("job", num_frames + turn * batch_size, batch_size)
                stores = [("short", short), ("long", long)]
                for name, store in stores if turn % 2 else reversed(stores):
                    wall_s, cpu_s = time.perf_counter(), time.thread_time()
                    store.append(new)
                    spent[f"{name}_cpu_ms"].append(1000 * (time.thread_time() - cpu_s))
                    spent[f"{name}_ms"].append(1000 * (time.perf_counter() - wall_s))
        row = {name: round(statistics.median(values), 4) for name, values in spent.items()}
        row |= {f"{name}_p99_ms": round(percentile(spent[f"{name}_ms"], 0.99), 3) for name in ("short", "long")}
        row["ratio"] = round(row["long_ms"] / row["short_ms"], 3)
        found[str(batch_size)] = row
        what = f"append {batch_size} at {num_frames:,} frames / at the start"
        beside = f"{row['short_ms']:.2f} -> {row['long_ms']:.2f} ms, CPU {row['short_cpu_ms']} -> {row['long_cpu_ms']}"
        show(what, f"{row['ratio']:.2f}", f"<= {MAX_APPEND_RATIO}", row["ratio"] <= MAX_APPEND_RATIO, beside)
    return found


def frames(job_id: str, first_idx: int, num_frames: int) -> list[dict[str, Any]]:
    """Results of about 500 bytes."""
    return [
        FrameResult(index, 40 * index, DESCRIPTION, "success", None, 81.25, 412.5, 493.75, 48, "stop").to_json(job_id)
        for index in range(first_idx, first_idx + num_frames)
    ]


# A server with a long history


def write_history(folder: Path, num_jobs: int) -> list[str]:
    """Fill a data directory with finished jobs, 1 in 10 failed and 1 in 1,000 canceled. -> the ids of the caller's"""
    own_ids = []
    (folder / "jobs").mkdir(parents=True)
    with (folder / "jobs.jsonl").open("wb") as journal:
        for number in range(1, num_jobs + 1):
            job_id = f"job_{number:08x}-ceea-467f-9b1d-3a2c1f0e7d55"
            owner = OWNER if number % 2 else f"visitor:{number:032x}"
            asked = {"video_url": f"https://example.com/holiday-{number}.mp4", "metadata": {"album": number}}
            request = JobRequest.model_validate(asked).model_dump()
            submitted = new_record(job_id, number, owner, request, time.time() - 10 * (num_jobs - number + 1))
            for version in (submitted, {**submitted, **how_it_ended(submitted)}):
                journal.write(encode(Change("jobs", {job_id: version})))
            (folder / "jobs" / job_id / "frames").mkdir(parents=True)
            with (folder / "jobs" / job_id / "frames.jsonl").open("wb") as file:
                for first in range(0, FRAMES_PER_JOB, FRAMES_PER_BATCH):
                    batch = frames(job_id, first, min(FRAMES_PER_BATCH, FRAMES_PER_JOB - first))
                    numbered = {str(frame["frame_idx"]): {**frame, "seq": frame["frame_idx"] + 1} for frame in batch}
                    file.write(encode(Change("frames", numbered)))
            own_ids += [job_id] if owner == OWNER else []
    size_mb = (folder / "jobs.jsonl").stat().st_size / MB
    print(f"{num_jobs:,} jobs with {FRAMES_PER_JOB} frames each, jobs.jsonl {size_mb:.1f} MB", flush=True)
    return own_ids


def how_it_ended(record: Record) -> dict[str, Any]:
    """What the worker adds to a record."""
    number, begun_at = record["number"], record["submitted_at"] + 1
    status = "canceled" if number % 1000 == 1 else "failed" if number % 10 == 5 else "completed"
    fields: dict[str, Any] = {"status": status, f"{status}_at": begun_at + 7, "processing_started_at": begun_at}
    fields |= {"container": "mp4", "duration_s": 25.0, "average_fps": 30.0, "stored_bytes": 1_000_000}
    fields |= {"timings": {"video_download": 0.8, "frame_extraction": 0.3, "overall_pipeline_internal": 7.0}}
    fields |= {"model": {"id": "demo", "revision": None, "device": "cpu", "dtype": "float32"}}
    fields |= dict.fromkeys(("num_frames", "num_frames_expected", "last_seq"), FRAMES_PER_JOB)
    if status == "failed":
        fields |= {"error_code": "download_failed", "error_message": "The video could not be downloaded."}
    return fields


def settle(server: Server) -> None:
    """Wait until it has tried to load its model: importing torch takes memory, and time from the requests."""
    ends_at_s = time.monotonic() + TIMEOUT_S
    while b"is being loaded" in ask_once(server.port, "/api/ready")[1]:
        assert time.monotonic() < ends_at_s, "the server does not get done with its model"
        time.sleep(0.1)


def measure_starts(folder: Path, repeats: int) -> dict[str, float]:
    """Start servers with and without the history, in turns; -> medians of seconds and MB."""
    spent: dict[str, list[float]] = defaultdict(list)
    for _ in range(repeats):
        for name in ("empty", "full"):
            with serving(folder / name, **SETTINGS) as server:
                spent[f"{name}_start_cpu_s"].append(cpu_time_s(server.pid))
                settle(server)
                spent[f"{name}_start_s"].append(server.start_s)
                spent[f"{name}_rss_mb"].append(rss_bytes(server.pid) / MB)
        started_s = time.perf_counter()
        with closing(JobStore(folder / "full")) as store:
            spent["open_s"].append(time.perf_counter() - started_s)
            store.recover()
            spent["open_and_recover_s"].append(time.perf_counter() - started_s)
    found = {name: round(statistics.median(values), 3) for name, values in spent.items()}
    found["slowest_full_start_s"] = round(max(spent["full_start_s"]), 3)
    found["added_mb"] = round(found["full_rss_mb"] - found["empty_rss_mb"], 1)
    start_s = found["full_start_s"]
    beside = f"without history {found['empty_start_s']:.2f}, slowest {found['slowest_full_start_s']:.2f}"
    show("start to /api/health", f"{start_s:.2f} s", f"< {MAX_START_S:g} s", start_s < MAX_START_S, beside)
    show("of that the store", f"{found['open_and_recover_s']:.2f} s", beside=f"opening {found['open_s']:.2f}")
    beside = f"{found['empty_rss_mb']:.0f} -> {found['full_rss_mb']:.0f} MB, torch included"
    show("memory for the history", f"{found['added_mb']:.1f} MB", beside=beside)
    return found


# Requests


def measure_requests(data_dir: Path, job_ids: Sequence[str], num_clients: int, num_requests: int) -> Figures:
    """Ask for each kind alone, then for a mix. -> by kind, what a request takes, in ms"""
    found: Figures = {}
    with serving(data_dir, **SETTINGS) as server, multiprocessing.get_context("spawn").Pool(num_clients) as clients:
        settle(server)
        ask = partial(ask_together, clients, num_clients, server, job_ids)
        ask(MIXED, num_requests // 4)  # warm up
        for kind in PATHS:
            found |= ask([kind], num_requests)
        found |= {f"{kind} (mixed)": row for kind, row in ask(MIXED, num_requests).items()}
    for kind, row in found.items():
        is_met = row["p99_ms"] < MAX_STATUS_P99_MS if kind in ("status", "status (mixed)") else None
        required = "" if is_met is None else f"< {MAX_STATUS_P99_MS:g} ms"
        cpu = (
            "" if "mixed" in kind else f"; CPU of server {row['server_cpu_ms']:.2f}, client {row['client_cpu_ms']:.2f}"
        )
        beside = f"p50 {row['p50_ms']:.1f} ms, max {row['max_ms']:.0f}{cpu}"
        show(f"{kind}, p99", f"{row['p99_ms']:.1f} ms", required, is_met, beside)
    return found


def ask_together(
    clients: Pool, num_clients: int, server: Server, job_ids: Sequence[str], kinds: Sequence[str], num_requests: int
) -> Figures:
    """Let all clients ask at the same time. The CPU times and the rate are those of all kinds together."""
    start_at_s = time.monotonic() + 0.3
    shares = [num_requests // num_clients + (number < num_requests % num_clients) for number in range(num_clients)]
    rng = random.Random(0)
    drawn = [[draw_request(rng, job_ids, kinds) for _ in range(share)] for share in shares]
    cpu_before_s = cpu_time_s(server.pid)
    answers = clients.starmap(ask_in_turn, [(server.port, start_at_s, requests) for requests in drawn], chunksize=1)
    server_cpu_s = cpu_time_s(server.pid) - cpu_before_s
    spent: dict[str, list[float]] = defaultdict(list)
    for kind, time_ms in (timed for answer in answers for timed in answer[0]):
        spent[kind].append(time_ms)
    common = {"requests_per_s": num_requests / max(wall_s for _, wall_s, _ in answers)}
    common["server_cpu_ms"] = 1000 * server_cpu_s / num_requests  # per request, the kernel's part included
    common["client_cpu_ms"] = 1000 * sum(cpu_s for _, _, cpu_s in answers) / num_requests
    found = {}
    for kind, times_ms in sorted(spent.items()):
        times = {"p50_ms": percentile(times_ms, 0.5), "p99_ms": percentile(times_ms, 0.99), "max_ms": max(times_ms)}
        found[kind] = {name: round(value, 2) for name, value in {"num": len(times_ms), **times, **common}.items()}
    return found


def draw_request(rng: random.Random, job_ids: Sequence[str], kinds: Sequence[str]) -> Asked:
    kind = rng.choice(kinds)
    return kind, PATHS[kind].format(job_id=rng.choice(job_ids), cursor=len(job_ids) // 10)


def ask_in_turn(port: int, start_at_s: float, requests: list[Asked]) -> tuple[list[tuple[str, float]], float, float]:
    """One client, in its own process. -> what each request took in ms; wall and CPU seconds of all"""
    headers = {"Authorization": "Bearer " + KEY.partition(":")[2], "Content-Type": "application/json"}
    body, times = json.dumps({"video_url": "https://example.com/holiday.mp4", "metadata": {"album": 7}}), []
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
        connection.connect()
        time.sleep(max(0.0, start_at_s - time.monotonic()))
        first_s, cpu_s = time.perf_counter(), time.process_time()
        for kind, path in requests:
            asked_s = time.perf_counter()
            connection.request(*(("POST", path, body) if kind == "submit" else ("GET", path, None)), headers)
            answer = connection.getresponse()
            content = answer.read()
            times.append((kind, 1000 * (time.perf_counter() - asked_s)))
            assert answer.status < 300, f"{path}: {answer.status} {content[:500]!r}"
        return times, time.perf_counter() - first_s, time.process_time() - cpu_s


# Telling


def percentile(values: Sequence[float], share: float) -> float:
    """The value that this share of the values does not exceed."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def filesystem(folder: Path) -> str:
    """Where fsync goes: a tmpfs has none."""
    mounts = [line.split()[:3] for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines()]
    above = [(len(point), kind, device) for device, point, kind in mounts if folder.resolve().is_relative_to(point)]
    _, kind, device = max(above)
    return f"{kind} on {device}"


if __name__ == "__main__":
    sys.exit(main())
