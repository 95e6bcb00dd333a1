"""The page in a real browser, for tests: visits that note what goes wrong, and where things are on the page.

Needs Debian's package chromium. Each visit also fails if the page asks another server for anything, or if the console
tells an error. The fixtures over it are in conftest.py.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, ConsoleMessage, Locator, Page, expect, sync_playwright
from serving import SAMPLE

WAIT_MS = 60_000  # this host may be busy
LONG_FPS = 24  # 600 frames: long enough to be met while it runs
CHROMIUM_ARGS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]


class Visits:
    """Opens the page as new visitors do, and notes what their browsers ask of other servers and complain about."""

    def __init__(self, browser: Browser, url: str) -> None:
        self._browser, self._url = browser, url
        self.troubles: list[str] = []

    def open(self, query: str = "", *, refused: tuple[int, ...] = (), **options: Any) -> Page:
        """query: "?job=…". refused: the HTTP numbers that this visit is about, which the console tells as errors."""
        context = self._browser.new_context(base_url=self._url, **options)
        context.set_default_timeout(WAIT_MS)
        page = context.new_page()
        own = (f"{self._url}/", "blob:", "data:")
        expected = [f"Failed to load resource: the server responded with a status of {number} " for number in refused]

        def hear(said: ConsoleMessage) -> None:
            if said.type == "error" and not said.text.startswith(tuple(expected)):
                self.troubles.append(f"{said.text} {said.location}")

        page.on("request", lambda sent: None if sent.url.startswith(own) else self.troubles.append(sent.url))
        page.on("pageerror", lambda error: self.troubles.append(str(error)))
        page.on("console", hear)
        page.goto(f"{self._url}/{query}")
        expect(page.get_by_role("heading", name="Moonreel")).to_be_visible()
        return page


@contextmanager
def visiting(browser: Browser, url: str) -> Iterator[Visits]:
    visits = Visits(browser, url)
    yield visits
    for context in browser.contexts:
        context.close()
    assert visits.troubles == []


@contextmanager
def launched() -> Iterator[Browser]:
    path = shutil.which("chromium")
    assert path, "These tests need a browser: apt-get install chromium (see README.md)."
    expect.set_options(timeout=WAIT_MS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=CHROMIUM_ARGS)
        yield browser
        browser.close()


def upload(page: Page, fps: float = 1, name: str = "sample.mp4", **fields: Any) -> str:
    """Submit the sample past the form, each frame to be described -> the job's id"""
    video: Any = {"name": name, "mimeType": "video/mp4", "buffer": SAMPLE.read_bytes()}
    answer = page.request.post(
        "/api/upload", multipart={"target_fps": fps, "reuse_similar": 0, **fields, "file": video}
    )
    assert answer.status == 202, answer.text()
    return answer.json()["job_id"]


def open_job(visits: Visits, job_id: str, query: str = "", **options: Any) -> Page:
    """Open a job that is completed, until video and descriptions are there."""
    page = visits.open(f"?job={job_id}{query}", **options)
    expect_line(page, "Done")
    expect(rows(page).first).to_be_visible()
    page.wait_for_function("document.querySelector('video.mr-video')?.readyState >= 1")
    return page


def expect_line(page: Page, says: str) -> None:
    expect(page.locator(".mr-line")).to_contain_text(says)


def rows(page: Page) -> Locator:
    return page.get_by_role("list", name="Descriptions").get_by_role("button")


def tiles(page: Page) -> Locator:
    return page.get_by_role("list", name="Described frames").get_by_role("button")


def expect_moment(page: Page, moment: str) -> None:
    """The description, the strip and the video are at this moment, as "0:05.0"."""
    expect(page.locator(".mr-now")).to_contain_text(moment)
    expect(page.locator(".mr-tile[aria-current=true]")).to_have_text(moment)
    minutes, seconds = moment.split(":")
    at_s = 60 * int(minutes) + float(seconds)
    page.wait_for_function("at => Math.abs(document.querySelector('video.mr-video').currentTime - at) < 0.5", arg=at_s)


def press(page: Page, name: str) -> None:
    page.get_by_role("button", name=name, exact=True).click()


def expect_error(page: Page, field: Locator, says: str) -> None:
    """The field has the focus, and the error that belongs to it says this."""
    expect(field).to_be_focused()
    expect(field).to_have_attribute("aria-invalid", "true")
    name = (field.get_attribute("aria-describedby") or "").split()[-1]
    expect(page.locator(f"#{name}")).to_contain_text(says)


def exported(page: Page, label: str) -> str:
    with page.expect_download() as download:
        page.get_by_role("link", name=label, exact=True).click()
    assert download.value.suggested_filename.endswith(f".{label.lower()}")
    return download.value.path().read_text(encoding="utf-8-sig")


def assert_accessible(page: Page) -> None:
    results = Axe().run(page, options={"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"]})
    assert results.violations_count == 0, results.generate_report()
