"""Who gets in, on real running servers: pages of other sites, foreign hosts, keys, sessions, visitors, and what stays
hidden. The parts alone are in test_doors_middleware.py and test_auth.py."""

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from api_client import ELSEWHERE, Client, code_of, ended, status_of, submit, upload
from local_server import NOT_FOUND, LocalServer, http
from serving import ROOT, SAMPLE, RunningApp, running_app

from app import EXIT_BAD_SETTINGS

ALICE, BOB, ADMIN = "alice-key-0123456789", "bob-key-0123456789", "admin-key-0123456789"
PICTURE, VIDEO, EVENTS = "/api/jobs/{}/frames/0.jpg", "/api/jobs/{}/video", "/api/jobs/{}/events"
NOT_OURS = {"authorization": "Bearer mallory-key-0123456789"}


@pytest.fixture(scope="module")
def open_app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningApp]:
    """Without keys, and without a model."""
    folder = tmp_path_factory.mktemp("open") / "data"
    with running_app(folder, model="/nowhere", allow_anonymous=True) as app:
        yield app


@pytest.fixture(scope="module")
def locked_app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningApp]:
    keys, admin_keys = f"alice:{ALICE},bob:{BOB}", f"root:{ADMIN}"
    folder = tmp_path_factory.mktemp("locked") / "data"
    with running_app(folder, rate_limit_per_minute=10_000, api_keys=keys, admin_keys=admin_keys) as app:
        yield app


@pytest.fixture
def visitor(open_app: RunningApp) -> Iterator[httpx.Client]:
    with Client(open_app.url) as client:
        yield client


@pytest.fixture
def nobody(locked_app: RunningApp) -> Iterator[httpx.Client]:
    """Has no key."""
    with Client(locked_app.url) as client:
        yield client


def with_key(app: RunningApp, key: str) -> httpx.Client:
    return Client(app.url, headers={"Authorization": f"Bearer {key}"})


@pytest.fixture
def alice(locked_app: RunningApp) -> Iterator[httpx.Client]:
    with with_key(locked_app, ALICE) as client:
        yield client


@pytest.fixture
def bob(locked_app: RunningApp) -> Iterator[httpx.Client]:
    with with_key(locked_app, BOB) as client:
        yield client


@pytest.fixture
def admin(locked_app: RunningApp) -> Iterator[httpx.Client]:
    with with_key(locked_app, ADMIN) as client:
        yield client


@pytest.fixture(scope="module")
def alices_job(locked_app: RunningApp) -> str:
    """A completed job."""
    with with_key(locked_app, ALICE) as client:
        return ended(client, upload(client, SAMPLE.read_bytes(), max_frames=1))["job_id"]


# Pages of other sites, and foreign names


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:1"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
)
def test_a_page_of_another_site_cannot_change_anything(visitor: httpx.Client, headers: dict[str, str]) -> None:
    job_id = submit(visitor)
    answers = [
        visitor.post("/api/submit", json={"video_url": ELSEWHERE}, headers=headers),
        visitor.post(f"/api/submit?video_url={ELSEWHERE}", headers={**headers, "Content-Type": "text/plain"}),
        visitor.post("/api/upload", files={"file": ("video.mp4", SAMPLE.read_bytes())}, headers=headers),
        visitor.post(f"/api/jobs/{job_id}/cancel", headers=headers),
        visitor.delete(f"/api/jobs/{job_id}", headers=headers),
        visitor.post("/api/session", json={"key": ALICE}, headers=headers),
    ]

    assert {code_of(answer) for answer in answers} == {(403, "cross_site")}
    assert visitor.get("/api/jobs/list").json()["total_count"] == 1
    assert status_of(visitor, job_id)["status"] == "submitted"


def test_our_own_page_and_programs_may_submit(visitor: httpx.Client) -> None:
    for headers in ({"Origin": str(visitor.base_url)}, {"Sec-Fetch-Site": "same-origin"}, {}):
        assert visitor.post("/api/submit", json={"video_url": ELSEWHERE}, headers=headers).status_code == 202


def test_a_page_of_another_site_cannot_read_either(visitor: httpx.Client) -> None:
    answer = visitor.get("/api/jobs/list", headers={"Origin": "https://evil.example"})

    assert "access-control-allow-origin" not in answer.headers
    assert answer.headers["cross-origin-resource-policy"] == "same-origin"


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "169.254.169.254", "localhost.evil", ""])
@pytest.mark.parametrize("path", ["/api/jobs/list", "/api/health", "/docs", "/metrics"])
def test_a_name_that_is_not_ours_is_refused(visitor: httpx.Client, host: str, path: str) -> None:
    """A page of evil.example whose name is made to lead to 127.0.0.1 (DNS rebinding) gets nothing."""
    assert code_of(visitor.get(path, headers={"Host": host})) == (400, "foreign_host")


def test_an_origin_that_the_operator_lists_may_submit_and_read(tmp_path: Path) -> None:
    friend = {"Origin": "https://friend.example"}
    with (
        running_app(tmp_path / "data", model="/nowhere", cors_origins=friend["Origin"]) as app,
        Client(app.url) as client,
    ):
        answer = client.post("/api/submit", json={"video_url": ELSEWHERE}, headers=friend)

    assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (202, friend["Origin"])


# Without keys


def test_without_keys_everybody_sees_their_own_list(open_app: RunningApp, visitor: httpx.Client) -> None:
    with Client(open_app.url) as other:
        mine, others = submit(visitor), submit(other)

        assert [job["job_id"] for job in visitor.get("/api/jobs/list").json()["jobs"]] == [mine]
        assert [job["job_id"] for job in other.get("/api/jobs/list").json()["jobs"]] == [others]


def test_where_only_this_computer_is_served_its_user_needs_no_cookie(tmp_path: Path) -> None:
    """curl and gradio_client keep none, and saw an empty list."""
    with running_app(tmp_path / "data", model="/nowhere") as app, app.client() as one, app.client() as other:
        answer = one.post("/api/submit", json={"video_url": ELSEWHERE})

        assert [job["job_id"] for job in other.get("/api/jobs/list").json()["jobs"]] == [answer.json()["job_id"]]
        assert "set-cookie" not in answer.headers


def test_the_visitors_cookie_is_for_this_server_alone(visitor: httpx.Client) -> None:
    cookie = visitor.post("/api/submit", json={"video_url": ELSEWHERE}).headers["set-cookie"]

    assert cookie.startswith("moonreel_visitor=")
    assert "HttpOnly" in cookie and "SameSite=lax" in cookie


def test_without_keys_whoever_knows_a_jobs_id_reaches_it(open_app: RunningApp, visitor: httpx.Client) -> None:
    job_id = submit(visitor)
    with Client(open_app.url) as other:
        assert status_of(other, job_id)["status"] == "submitted"
        assert other.post(f"/api/jobs/{job_id}/cancel").status_code == 200


def test_an_address_for_other_computers_needs_keys(tmp_path: Path) -> None:
    command = [sys.executable, "app.py", "--host", "0.0.0.0", "--model", "demo", "--data-dir", str(tmp_path / "data")]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MOONREEL_")}
    ended = subprocess.run(command, cwd=ROOT, env=clean, capture_output=True, text=True, timeout=120)

    assert ended.returncode == EXIT_BAD_SETTINGS == 2
    assert ended.stderr.startswith("error: HOST 0.0.0.0 lets other computers in without a key. Set API_KEYS")
    assert not (tmp_path / "data").exists()


# With keys


def routes(app: RunningApp, job_id: str) -> list[tuple[str, str]]:
    """Method and path of every route about a job."""
    paths = httpx.get(app.url + "/openapi.json", trust_env=False).json()["paths"]
    found = [(method.upper(), path) for path, of in paths.items() for method in of if "{job_id}" in path]
    assert len(found) >= 9
    return [(method, path.format(job_id=job_id, frame_idx=0)) for method, path in found]


def test_without_a_key_nothing_about_jobs_is_told(
    locked_app: RunningApp, nobody: httpx.Client, alices_job: str
) -> None:
    asked = [*routes(locked_app, alices_job), ("GET", "/api/jobs/list"), ("POST", "/api/submit"), ("GET", "/metrics")]
    for headers in ({}, NOT_OURS, {"authorization": "Bearer x"}, {"authorization": "Basic YTpi"}):
        for method, path in asked:
            body = {"video_url": ELSEWHERE} if path == "/api/submit" else None
            answer = nobody.request(method, path, headers=headers, json=body)
            assert code_of(answer) == (401, "unauthorized")
            assert answer.headers["www-authenticate"] == "Bearer"


def test_an_upload_without_a_key_is_refused(nobody: httpx.Client) -> None:
    answer = nobody.post("/api/upload", files={"file": ("video.mp4", SAMPLE.read_bytes())})

    assert code_of(answer) == (401, "unauthorized")


def test_health_and_readiness_need_no_key(nobody: httpx.Client) -> None:
    assert nobody.get("/api/health").status_code == nobody.get("/api/ready").status_code == 200


def test_a_key_opens_its_own_jobs_on_every_route_and_no_others(
    locked_app: RunningApp, alice: httpx.Client, bob: httpx.Client, alices_job: str
) -> None:
    unknown = "job_8f14e45f-ceea-467f-9b1d-3a2c1f0e7d55"
    theirs, nobodys = routes(locked_app, alices_job), routes(locked_app, unknown)
    for (method, path), (_, no_path) in zip(theirs, nobodys, strict=True):
        body = {"question": "Who?"} if path.endswith("/ask") else None
        answer = bob.request(method, path, json=body)
        assert code_of(answer) == (404, "job_not_found")
        assert answer.content == bob.request(method, no_path, json=body).content, "nobody learns that it exists"

    assert all(alice.get(path).status_code == 200 for method, path in theirs if method == "GET")


def test_each_key_lists_its_own_jobs_and_an_admins_lists_all(
    alice: httpx.Client, bob: httpx.Client, admin: httpx.Client, alices_job: str
) -> None:
    bobs_job = upload(bob, SAMPLE.read_bytes(), max_frames=1)
    lists = [
        {job["job_id"] for job in client.get("/api/jobs/list?limit=100").json()["jobs"]}
        for client in (alice, bob, admin)
    ]

    assert alices_job in lists[0] and bobs_job not in lists[0]
    assert lists[1] == {bobs_job}
    assert lists[2] >= {alices_job, bobs_job}


def test_an_admin_reaches_every_job(admin: httpx.Client, alices_job: str) -> None:
    assert status_of(admin, alices_job)["status"] == "completed"
    assert admin.get(VIDEO.format(alices_job)).status_code == 200


def test_metrics_are_for_admins(alice: httpx.Client, admin: httpx.Client) -> None:
    assert code_of(alice.get("/metrics")) == (401, "unauthorized")
    assert "moonreel_jobs" in admin.get("/metrics").text


def test_a_session_serves_where_no_header_can_be_sent(nobody: httpx.Client, alices_job: str) -> None:
    """img, video and EventSource send cookies, and nothing else that a page could choose."""
    login = nobody.post("/api/session", json={"key": ALICE})

    assert (login.status_code, login.content) == (204, b"")
    cookie = login.headers["set-cookie"]
    assert cookie.startswith("moonreel_session=") and "HttpOnly" in cookie and "SameSite=lax" in cookie
    assert ALICE not in cookie
    for path in (PICTURE, VIDEO, EVENTS, "/api/status/{}"):
        assert nobody.get(path.format(alices_job)).status_code == 200

    nobody.delete("/api/session").raise_for_status()
    assert code_of(nobody.get(PICTURE.format(alices_job))) == (401, "unauthorized")


def test_a_session_opens_its_own_keys_jobs_only(nobody: httpx.Client, alices_job: str) -> None:
    nobody.post("/api/session", json={"key": BOB}).raise_for_status()

    assert code_of(nobody.get(VIDEO.format(alices_job))) == (404, "job_not_found")


def test_a_wrong_key_gets_no_session_and_a_forged_session_opens_nothing(nobody: httpx.Client) -> None:
    assert code_of(nobody.post("/api/session", json={"key": "mallory-key-0123456789"})) == (401, "unauthorized")
    nobody.cookies.set("moonreel_session", "key:alice.9999999999." + "0" * 64)
    assert code_of(nobody.get("/api/jobs/list")) == (401, "unauthorized")


# What stays hidden


def test_queries_of_video_urls_are_told_to_the_jobs_owner_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    web = LocalServer()
    web.replies["/there.mp4"], web.replies["/gone.mp4"] = [http(SAMPLE.read_bytes())], [NOT_FOUND]
    urls = [f"http://127.0.0.1:{web.port}/{name}.mp4?token=SECRET" for name in ("there", "gone")]
    try:
        with running_app(tmp_path / "data", allow_private_urls="127.0.0.1") as app, Client(app.url) as client:
            shown = [ended(client, submit(client, url, max_frames=1)) for url in urls]
            page = client.get("/api/jobs/list")
            events = client.get(EVENTS.format(shown[0]["job_id"]))
    finally:
        web.stop()

    assert [of["status"] for of in shown] == ["completed", "failed"]
    assert [of["video_url"] for of in shown] == urls
    assert "SECRET" in web.requests[0]
    assert [job["video_url"] for job in page.json()["jobs"]] == [url.partition("?")[0] + "?…" for url in reversed(urls)]
    for told in (page.text, events.text, shown[1]["error_message"], caplog.text):
        assert "gone.mp4" in told or "there.mp4" in told or "404" in told
        assert "SECRET" not in told
