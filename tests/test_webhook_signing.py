"""What a webhook says and how it is signed, where it may go, and the secret. Sending: test_webhooks.py"""

import base64
import json
import re
from pathlib import Path

import pytest

from jobs.webhooks import check_webhook_url, load_secret, new_event, sign
from pipeline.errors import InvalidOption
from pipeline.urls import UrlRules

SECRET = "whsec_" + base64.b64encode(bytes(range(32))).decode()


def test_an_event_has_what_the_standard_asks_for() -> None:
    first, second = (new_event("job.failed", {"job_id": "job_1", "word": "käse"}, 1_700_000_000.25) for _ in range(2))

    assert json.loads(first["body"]) == {
        "type": "job.failed",
        "timestamp": "2023-11-14T22:13:20.250Z",
        "data": {"job_id": "job_1", "word": "käse"},
    }
    assert re.fullmatch("msg_[0-9a-f]{32}", first["webhook_id"]) and first["webhook_id"] != second["webhook_id"]


def test_a_signature_is_the_one_of_the_standard() -> None:
    """The example of the specification's reference implementations."""
    secret, body = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", b'{"test": 2432232314}'

    signature = sign(secret, "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, body)

    assert signature == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


@pytest.mark.parametrize(
    "url", ["ftp://a.example/", "http://127.0.0.1/", "http://a.example:22/", "http://u:p@a.example"]
)
def test_a_url_that_may_not_be_followed_is_an_invalid_option(url: str) -> None:
    with pytest.raises(InvalidOption, match=r"^webhook_url: "):
        check_webhook_url(url, UrlRules())


def test_a_proper_url_is_read() -> None:
    assert str(check_webhook_url("https://A.example/x?y", UrlRules())) == "https://a.example/x?y"


@pytest.mark.parametrize("num_bytes", [24, 64])
def test_the_secret_of_the_setting_is_used(tmp_path: Path, num_bytes: int) -> None:
    secret = "whsec_" + base64.b64encode(bytes(num_bytes)).decode()

    assert load_secret(f" {secret}\n", tmp_path) == secret
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "text",
    [
        "hunter22",
        SECRET.removeprefix("whsec_"),
        SECRET[:20],
        SECRET + "AAAA",
        SECRET[:-1],
        "whsec_" + "A" * 88,
        "whsec_ä",
    ],
)
def test_a_wrong_secret_is_refused_without_telling_it(tmp_path: Path, text: str) -> None:
    with pytest.raises(InvalidOption, match=r"^webhook_secret has to be whsec_ and the base64 of 24 to 64") as caught:
        load_secret(text, tmp_path)
    assert text not in str(caught.value)


@pytest.mark.parametrize("setting", [None, ""])
def test_a_secret_is_made_once_and_kept_private(tmp_path: Path, setting: str | None) -> None:
    secret = load_secret(setting, tmp_path)

    (path,) = tmp_path.iterdir()
    assert (path.name, path.stat().st_mode & 0o777) == ("webhook-secret", 0o600)
    assert load_secret(setting, tmp_path) == secret == load_secret(secret, tmp_path)


def test_a_secret_file_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "webhook-secret").write_bytes(b"\xff")
    with pytest.raises(InvalidOption, match="webhook-secret has to be whsec_"):
        load_secret(None, tmp_path)

    with pytest.raises(InvalidOption, match="nowhere/webhook-secret cannot be used: No such file or directory"):
        load_secret(None, tmp_path / "nowhere")
