"""Take the README's pictures of the page: `python -m tests.screenshots`.

Starts the app with the demo model, describes the sample video from the page, and writes to tests/screenshots: light.png
and dark.png (1280 px wide) and phone.png (390 px) with the completed job in the middle of the video, and jobs.png with
the history. What would differ each time is held still: motion is reduced, and the times of submission are made up.
Needs Debian's package chromium. Look at the pictures afterwards.
"""

import argparse
import io
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Browser, Page, Route, expect, sync_playwright

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # as pytest does

from serving import SAMPLE, ServerProcess, wait_until  # noqa: E402

CHROMIUM_ARGS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
DESK: dict[str, Any] = {"viewport": {"width": 1280, "height": 800}}
PHONE: dict[str, Any] = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}
FPS, MOMENT_S = 2, 16.5  # the moment: the orange star wanders
SUBMITTED_AT, APART_S = 1767261600, 5400  # 1 January 2026, 10:00 UTC; between two jobs
OTHERS: tuple[dict[str, Any], ...] = (
    {"target_fps": 1, "question": "How many objects are there?"},
    {"target_fps": 0.5, "question": "What colour is the star?", "start_s": 5, "end_s": 17},
    {"target_fps": 1, "question": "Is there a red circle? Answer yes or no."},
)
NO_VIDEO = "https://nowhere.example/holiday.mp4"  # there is no such host: a job that fails
STILL_S = 0.7  # a player takes its sign of loading away at the end of a turn
SETTLED = "(({seeking, readyState}) => !seeking && readyState === 4)(document.querySelector('video.mr-video'))"
MAX_COLORS, MAX_BYTES = 256, 250_000
WAIT_MS = 120_000


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.screenshots", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?", default=ROOT / "tests" / "screenshots")
    folder = parser.parse_args(arguments).folder
    folder.mkdir(parents=True, exist_ok=True)
    expect.set_options(timeout=WAIT_MS)
    with tempfile.TemporaryDirectory() as temporary, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=CHROMIUM_ARGS)
        with ServerProcess(Path(temporary) / "data", page=True).start() as server:
            add_others(server)
            job_id = describe_sample(visit(browser, server.url, DESK))
            for name, options, theme in (("light", DESK, "light"), ("dark", DESK, "dark"), ("phone", PHONE, "light")):
                page = visit(browser, f"{server.url}/?__theme={theme}&job={job_id}", options)
                go_to_moment(page)
                save(page, folder / f"{name}.png", full_page=options is DESK)
            page = visit(browser, f"{server.url}/?__theme=light", DESK)
            show_jobs(page)
            save(page, folder / "jobs.png", full_page=True)
        browser.close()
    return 0


def visit(browser: Browser, url: str, options: dict[str, Any]) -> Page:
    page = browser.new_page(locale="en-GB", timezone_id="UTC", reduced_motion="reduce", **options)
    page.set_default_timeout(WAIT_MS)
    page.route("**/api/jobs/list?*", date)
    page.goto(url)
    expect(page.locator("[data-view]").first).to_be_attached()
    return page


def date(route: Route) -> None:
    """Make up when the listed jobs were submitted."""
    answer = route.fetch()
    document = answer.json()
    for number, job in enumerate(document["jobs"]):
        job["submitted_at"] = SUBMITTED_AT - number * APART_S
    route.fulfill(response=answer, json=document)


def add_others(server: ServerProcess) -> None:
    """The jobs that stand in the history beside the one that is shown; wait for their ends."""
    with server.client() as client:
        client.post("/api/submit", json={"video_url": NO_VIDEO}).raise_for_status()
        for fields in OTHERS:
            files = {"file": ("sample.mp4", SAMPLE.read_bytes())}
            client.post("/api/upload", data=fields, files=files).raise_for_status()
        ended = {"completed", "failed"}
        wait_until(lambda: {job["status"] for job in client.get("/api/jobs/list").json()["jobs"]} == ended)


def describe_sample(page: Page) -> str:
    """Give the form the sample video, and wait until it is described. -> the job's id"""
    page.locator("input[type=file]").set_input_files(SAMPLE)
    page.locator("#mr-target_fps").fill(str(FPS))
    page.locator(".mr-describe").click()
    expect(page.locator(".mr-bar")).to_have_attribute("data-status", "completed")
    return page.url.partition("job=")[2].partition("&")[0]


def go_to_moment(page: Page) -> None:
    """Show the video, the list and the strip at MOMENT_S."""
    moment = f"{int(MOMENT_S) // 60}:{MOMENT_S % 60:04.1f}"
    page.wait_for_function("document.querySelector('video.mr-video')?.readyState >= 2")
    expect(page.locator(".mr-bar")).to_have_attribute("data-status", "completed")
    page.evaluate("at => (document.querySelector('video.mr-video').currentTime = at)", MOMENT_S + 0.01)
    expect(page.locator(".mr-now")).to_contain_text(moment)
    expect(page.locator(".mr-tile[aria-current=true]")).to_contain_text(moment)
    page.wait_for_function(SETTLED)


def show_jobs(page: Page) -> None:
    page.locator("[data-go=jobs]").click()
    expect(page.locator(".mr-jobs-row")).to_have_count(len(OTHERS) + 2)
    expect(page.locator(".mr-jobs-picture img:visible")).to_have_count(len(OTHERS) + 1)


def save(page: Page, path: Path, *, full_page: bool) -> None:
    """Write what the page shows as a PNG, once nothing in it moves any more."""
    page.wait_for_function("[...document.images].every((image) => image.complete)")
    page.mouse.move(0, 0)
    taken = [b""]

    def is_still() -> bool:
        taken.append(page.screenshot(full_page=full_page))
        return taken[-1] == taken[-2]

    wait_until(is_still, pause_s=STILL_S)
    picture = Image.open(io.BytesIO(taken[-1])).convert("RGB")
    picture.save(path, optimize=True)
    if path.stat().st_size > MAX_BYTES:
        picture.quantize(MAX_COLORS).save(path, optimize=True)
    num_bytes = path.stat().st_size
    assert num_bytes <= MAX_BYTES, f"{path.name} has {num_bytes:,} bytes"
    print(f"{path.name}: {picture.width} x {picture.height} px, {num_bytes:,} bytes", flush=True)
    page.context.close()


if __name__ == "__main__":
    sys.exit(main())
