"""No secret of the server's or of a caller's comes out: not in an answer, the log, the metrics or a journal.

One server, with a secret of every kind, is asked in every way that could make it say one."""

import base64
from collections.abc import Iterator
from urllib.parse import quote

import httpx
import pytest
from local_server import LocalServer
from serving import SAMPLE, ServerProcess, wait_until

API_KEY, ADMIN_KEY, WRONG_KEY = "apikey-0123456789-alice", "adminkey-0123456789-root", "wrongkey-0123456789-eve"
HOOK_SECRET = "whsec_" + base64.b64encode(b"the-webhooks-secret-of-this-server").decode()
PROXY_PASSWORD, HUB_TOKEN = "proxy-password-0123", "hf_hubtoken0123456789"
URL_PASSWORD, URL_TOKEN, HOOK_TOKEN = "url-password-0123", "url-token-0123456789", "hook-token-0123456789"
OURS = [API_KEY, ADMIN_KEY, HOOK_SECRET.removeprefix("whsec_"), PROXY_PASSWORD, HUB_TOKEN]


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """All that the server has said to others than the owner: answers, metrics, its log; and what it has written."""
    folder, web = tmp_path_factory.mktemp("secrets"), LocalServer()
    web.replies["/hook"] = [b"HTTP/1.1 500 No\r\nContent-Length: 0\r\n\r\n"]
    settings = {
        "page": True,
        "api_keys": f"alice:{API_KEY}",
        "admin_keys": f"root:{ADMIN_KEY}",
        "webhook_secret": HOOK_SECRET,
        "proxy_url": f"http://user:{PROXY_PASSWORD}@127.0.0.1:{web.port}",
        "log_format": "json",
    }
    with ServerProcess(folder / "data", environment={"HF_TOKEN": HUB_TOKEN}, **settings).start() as server:
        answers = [answer.text + str(answer.headers) for answer in ask(server)]
        assert server.stop() == 0
    web.stop()
    journals = "".join(path.read_text(encoding="utf-8") for path in (folder / "data").rglob("*.jsonl"))
    yield {"answers": "\n".join(answers), "log": server.log.read_text(encoding="utf-8"), "journals": journals}


def ask(server: ServerProcess) -> Iterator[httpx.Response]:
    """In every way that could make it say one."""
    alice, root, eve = ({"Authorization": f"Bearer {key}"} for key in (API_KEY, ADMIN_KEY, WRONG_KEY))
    with server.client() as http:
        for headers in (
            {},
            alice,
            root,
            eve,
            {"Authorization": f"Basic {WRONG_KEY}"},
            {"Cookie": f"moonreel_session={WRONG_KEY}"},
        ):
            for path in (
                "/",
                "/config",
                "/metrics",
                "/openapi.json",
                "/api/jobs/list",
                "/gradio_api/info",
                "/api/ready",
            ):
                yield http.get(path, headers=headers)
            yield http.get(f"/api/{API_KEY}?key={ADMIN_KEY}", headers=headers)
        yield http.post("/api/session", json={"key": WRONG_KEY})
        yield http.post("/api/session", json={"key": [ADMIN_KEY]})
        yield http.post("/api/session", content=f'{{"key": "{API_KEY}"')
        assert http.post("/api/session", json={"key": API_KEY}).status_code == 204  # its cookie is the owner's
        http.cookies.clear()
        for body in (
            {"video_url": f"https://user:{URL_PASSWORD}@video.example/v.mp4"},
            {"video_url": f"ftp://video.example/?{URL_TOKEN}"},
            {"video_url": "https://video.example/v.mp4", "webhook_url": f"ftp://hooks.example/?{HOOK_TOKEN}"},
        ):
            yield http.post("/api/submit", json=body, headers=alice)
        hooked = {"webhook_url": f"http://hooks.example/hook?token={HOOK_TOKEN}"}
        job = http.post(
            "/api/submit", json={"video_url": f"http://v.example/v.mp4?token={URL_TOKEN}", **hooked}, headers=alice
        )
        job_id = job.json()["job_id"]
        wait_until(lambda: http.get(f"/api/status/{job_id}", headers=alice).json()["status"] == "failed")
        yield http.get("/api/jobs/list", headers=alice)
        yield http.get("/api/jobs/list", headers=root)
        yield http.get(f"/api/status/{job_id}", headers=eve)
        done = http.post("/api/upload", files={"file": ("v.mp4", SAMPLE.read_bytes())}, headers=alice).json()["job_id"]
        wait_until(lambda: http.get(f"/api/status/{done}", headers=alice).json()["status"] == "completed")
        (server.settings["data_dir"] / "jobs" / done / "video").unlink()
        (server.settings["data_dir"] / "jobs" / done / "video").mkdir()  # an error that nobody expects
        broken = http.get(f"/api/jobs/{done}/video", headers=alice)
        assert broken.status_code >= 400
        yield broken
        yield http.get("/metrics", headers=root)


def spellings(secret: str) -> list[str]:
    return [secret, quote(secret, safe=""), base64.b64encode(secret.encode()).decode().rstrip("=")]


@pytest.mark.parametrize("where", ["answers", "log", "journals"])
@pytest.mark.parametrize("secret", [*OURS, WRONG_KEY])
def test_no_key_or_password_comes_out(said: dict[str, str], where: str, secret: str) -> None:
    assert [text for text in spellings(secret) if text in said[where]] == []


@pytest.mark.parametrize("secret", [URL_PASSWORD, URL_TOKEN, HOOK_TOKEN])
def test_what_a_url_hides_is_told_to_its_owner_only(said: dict[str, str], secret: str) -> None:
    assert secret not in said["log"] and secret not in said["answers"]


def test_there_was_something_to_find(said: dict[str, str]) -> None:
    assert URL_TOKEN in said["journals"]  # a retry needs it
    assert "moonreel_frames_total" in said["answers"] and "not known here" in said["answers"]
    assert "v.example" in said["log"] and "hooks.example" in said["log"]
