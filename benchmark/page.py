"""Measure the page: `python -m benchmark.page`.

Three questions. How long does the app take to start with the demo model, until it answers with the page and until it is
ready to describe? How does a browser get on with a completed job of 5,000 frames (see long_job.py): until its rows,
tiles and video are there and all frames are known; while list and strip are scrolled from end to end in 3 s; in a
search that half of the frames match? What does it cost the server when three pages watch a job while it runs?

The browser is headless Chromium without a GPU, a fresh profile for each run, on the machine of the server: it draws
with the same cores. A frame's time is that between two callbacks of requestAnimationFrame. The live jobs describe the
sample video; those with and those without viewers take turns. The viewers' pages are loaded before the job is
submitted, and open it by its address. Their server's model has one thread: two would wait for each other without
rest, and count what else the machine does. The last line is a JSON object; figures are medians of the runs, worst
frames the worst of all. Needs tests/requirements.txt, and chromium. Test: pytest tests/test_benchmark_page.py
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from playwright.sync_api import APIRequestContext, Browser, Page, sync_playwright

from benchmark.hardware import cpu_name, num_cores
from benchmark.long_job import SOUGHT, write_long_job
from benchmark.server import ROOT, Server, ask_once, cpu_time_s, serving
from benchmark.table import show

SETTINGS = {
    "model": "demo",
    "page": True,
    "host": "127.0.0.1",
    "rate_limit_per_minute": 10**6,
    "answer_cache_bytes": 0,  # else only the first of the live jobs would be described
}
SAMPLE, SAMPLE_S = ROOT / "pipeline" / "demo" / "sample.mp4", 25
CHROMIUM_ARGS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
VIEWPORT = {"width": 1280, "height": 900}
PAUSE_S, TIMEOUT_S = 0.1, 300.0
MAX_USABLE_S, MIN_FPS = 2.0, 50.0
SCROLLED = {"list": (".mr-list-box", "Top", "Height"), "strip": (".mr-strip-box", "Left", "Width")}
# Milliseconds since the address was asked for, once all is there; else false.
USABLE = """num => {
  const [row, tile] = ['.mr-rows li', '.mr-tiles li'].map((item) => document.querySelector(item));
  const isThere = (item) => Number(item?.ariaSetSize) === num && item.getClientRects().length > 0;
  const isShown = tile?.querySelector('img')?.naturalWidth > 0;
  const isPlayable = document.querySelector('video.mr-video')?.readyState >= 1;
  return isThere(row) && isThere(tile) && isShown && isPlayable && performance.now();
}"""
# Milliseconds between frames, and the place of the last item that is in the document at the end.
SCROLL = """async ([selector, side, length, ms]) => {
  const box = document.querySelector(selector);
  const times = [];
  await new Promise((done) => {
    const step = (now) => {
      times.push(now);
      const share = Math.min(1, (now - times[0]) / ms);
      box[`scroll${side}`] = share * (box[`scroll${length}`] - box[`client${length}`]);
      window.requestAnimationFrame(share < 1 ? step : done);
    };
    window.requestAnimationFrame(step);
  });
  const gaps = times.slice(1).map((time, at) => time - times[at]);
  return [gaps, Math.max(...[...box.querySelectorAll('li')].map((item) => Number(item.ariaPosInSet)))];
}"""
# Milliseconds from the typing until the count is painted.
SEARCH = """async ([text, num]) => {
  const field = document.querySelector('.mr-search input');
  const isCounted = () => Number(document.querySelector('.mr-matches').textContent.replace(/\\D/g, '')) === num;
  const begun = performance.now();
  field.value = text;
  field.dispatchEvent(new Event('input', { bubbles: true }));
  while (!isCounted()) await new Promise((done) => window.requestAnimationFrame(done));
  await new Promise((done) => window.requestAnimationFrame(() => window.setTimeout(done)));
  return performance.now() - begun;
}"""
OPEN_JOB = """job => {
  window.history.pushState({}, '', `?job=${job}`);
  window.dispatchEvent(new PopStateEvent('popstate'));
}"""
FRAMES_KNOWN = "num => Number(document.querySelector('.mr-tiles li')?.ariaSetSize) === num"

Figures = dict[str, float]


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmark.page", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--frames", type=int, default=5000, help="frames of the long job (default: %(default)s)")
    parser.add_argument("--live-frames", type=int, default=600, help="frames of a live job (default: %(default)s)")
    parser.add_argument("--viewers", type=int, default=3, help="pages that watch it (default: %(default)s)")
    parser.add_argument("--scroll-s", type=float, default=3.0, help="from end to end (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each kind (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="work in a temporary folder in this one (default: the system's)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse_arguments(arguments)
    path = shutil.which("chromium")
    if path is None:
        print("error: This needs a browser: apt-get install chromium (see README.md).", file=sys.stderr)
        return 2
    hardware = {"cpu": cpu_name(), "num_cores": num_cores(), "python": platform.python_version()}
    hardware["load_before"] = os.getloadavg()[0]
    options = {name: value for name, value in vars(args).items() if name != "folder"}
    with tempfile.TemporaryDirectory(prefix="moonreel-", dir=args.folder) as temporary, sync_playwright() as playwright:
        folder = Path(temporary)
        found = {"start": measure_starts(folder, args.repeats)}
        job_id = write_long_job(folder / "data", args.frames)
        browser = playwright.chromium.launch(executable_path=path, args=CHROMIUM_ARGS)
        hardware["chromium"] = browser.version
        with serving(folder / "data", "/api/ready", num_threads=1, **SETTINGS) as server:
            found["long_job"] = measure_long_job(browser, f"{server.url}/?job={job_id}", args)
            api = playwright.request.new_context(base_url=server.url)
            found["watching"] = measure_watching(browser, api, server, args)
        browser.close()
    hardware["load_after"] = os.getloadavg()[0]
    print(json.dumps({"hardware": hardware, "options": options, **found}))
    return 0


def measure_starts(folder: Path, repeats: int) -> Figures:
    """-> seconds from the start of the process to the first answer, and to readiness"""
    spent: dict[str, list[float]] = defaultdict(list)
    for _ in range(repeats):
        with serving(folder / "start", "/", **SETTINGS) as server:
            spent["page_s"].append(server.start_s)
            while ask_once(server.port, "/api/ready")[0] != 200:
                assert time.perf_counter() < server.begun_s + TIMEOUT_S, "the server does not get ready"
                time.sleep(PAUSE_S)
            spent["ready_s"].append(time.perf_counter() - server.begun_s)
    found = medians(spent)
    show("start until the page is answered", f"{found['page_s']:.1f} s")
    show("start until it is ready to describe", f"{found['ready_s']:.1f} s")
    return found


# A completed job of many frames


def measure_long_job(browser: Browser, url: str, args: argparse.Namespace) -> Figures:
    spent: dict[str, list[float]] = defaultdict(list)
    for _ in range(args.repeats):
        for name, value in look_at(browser, url, args.frames, args.scroll_s).items():
            spent[name].append(value)
    found = medians(spent) | {name: max(values) for name, values in spent.items() if "worst" in name}
    what = f"{args.frames:,} frames"
    usable_s = found["usable_ms"] / 1000
    show(f"{what}: usable after", f"{usable_s:.2f} s", f"< {MAX_USABLE_S:g} s", usable_s < MAX_USABLE_S)
    show(f"{what}: elements in the document", f"{found['num_elements']:,.0f}")
    show(f"{what}: JavaScript heap", f"{found['heap_mb']:.1f} MB")
    for name in SCROLLED:
        fps, beside = found[f"{name}_fps"], f"worst frame {found[f'{name}_worst_ms']:.0f} ms"
        show(
            f"{what}: {name} scrolled in {args.scroll_s:g} s",
            f"{fps:.0f} fps",
            f">= {MIN_FPS:g}",
            fps >= MIN_FPS,
            beside,
        )
    show(f"{what}: search that half match", f"{found['search_ms']:.0f} ms")
    return found


def look_at(browser: Browser, url: str, num_frames: int, scroll_s: float) -> Figures:
    """Open a job in a fresh profile, scroll and search it."""
    page = browser.new_page(viewport=VIEWPORT)  # pyright: ignore[reportArgumentType]
    page.set_default_timeout(1000 * TIMEOUT_S)
    page.goto(url, wait_until="commit")
    found = {"usable_ms": page.wait_for_function(USABLE, arg=num_frames).json_value()}
    page.evaluate("() => new Promise((done) => window.requestIdleCallback(done))")
    found["num_elements"] = page.evaluate("document.querySelectorAll('*').length")
    found["heap_mb"] = heap_bytes(page) / 1e6
    for name, where in SCROLLED.items():
        gaps_ms, last = page.evaluate(SCROLL, [*where, 1000 * scroll_s])
        assert last == num_frames, f"the {name} ends with item {last} of {num_frames}"
        found |= {f"{name}_fps": 1000 / statistics.fmean(gaps_ms), f"{name}_worst_ms": max(gaps_ms)}
    found["search_ms"] = page.evaluate(SEARCH, [SOUGHT, num_frames // 2])
    page.context.close()
    return found


def heap_bytes(page: Page) -> float:
    """What is in use after the garbage is gone."""
    devtools = page.context.new_cdp_session(page)
    devtools.send("HeapProfiler.collectGarbage")
    devtools.send("Performance.enable")
    metrics = {metric["name"]: metric["value"] for metric in devtools.send("Performance.getMetrics")["metrics"]}
    devtools.detach()
    return metrics["JSHeapUsedSize"]


# A job that runs


def measure_watching(browser: Browser, api: APIRequestContext, server: Server, args: argparse.Namespace) -> Figures:
    spent: dict[str, list[float]] = defaultdict(list)
    describe_watched(browser, api, server, SAMPLE_S, 0)  # warm up
    for _ in range(args.repeats):
        for name, num_viewers in (("unwatched", 0), ("watched", args.viewers)):
            cpu_s, wall_s = describe_watched(browser, api, server, args.live_frames, num_viewers)
            spent[f"{name}_cpu_s"].append(cpu_s)
            spent[f"{name}_wall_s"].append(wall_s)
    found = medians(spent)
    for name, num_viewers in (("unwatched", 0), ("watched", args.viewers)):
        what, beside = f"{args.live_frames} live frames, {num_viewers} viewers", f"in {found[f'{name}_wall_s']:.1f} s"
        show(f"{what}: CPU of the server", f"{found[f'{name}_cpu_s']:.2f} s", beside=beside)
    found["added_cpu_s"] = round(found["watched_cpu_s"] - found["unwatched_cpu_s"], 3)
    show("the viewers add", f"{found['added_cpu_s']:.2f} s")
    return found


def describe_watched(
    browser: Browser, api: APIRequestContext, server: Server, num_frames: int, num_viewers: int
) -> tuple[float, float]:
    """Describe so many frames of the sample video. -> CPU seconds of the server until the viewers know all frames, and
    wall seconds until the job is completed"""
    pages = [browser.new_page(viewport=VIEWPORT) for _ in range(num_viewers)]  # pyright: ignore[reportArgumentType]
    for page in pages:
        page.set_default_timeout(1000 * TIMEOUT_S)
        page.goto(server.url)
        page.wait_for_selector(".mr-form")
    cpu_before_s, begun_s = cpu_time_s(server.pid), time.perf_counter()
    video: Any = {"name": "sample.mp4", "mimeType": "video/mp4", "buffer": SAMPLE.read_bytes()}
    answer = api.post("/api/upload", multipart={"target_fps": num_frames / SAMPLE_S, "reuse_similar": 0, "file": video})
    job_id = answer.json()["job_id"]
    for page in pages:
        page.evaluate(OPEN_JOB, job_id)
    while (job := api.get(f"/api/status/{job_id}?include_results=false").json())["status"] != "completed":
        assert not job["error_message"] and time.perf_counter() < begun_s + TIMEOUT_S, job
        time.sleep(PAUSE_S)
    wall_s = time.perf_counter() - begun_s
    for page in pages:
        page.wait_for_function(FRAMES_KNOWN, arg=job["frames_processed"])
    cpu_s = cpu_time_s(server.pid) - cpu_before_s
    for page in pages:
        page.context.close()
    return cpu_s, wall_s


def medians(spent: dict[str, list[float]]) -> Figures:
    return {name: round(statistics.median(values), 3) for name, values in spent.items()}


if __name__ == "__main__":
    sys.exit(main())
