"""The page in a real browser: what a visitor sees and does, from the upload to the exports.

A question besides, the addresses and the rest of the page: test_page_ask.py. The answers of API and gradio_client:
test_api.py, test_ui.py. Test: pytest tests/test_page.py
"""

import csv
import io
import json
import re
from pathlib import Path

import pytest
from browsing import (
    LONG_FPS,
    Visits,
    assert_accessible,
    expect_error,
    expect_line,
    expect_moment,
    exported,
    open_job,
    press,
    rows,
    tiles,
    upload,
    visiting,
)
from playwright.sync_api import Browser, Route, expect
from serving import SAMPLE, ServerProcess

KEY = "alice-key-0123456789"
EVIL = "<img src=x onerror=\"document.title='hacked'\">"
# What markup of a stranger's could try, if any ever got into the page -> what the page's policy has stopped.
ATTACKS = """() => {
  const stopped = [];
  document.addEventListener("securitypolicyviolation", (event) => stopped.push(event.effectiveDirective));
  const add = (tag, fields) => document.body.appendChild(Object.assign(document.createElement(tag), fields));
  add("div", { innerHTML: "<img src=data:, onerror='window.hacked = 1'>" });
  add("script", { text: "window.hacked = 2" });
  add("script", { src: "http://127.0.0.2/x.js" });
  document.head.prepend(Object.assign(document.createElement("base"), { href: "http://127.0.0.2/" }));
  add("iframe", { src: "data:text/html,1" });
  add("object", { data: "data:text/html,1" });
  add("form", { action: "http://127.0.0.2/" }).submit();
  window.stopped = () => [...new Set(stopped)].sort().join();
}"""


def test_a_visitor_uploads_a_video_and_watches_the_descriptions_arrive(visits: Visits) -> None:
    page = visits.open()
    page.get_by_label("Choose a video").set_input_files(SAMPLE)
    page.get_by_role("spinbutton", name="Frames per second").fill("4")
    expect(page.get_by_text("100 frames")).to_be_visible()
    page.get_by_text("More options").click()
    page.get_by_label("Frames that look alike").select_option("describe each")
    page.locator(".mr-describe").click()
    status_at_first_row = "document.querySelector('.mr-row') && document.querySelector('.mr-bar').dataset.status"
    first = page.wait_for_function(status_at_first_row)

    assert first.json_value() == "processing"
    expect_line(page, "Done · 100 frames")
    assert "?job=job_" in page.url


def test_frames_that_look_alike_are_described_once_and_say_so(visits: Visits) -> None:
    page = visits.open()
    page.goto(f"/?job={upload(page, reuse_similar=10)}")
    expect_line(page, "Done · 25 frames · 15 look alike")
    rows(page).first.click()
    page.keyboard.press("ArrowRight")
    expect(page.locator(".mr-now")).to_contain_text("0:01.0 · looks like 0:00.0")


def test_a_row_and_a_tile_take_the_video_along_and_the_video_takes_them(visits: Visits, done: str) -> None:
    page = open_job(visits, done)
    current = page.locator(".mr-row[aria-current=true]")
    rows(page).nth(1).click()
    expect_moment(page, "0:05.0")
    expect(current).to_contain_text("A yellow triangle")
    tiles(page).nth(2).click()
    expect_moment(page, "0:02.0")
    expect(current).to_contain_text("A red circle")

    page.evaluate("document.querySelector('video.mr-video').currentTime = 7.4")
    expect_moment(page, "0:07.0")
    expect(current).to_contain_text("A yellow triangle")


def test_a_search_counts_its_matches_and_marks_them(visits: Visits, done: str) -> None:
    page = open_job(visits, done)
    search = page.get_by_role("searchbox", name="Search descriptions")
    search.fill("triangle yellow")
    expect(page.locator(".mr-matches")).to_have_text("1 match")
    expect(rows(page)).to_have_text(re.compile("A yellow triangle"))
    assert {word.lower() for word in page.locator("mark").all_inner_texts()} == {"triangle", "yellow"}

    search.press("Enter")
    expect_moment(page, "0:05.0")
    search.fill("elephant")
    expect(page.get_by_text("No description matches.")).to_be_visible()
    search.press("Escape")
    expect(rows(page).first).to_contain_text("A red circle")


def test_the_keyboard_steps_plays_and_searches(visits: Visits, done: str) -> None:
    page = open_job(visits, done)
    steps = {"ArrowRight": "0:01.0", "End": "0:24.0", "ArrowLeft": "0:23.0", "Home": "0:00.0"}
    for key, moment in steps.items():
        page.keyboard.press(key)
        expect_moment(page, moment)
    for is_paused in ("false", "true"):
        page.keyboard.press("Space")
        page.wait_for_function(f"document.querySelector('video.mr-video').paused === {is_paused}")
    page.keyboard.press("/")
    page.keyboard.type("/ ")
    expect(page.get_by_role("searchbox", name="Search descriptions")).to_have_value("/ ")


def test_pictures_stand_in_for_a_video_that_the_browser_cannot_play(visits: Visits, video: Path) -> None:
    page = visits.open()
    page.get_by_label("Choose a video").set_input_files(video)
    page.locator(".mr-describe").click()
    expect(page.get_by_text("This browser cannot play the video.")).to_be_visible()
    expect_line(page, "Done · 3 frames")
    page.keyboard.press("End")
    expect(page.locator("img.mr-picture")).to_have_attribute("src", re.compile(r"/frames/50\.jpg$"))
    page.wait_for_function("document.querySelector('img.mr-picture').naturalWidth === 64")


def test_a_running_job_is_canceled_and_then_tried_again(visits: Visits) -> None:
    page = visits.open()
    page.goto(f"/?job={upload(page, LONG_FPS)}")
    expect(rows(page).first).to_be_visible()
    press(page, "Cancel")
    expect_line(page, "Canceled")
    num_before = int(page.locator(".mr-tiles li").first.get_attribute("aria-setsize") or 0)
    assert 0 < num_before < 600

    press(page, "Retry")
    expect_line(page, "Describing")
    page.wait_for_function("before => document.querySelector('.mr-tiles li').ariaSetSize > before", arg=num_before)
    press(page, "Cancel")
    expect_line(page, "Canceled")


def test_a_reload_in_mid_job_goes_on_with_every_frame(visits: Visits) -> None:
    page = visits.open()
    job_id = upload(page, LONG_FPS)
    page.goto(f"/?job={job_id}")
    expect(tiles(page).first).to_be_visible()
    page.reload()
    expect_line(page, "of 600 frames")
    press(page, "Cancel")
    expect_line(page, "Canceled")
    num_described = page.request.get(f"/api/status/{job_id}").json()["frames_processed"]
    expect(page.locator(".mr-tiles li").first).to_have_attribute("aria-setsize", str(num_described))


def test_a_job_opens_by_its_address_in_another_browser_while_it_runs(visits: Visits) -> None:
    owner = visits.open()
    address = f"?job={upload(owner, LONG_FPS, 'shared.mp4')}"
    friend = visits.open(address)
    expect(friend.get_by_role("heading", name="shared.mp4")).to_be_visible()
    expect(rows(friend).first).to_contain_text("A red circle")
    owner.goto(f"/{address}")
    press(owner, "Cancel")
    expect_line(friend, "Canceled")


def test_a_phone_shows_each_view_without_scrolling_sideways(visits: Visits, done: str) -> None:
    page = open_job(visits, done, viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    page.get_by_text("Use it from code").tap()
    rows(page).nth(1).tap()
    expect_moment(page, "0:05.0")
    for button, there in (("New job", ".mr-describe"), ("Jobs", ".mr-jobs-row")):
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        press(page, button)
        expect(page.locator(there).first).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") == 390


@pytest.mark.parametrize(("url", "says"), [("ftp://a.example/v.mp4", "https://"), ("http://10.0.0.5/v.mp4", "private")])
def test_a_wrong_url_is_told_beside_its_field(visits: Visits, url: str, says: str) -> None:
    page = visits.open(refused=(400, 422))
    field = page.get_by_label("…or video URL")
    field.fill(url)
    field.press("Enter")
    expect_error(page, field, says)
    field.fill("https://example.com/video.mp4")
    expect(field).not_to_have_attribute("aria-invalid", "true")


def test_a_file_that_is_no_video_is_told_beside_the_file(visits: Visits, tmp_path: Path) -> None:
    text = tmp_path / "text.mp4"
    text.write_text("This is no video at all.")
    page = visits.open(refused=(415,))
    page.get_by_label("Choose a video").set_input_files(text)
    page.locator(".mr-describe").click()
    expect_error(page, page.locator("#mr-file"), "This file is text, not a video")


def test_the_exports_are_downloaded_and_hold_the_descriptions(visits: Visits, done: str) -> None:
    page = open_job(visits, done)
    first = rows(page).first.locator(".mr-text").inner_text()
    frames = json.loads(exported(page, "JSON"))["results_payload"]["frame_results"]
    table = list(csv.DictReader(io.StringIO(exported(page, "CSV"))))
    subtitles, captions = exported(page, "SRT"), exported(page, "VTT")

    assert [frame["description"] for frame in frames] == [row["description"] for row in table]
    assert len(table) == 25 and table[0]["description"] == first
    number, times, *text = subtitles.partition("\n\n")[0].splitlines()
    assert (number, times, " ".join(text)) == ("1", "00:00:00,000 --> 00:00:04,999", first)
    assert captions.startswith("WEBVTT") and subtitles.count(" --> ") == captions.count(" --> ") > 1


def test_markup_from_a_model_or_a_visitor_stays_text(visits: Visits) -> None:
    """The demo model writes no markup, so the answer with the frames is changed on its way to the browser."""

    def spoil(route: Route) -> None:
        answer = route.fetch()
        document = answer.json()
        for frame in document["frames"][:3]:
            frame["description"] = EVIL
        route.fulfill(response=answer, json=document)

    page = visits.open()
    job_id = upload(page, name="<b>evil<img src=x>.mp4", question=EVIL)
    page.goto(f"/?job={job_id}")
    expect_line(page, "Done")
    page.route("**/api/jobs/*/frames?*", spoil)
    page.reload()
    expect(rows(page).first).to_contain_text(EVIL)
    expect(page.locator(".mr-now")).to_contain_text(EVIL)
    page.get_by_role("searchbox", name="Search descriptions").fill("img")
    expect(page.locator("mark")).to_have_text("img")
    press(page, "Jobs")
    expect(page.locator(".mr-jobs-question").first).to_have_text(EVIL)

    assert page.locator("img[src=x]").count() == 0
    press(page, "Describe")
    expect(page).to_have_title("<b>evil<img src=x>.mp4 · Moonreel")


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_each_view_is_accessible_to_all(visits: Visits, done: str, theme: str) -> None:
    page = visits.open(f"?__theme={theme}")
    colour = page.locator(".mr").evaluate("page => getComputedStyle(page).backgroundColor")
    assert colour == {"light": "rgb(248, 250, 252)", "dark": "rgb(11, 18, 32)"}[theme]
    assert_accessible(page)
    page.locator(".mr-describe").click()
    expect_error(page, page.locator("#mr-file"), "Choose a video file")
    page.get_by_text("More options").click()
    assert_accessible(page)

    page.goto(f"/?__theme={theme}&job={upload(page, LONG_FPS, f'{theme}.mp4')}")
    expect_line(page, "Describing")
    expect(rows(page).first).to_be_visible()
    assert_accessible(page)
    press(page, "Jobs")
    expect(page.get_by_role("progressbar", name=f"Progress of {theme}.mp4")).to_be_visible()
    assert_accessible(page)
    press(page, f"Cancel {theme}.mp4")

    page.goto(f"/?__theme={theme}&job={done}")
    expect_line(page, "Done")
    page.get_by_text("Use it from code").click()
    page.get_by_role("searchbox", name="Search descriptions").fill("circle")
    assert_accessible(page)


def test_a_job_is_deleted_once_that_is_confirmed(visits: Visits) -> None:
    page = visits.open()
    job_id = upload(page, name="unwanted.mp4")
    press(page, "Jobs")
    press(page, "Delete unwanted.mp4")
    press(page, "No, keep unwanted.mp4")
    expect(page.get_by_role("button", name="Delete unwanted.mp4", exact=True)).to_be_focused()
    press(page, "Delete unwanted.mp4")
    press(page, "Yes, delete unwanted.mp4")
    expect(page.get_by_role("heading", name="unwanted.mp4")).to_have_count(0)
    assert page.request.get(f"/api/status/{job_id}").status == 404


def test_a_server_with_keys_lets_in_who_has_one(browser: Browser, tmp_path: Path) -> None:
    with (
        ServerProcess(tmp_path / "data", page=True, api_keys=f"alice:{KEY}").start() as server,
        visiting(browser, server.url) as visits,
    ):
        page = visits.open(refused=(401,))
        field = page.get_by_label("This server asks for a key")
        field.fill("wrong-key-0123456789")
        field.press("Enter")
        expect(page.get_by_role("alert").filter(has_text="This key is not known here")).to_be_visible()
        field.fill(KEY)
        field.press("Enter")
        expect(field).to_be_hidden()
        job_id = upload(page)
        page.goto(f"/?job={job_id}")  # the video, the pictures and the events come by the cookie, too
        expect_line(page, "Done · 25 frames")
        page.wait_for_function("document.querySelector('video.mr-video').readyState >= 1")
        ask_for_picture = f"() => fetch('/api/jobs/{job_id}/frames/0.jpg').then((answer) => answer.status)"
        assert page.evaluate(ask_for_picture) == 200

        press(page, "Log out")
        expect(field).to_be_visible()
        expect(page.get_by_role("button", name="Log out")).to_be_hidden()
        assert page.evaluate(ask_for_picture) == 401, "the browser kept it"


def test_what_gets_into_the_page_as_markup_runs_nothing_and_sends_nothing(visits: Visits) -> None:
    """The page writes no text of models and strangers as markup. If it ever did, its policy holds."""
    page = visits.open()
    page.evaluate(ATTACKS)
    stopped = "base-uri,form-action,frame-src,object-src,script-src-attr,script-src-elem"
    page.wait_for_function("stopped => window.stopped() === stopped", arg=stopped)
    assert page.evaluate("window.hacked") is None
    visits.troubles.clear()  # what the console told of the policy


def test_the_docs_show_and_try_every_route_without_the_internet(visits: Visits) -> None:
    page = visits.open()
    paths = page.request.get("/openapi.json").json()["paths"]
    page.goto("/docs")
    expect(page.locator(".opblock")).to_have_count(sum(map(len, paths.values())))
    page.locator(".opblock", has_text="/api/health").click()
    press(page, "Try it out")
    press(page, "Execute")
    expect(page.locator(".live-responses-table")).to_contain_text('"status": "ok"')


def test_a_video_and_a_picture_may_be_opened_by_themselves(visits: Visits, done: str) -> None:
    page = visits.open()
    page.goto(f"/api/jobs/{done}/video")
    page.wait_for_function("document.querySelector('video')?.readyState >= 1")
    page.goto(f"/api/jobs/{done}/frames/0.jpg")
    page.wait_for_function("document.images[0]?.naturalWidth > 0")
