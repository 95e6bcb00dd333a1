"""The page in a real browser: another question about a job, and how one finds about the page: addresses, titles, keys.

What is described and how it is watched: test_page.py. Test: pytest tests/test_page_ask.py
"""

import re

import pytest
from browsing import (
    LONG_FPS,
    Visits,
    assert_accessible,
    expect_error,
    expect_line,
    expect_moment,
    open_job,
    press,
    rows,
    upload,
)
from playwright.sync_api import Locator, Page, Route, expect

HOW_MANY = "How many objects are there?"
# The least contrast of each field's edge with what it stands on, and with its own ground.
EDGES = """() => {
  const channels = (colour) => colour.match(/[\\d.]+/g).slice(0, 3).map((c) => c / 255);
  const linear = (c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  const light = (colour) => {
    const [r, g, b] = channels(colour).map(linear);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05;
  };
  const contrast = (a, b) => Math.max(light(a), light(b)) / Math.min(light(a), light(b));
  const ground = (node) => {
    const colour = getComputedStyle(node).backgroundColor;
    return colour === "rgba(0, 0, 0, 0)" ? ground(node.parentElement) : colour;
  };
  const sought = ".mr input:not([type=range], [type=checkbox], [type=file]), .mr select";
  const fields = [...document.querySelectorAll(sought)];
  return fields.filter((field) => field.checkVisibility()).map((field) => {
    const edge = getComputedStyle(field).borderTopColor;
    return Math.min(contrast(edge, ground(field)), contrast(edge, ground(field.parentElement)));
  });
}"""


def ask(page: Page, question: str) -> None:
    """Ask about the frame of the moment."""
    field = page.get_by_label("Ask another question")
    field.fill(question)
    field.press("Enter")


def answers(page: Page) -> Locator:
    return page.get_by_role("list", name="Answers").get_by_role("listitem")


def test_a_frame_is_asked_and_its_answer_stands_below(visits: Visits, done: str) -> None:
    page = open_job(visits, done)
    rows(page).nth(1).click()
    expect_moment(page, "0:05.0")
    ask(page, HOW_MANY)
    expect(answers(page)).to_have_text(re.compile(rf"0:05\.0{re.escape(HOW_MANY)}three", re.IGNORECASE))
    rows(page).nth(0).click()
    ask(page, HOW_MANY)
    expect(answers(page).first).to_have_text(re.compile(rf"0:00\.0{re.escape(HOW_MANY)}two", re.IGNORECASE))
    expect(answers(page)).to_have_count(2)

    press(page, "0:05.0")
    expect_moment(page, "0:05.0")
    press(page, "New job")
    page.go_back()
    expect(rows(page).first).to_be_visible()
    expect(answers(page)).to_have_count(0)


def test_an_answer_that_comes_late_names_its_frame(visits: Visits, done: str) -> None:
    page = open_job(visits, done)
    held: list[Route] = []
    page.route("**/gradio_api/call/ask/*", lambda route: held.append(route))
    with page.expect_request("**/gradio_api/call/ask/*"):
        ask(page, HOW_MANY)
    expect(answers(page)).to_contain_text("Answering…")
    expect(page.get_by_role("button", name="This frame")).to_have_attribute("aria-disabled", "true")
    ask(page, "What else?")
    expect(page.get_by_role("alert").filter(has_text="One question at a time")).to_be_visible()
    rows(page).nth(1).click()
    expect_moment(page, "0:05.0")
    held[0].continue_()
    expect(answers(page)).to_have_text(re.compile(r"^0:00\.0.*two", re.IGNORECASE))
    expect_moment(page, "0:05.0")
    expect(page.get_by_role("button", name="This frame")).to_have_attribute("aria-disabled", "false")
    expect(page.locator("#mr-ask-error")).to_be_hidden()


def test_a_question_about_all_frames_is_a_new_job_over_the_same_video(visits: Visits, done: str) -> None:
    page = open_job(visits, done)
    sent: list[str] = []
    page.on("request", lambda request: sent.append(request.url))
    page.get_by_label("Ask another question").fill(HOW_MANY)
    press(page, "All frames")
    expect(page.locator(".mr-about")).to_contain_text(HOW_MANY)
    expect_line(page, "Done · 25 frames")
    expect(rows(page).first).to_contain_text("two", ignore_case=True)
    assert not [url for url in sent if url.endswith("/api/upload")]

    page.get_by_text("Use it from code").click()
    asked = page.url.partition("job=")[2]
    expect(page.get_by_role("region", name="curl example")).to_contain_text(f"/api/jobs/{asked}/ask")
    page.get_by_role("link", name="asked of an earlier job").click()
    expect(page).to_have_url(re.compile(rf"\?job={done}$"))
    expect(rows(page).first).to_contain_text("A red circle")


def test_what_is_wrong_with_a_question_is_told_beside_it(visits: Visits) -> None:
    page = visits.open(refused=(404,))
    job_id = upload(page)
    page.goto(f"/?job={job_id}")
    expect_line(page, "Done")
    field = page.get_by_label("Ask another question")
    error = page.get_by_role("alert").and_(page.locator("#mr-ask-error"))
    for question, says in (("  ", "Write a question."), ("x y " * 1000, "tokens")):
        ask(page, question)
        expect(error).to_contain_text(says)
        expect(field).to_have_attribute("aria-invalid", "true")
        expect(field).to_be_focused()
    expect(answers(page)).to_have_count(0)
    field.fill("A")
    expect(error).to_be_hidden()

    assert page.request.delete(f"/api/jobs/{job_id}").status == 204
    ask(page, HOW_MANY)
    expect(error).to_contain_text("Job ID not found")
    page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")  # as when one comes back to the tab
    expect(page.locator(".mr-describe")).to_be_visible()
    expect(page.get_by_role("region", name="Results")).to_be_hidden()
    assert "job=" not in page.url


def test_the_sample_is_a_video_to_begin_with(visits: Visits) -> None:
    page = visits.open()
    press(page, "Try the sample video")
    expect(page.get_by_text("about 25 frames for 0:25")).to_be_visible()
    expect(page.locator(".mr-describe")).to_be_focused()
    page.keyboard.press("Enter")
    expect_line(page, "Done · 25 frames")
    expect(rows(page).first).to_contain_text("5 frames")
    expect(page).to_have_title("sample.mp4 · Moonreel")


def test_the_title_tells_how_far_the_job_is(visits: Visits) -> None:
    page = visits.open()
    page.goto(f"/?job={upload(page, LONG_FPS)}")
    expect(page).to_have_title(re.compile(r"^[1-9]\d?% sample\.mp4 · Moonreel$"))
    expect(rows(page).first).to_be_visible()
    expect(page.get_by_role("button", name="All frames")).to_be_hidden()
    press(page, "Cancel")
    expect(page).to_have_title("sample.mp4 · Moonreel")
    expect(page.get_by_role("button", name="All frames")).to_be_visible()
    press(page, "New job")
    expect(page).to_have_title("Moonreel")
    expect(page.get_by_label("Choose a video")).to_be_focused()


def test_the_history_has_an_address_and_back_leads_to_the_job(visits: Visits, done: str) -> None:
    page = open_job(visits, done)
    press(page, "Jobs")
    expect(page).to_have_url(re.compile(r"\?view=jobs$"))
    expect(page).to_have_title("Jobs · Moonreel")
    page.go_back()
    expect(rows(page).first).to_be_visible()
    expect(page).to_have_title("sample.mp4 · Moonreel")
    page.go_forward()
    expect(page.locator(".mr-jobs-row").first).to_be_visible()
    page.reload()
    expect(page.locator(".mr-jobs-row").first).to_be_visible()
    press(page, "Describe")
    expect(page.locator(".mr-describe")).to_be_visible()  # after a reload, no job is open


def test_shortcuts_of_single_keys_can_be_turned_off_for_good(visits: Visits, done: str) -> None:
    page = open_job(visits, done)
    page.get_by_label("Keyboard shortcuts").uncheck()
    page.reload()
    expect(rows(page).first).to_be_visible()
    expect(page.get_by_label("Keyboard shortcuts")).not_to_be_checked()
    page.wait_for_function("document.querySelector('video.mr-video')?.readyState >= 1")
    for key in ("/", "Space"):
        page.keyboard.press(key)
    page.keyboard.press("ArrowRight")
    expect_moment(page, "0:01.0")
    assert page.evaluate("document.querySelector('video.mr-video').paused")
    expect(page.get_by_role("searchbox", name="Search descriptions")).not_to_be_focused()


def test_a_job_of_captions_is_told_as_one(visits: Visits) -> None:
    page = visits.open()
    job_id = upload(page, name="captions.mp4", caption_length="short", max_frames="2", max_tokens="99")
    page.goto(f"/?job={job_id}")
    expect_line(page, "Done · 2 frames")
    expect(page.locator(".mr-about")).to_contain_text("Captions, short")
    page.get_by_text("Use it from code").click()
    curl = page.get_by_role("region", name="curl example")
    for option in ("caption_length=short", "max_frames=2", "max_tokens=99"):
        expect(curl).to_contain_text(f"'{option}'")
    expect(curl).not_to_contain_text("temperature")
    press(page, "Jobs")
    expect(page.locator(".mr-jobs-row").filter(has_text="captions.mp4")).to_contain_text("Captions, short")


def test_a_model_that_is_being_loaded_tells_how_far_it_is(visits: Visits, done: str) -> None:
    """A model of gigabytes is not downloaded here, so the server's answer is changed on its way to the browser."""
    says = ["1.2 of 3.9 GB (31%)", "2.4 of 3.9 GB (62%)"]

    def spoil(route: Route) -> None:
        if not says:
            return route.fallback()
        detail = f"The model vikhyatk/moondream2 is being downloaded: {says.pop(0)}."
        route.fulfill(status=503, json={"code": "not_ready", "detail": detail})

    page = visits.open(refused=(503,))
    page.route("**/api/ready", spoil)
    page.reload()
    bar = page.get_by_role("progressbar", name="Loading of the model")
    expect(bar).to_have_js_property("value", 31)
    expect(page.get_by_text("1.2 of 3.9 GB (31%). Jobs can be submitted, and wait.")).to_be_visible()
    expect(bar).to_have_js_property("value", 62)
    expect(bar).to_be_hidden()
    expect(page.get_by_text("is being downloaded")).to_be_hidden()


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_question_with_its_answers_is_accessible_to_all(visits: Visits, done: str, theme: str) -> None:
    page = open_job(visits, done, f"&__theme={theme}")
    ask(page, HOW_MANY)
    expect(answers(page)).to_contain_text("two", ignore_case=True)
    ask(page, "")
    expect_error(page, page.get_by_label("Ask another question"), "Write a question.")
    assert_accessible(page)
    edges = page.evaluate(EDGES)
    press(page, "New job")
    page.get_by_text("More options").click()
    edges += page.evaluate(EDGES)
    assert len(edges) > 8 and min(edges) >= 3, edges
