"""Behind a proxy that serves the app under a prefix: nothing of it may ask for anything outside.

Needs Debian's package chromium, as browsing.py says. Test: pytest tests/test_proxy.py
"""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from browsing import expect_line, expect_moment, exported, rows, tiles, visiting
from gradio_client import Client, handle_file
from playwright.sync_api import Browser, expect
from proxy import Proxy, proxied
from serving import SAMPLE, ServerProcess

PREFIX = "/video"
KEY = "alice-key-0123456789"
NO_TOKEN: Any = False  # Gradio's type says str | None


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("proxy") / "data"
    with ServerProcess(folder, page=True, root_path=PREFIX, api_keys=f"alice:{KEY}").start() as server:
        yield server
        assert server.stop() == 0


@pytest.fixture
def proxy(server: ServerProcess) -> Iterator[Proxy]:
    with proxied(server.url, PREFIX) as proxy:
        yield proxy
        assert proxy.strays == []


def test_the_page_works_under_the_prefix(browser: Browser, proxy: Proxy) -> None:
    with visiting(browser, proxy.url) as visits:
        page = visits.open(refused=(401,))
        field = page.get_by_label("This server asks for a key")
        field.fill(KEY)
        field.press("Enter")
        expect(field).to_be_hidden()
        page.get_by_label("Choose a video").set_input_files(SAMPLE)
        page.get_by_role("spinbutton", name="Frames per second").fill("4")
        page.locator(".mr-describe").click()
        status_at_first_row = "document.querySelector('.mr-row') && document.querySelector('.mr-bar').dataset.status"
        assert page.wait_for_function(status_at_first_row).json_value() == "processing"
        expect_line(page, "Done · 100 frames")
        assert page.url.startswith(f"{proxy.url}/?job=job_")

        page.wait_for_function("document.querySelector('video.mr-video').readyState >= 1")
        rows(page).nth(1).click()
        expect_moment(page, "0:05.0")
        expect(tiles(page).first).to_be_visible()
        page.wait_for_function("document.querySelector('.mr-tile img').naturalWidth > 0")
        assert exported(page, "SRT").startswith("1\n00:00:00,000 --> ")


def test_gradio_client_works_under_the_prefix(proxy: Proxy) -> None:
    sent: dict[str, Any] = {"headers": {"Authorization": f"Bearer {KEY}"}, "token": NO_TOKEN}
    client = Client(f"{proxy.url}/", verbose=False, analytics_enabled=False, **sent)
    job_id = client.predict(handle_file(SAMPLE), api_name="/submit_file")["job_id"]
    *_, last = client.submit(job_id, api_name="/wait")

    assert last["status"] == "completed"  # type: ignore[index]


def test_docs_and_addresses_in_answers_name_the_prefix(proxy: Proxy) -> None:
    with httpx.Client(trust_env=False, headers={"Authorization": f"Bearer {KEY}"}) as http:
        docs = http.get(f"{proxy.url}/docs").text
        answer = http.post(f"{proxy.url}/api/submit", json={"video_url": "https://127.0.0.2/video.mp4"})
        uploaded = http.post(f"{proxy.url}/api/upload", files={"file": ("a.mp4", SAMPLE.read_bytes())})

    assert 'url: "openapi.json"' in docs and 'src="docs/' in docs  # beside /docs, wherever that is
    assert answer.json()["code"] == "invalid_video_url"
    assert uploaded.headers["location"] == f"{PREFIX}/api/status/{uploaded.json()['job_id']}"


@pytest.mark.parametrize("path", ["/gradio_api/info", f"{PREFIX}/gradio_api/info"])
def test_a_door_is_shut_with_the_prefix_and_without(server: ServerProcess, path: str) -> None:
    """Routing takes the prefix off where it still stands, and the doors did not: it led past them."""
    with server.client() as http:
        assert http.get(path).status_code == 401
        assert http.get(path, headers={"Authorization": f"Bearer {KEY}"}).status_code == 200
        assert http.get(path.replace("info", "run/status")).json()["code"] == "not_found"
