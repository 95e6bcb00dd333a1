"""Who asks: keys, sessions and visitors; what each may see, and how often each may ask."""

import stat
from pathlib import Path

import pytest
from starlette.applications import Starlette
from starlette.requests import HTTPConnection, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.testclient import TestClient

from jobs import auth
from jobs.auth import (
    MAX_GUESSES,
    SESSION_COOKIE,
    SESSION_S,
    VISITOR_COOKIE,
    Caller,
    Gate,
    RateLimit,
    check_exposure,
    load_secret_bytes,
    parse_keys,
    rate_key,
)
from pipeline.errors import InvalidOption, RateLimited, Unauthorized

ALICE_KEY, BOB_KEY, NAMELESS_KEY, ADMIN_KEY = "alice-key-0123456789==", "b" * 16, "c/d+" * 8, "root" * 8
KEYS = parse_keys(f"alice:{ALICE_KEY}, bob:{BOB_KEY},{NAMELESS_KEY},", f"root:{ADMIN_KEY}")
SECRET = bytes(range(32))
ALICE = Caller("key:alice")


class Clock:
    """Stands still until it is set."""

    now = 1_000_000.5

    def __call__(self) -> float:
        return self.now


def client(gate: Gate, base_url: str = "http://localhost") -> TestClient:
    """A client of an app with the routes whoami, login and logout."""

    def whoami(request: Request) -> Response:
        try:
            caller = gate.identify(request)
        except Unauthorized as error:
            return JSONResponse({"code": error.code, "detail": str(error)}, 401)
        response = JSONResponse({"owner": caller.owner, "is_admin": caller.is_admin})
        gate.set_visitor(request, response, caller)
        return response

    def login(request: Request) -> Response:
        response = Response(status_code=204)
        gate.set_session(request, response, gate.session_cookie(gate.identify(request)))
        return response

    def logout(request: Request) -> Response:
        response = Response(status_code=204)
        gate.set_session(request, response, "")
        return response

    routes = [Route(f"/{f.__name__}", f, methods=["GET", "POST"]) for f in (whoami, login, logout)]
    return TestClient(Starlette(routes=routes), base_url)


def bearer(key: str, scheme: str = "Bearer") -> dict[str, str]:
    return {"Authorization": f"{scheme} {key}"}


def connection(*, cookie: str = "", client: tuple[str, int] | None = ("192.0.2.1", 5)) -> HTTPConnection:
    headers = [(b"cookie", cookie.encode())] if cookie else []
    return HTTPConnection({"type": "http", "headers": headers, "client": client})


def test_keys_are_kept_as_hashes_under_their_names() -> None:
    owners = [caller.owner for caller in KEYS.values()]

    assert owners[:2] == ["key:alice", "key:bob"]
    assert owners[2] == f"key:{list(KEYS)[2].hex()[:16]}"
    assert [caller.is_admin for caller in KEYS.values()] == [False, False, False, True]
    assert not any(key in repr(KEYS) for key in (ALICE_KEY, BOB_KEY, NAMELESS_KEY, ADMIN_KEY))


def test_no_keys_are_no_keys() -> None:
    assert parse_keys("") == parse_keys(" , ", "\n") == {}


@pytest.mark.parametrize(
    ("api_keys", "admin_keys", "where"),
    [
        ("alice:short-secret", "", "entry 1"),
        (f"alice:{ALICE_KEY},alice={BOB_KEY}:", "", "entry 2"),
        (f"al ice:{ALICE_KEY}", "", "entry 1"),
        (f"{'x' * 33}:{ALICE_KEY}", "", "entry 1"),
        (f"{BOB_KEY}:alice", "", "entry 1"),
        (f":{ALICE_KEY}", "", "entry 1"),
        (f"{ALICE_KEY}é", "", "entry 1"),
        (f"alice:{ALICE_KEY},alice:{BOB_KEY}", "", "entry 2"),
        (f"alice:{ALICE_KEY},bob:{ALICE_KEY}", "", "entry 2"),
        (f"alice:{ALICE_KEY}", f"root:{ALICE_KEY}", "ADMIN_KEYS: the key or name of entry 1"),
        (f"alice:{ALICE_KEY}", f"alice:{ADMIN_KEY}", "ADMIN_KEYS: the key or name of entry 1"),
    ],
)
def test_wrong_keys_in_the_settings_are_named_by_number_and_never_quoted(
    api_keys: str, admin_keys: str, where: str
) -> None:
    with pytest.raises(InvalidOption, match=where) as caught:
        parse_keys(api_keys, admin_keys)

    words = f"{api_keys},{admin_keys}".replace(":", ",").split(",")
    assert not any(word in str(caught.value) for word in words if len(word) > 5)


def test_a_key_opens_by_bearer_header() -> None:
    with client(Gate(KEYS, SECRET)) as http:
        assert http.get("/whoami", headers=bearer(ALICE_KEY)).json() == {"owner": "key:alice", "is_admin": False}
        assert http.get("/whoami", headers=bearer(ADMIN_KEY, "bearer ")).json() == {
            "owner": "key:root",
            "is_admin": True,
        }
        assert http.get("/whoami", headers=bearer(NAMELESS_KEY)).status_code == 200


@pytest.mark.parametrize(
    "headers", [{}, bearer(""), bearer("wrong"), bearer(ALICE_KEY + "x"), bearer(ALICE_KEY, "Basic"), bearer("é" * 16)]
)
def test_without_a_valid_key_nobody_comes_in_and_the_answer_says_what_to_send(headers: dict[str, str]) -> None:
    with client(Gate(KEYS, SECRET)) as http:
        answer = http.get(
            "/whoami", headers={name.encode(): value.encode("latin-1") for name, value in headers.items()}
        )

    assert (answer.status_code, answer.json()["code"]) == (401, "unauthorized")
    assert "Authorization: Bearer KEY" in answer.json()["detail"]
    assert "set-cookie" not in answer.headers


def test_a_key_from_a_form_may_hold_anything() -> None:
    with pytest.raises(Unauthorized):
        Gate(KEYS, SECRET).check_key(connection(), "\ud800" * 16)


def test_the_page_logs_in_and_out_by_cookie() -> None:
    with client(Gate(KEYS, SECRET)) as http:
        cookie = http.post("/login", headers=bearer(ALICE_KEY)).headers["set-cookie"]
        assert cookie.endswith(f"; HttpOnly; Max-Age={SESSION_S}; Path=/; SameSite=lax")
        assert '"' not in cookie and ALICE_KEY not in cookie
        assert http.get("/whoami").json()["owner"] == "key:alice"
        assert http.get("/whoami", headers=bearer("for-the-proxy", "Basic")).json()["owner"] == "key:alice"
        assert http.get("/whoami", headers=bearer("wrong")).status_code == 401

        http.post("/logout")
        assert http.get("/whoami").status_code == 401


@pytest.mark.parametrize(
    ("base_url", "forwarded", "is_secure"),
    [
        ("http://localhost", None, False),
        ("https://localhost", None, True),
        ("http://localhost", "https", True),
        ("http://localhost", "HTTPS, http", True),
        ("http://localhost", "http", False),
    ],
)
def test_cookies_are_secure_where_the_browser_uses_https(base_url: str, forwarded: str | None, is_secure: bool) -> None:
    headers = {"X-Forwarded-Proto": forwarded} if forwarded else {}
    with client(Gate({}, SECRET), base_url) as http:
        assert ("; Secure" in http.get("/whoami", headers=headers).headers["set-cookie"]) == is_secure


@pytest.mark.parametrize(("base_url", "end"), [("https://localhost", "none; Secure; Partitioned"), ("http://a", "lax")])
def test_cookies_come_back_from_a_frame_of_another_site(base_url: str, end: str) -> None:
    """SameSite=lax is not sent there, so that every request was a new visitor's."""
    with client(Gate({}, SECRET, is_embedded=True), base_url) as http:
        assert http.get("/whoami").headers["set-cookie"].endswith(f"; Path=/; SameSite={end}")


@pytest.mark.parametrize("is_embedded", [False, True])
def test_a_login_and_a_logout_remove_the_cookie_of_the_other_kind(is_embedded: bool) -> None:
    """Who had logged in before EMBED_ORIGINS was changed could not log out."""
    with client(Gate(KEYS, SECRET, is_embedded=is_embedded), "https://localhost") as http:
        login = http.post("/login", headers=bearer(ALICE_KEY)).headers.get_list("set-cookie")
        assert http.get("/whoami").json()["owner"] == "key:alice"
        logout = http.post("/logout").headers.get_list("set-cookie")

    for cookies in (login, logout):
        removed, made = cookies
        assert "=; HttpOnly; Max-Age=0; " in removed
        assert ("Partitioned" in removed, "Partitioned" in made) == (not is_embedded, is_embedded)


def identify(gate: Gate, session: str) -> Caller:
    return gate.identify(connection(cookie=f"{SESSION_COOKIE}={session}"))


def test_a_session_ends_after_30_days() -> None:
    clock = Clock()
    gate = Gate(KEYS, SECRET, clock)
    session = gate.session_cookie(ALICE)

    clock.now += SESSION_S - 1
    assert identify(gate, session) == ALICE
    clock.now += 1
    with pytest.raises(Unauthorized):
        identify(gate, session)


@pytest.mark.parametrize(
    "keys", [f"bob:{BOB_KEY}", f"alice:{ALICE_KEY}x,bob:{BOB_KEY}", f"alice:{BOB_KEY},bob:{ALICE_KEY}"]
)
def test_a_session_ends_when_its_key_leaves_the_settings(keys: str) -> None:
    session = Gate(KEYS, SECRET).session_cookie(ALICE)

    with pytest.raises(Unauthorized):
        identify(Gate(parse_keys(keys), SECRET), session)


def test_a_session_outlives_a_restart_and_changes_of_other_keys() -> None:
    session = Gate(KEYS, SECRET).session_cookie(ALICE)

    assert identify(Gate(parse_keys(f"alice:{ALICE_KEY}"), SECRET), session) == ALICE


def test_a_session_is_taken_from_nobody_else() -> None:
    gate = Gate(KEYS, SECRET)
    owner, expiry, signature = gate.session_cookie(ALICE).split(".")
    forgeries = [
        f"key:root.{expiry}.{signature}",
        f"{owner}.{int(expiry) + 1}.{signature}",
        f"{owner}.{expiry}.{signature[:-1]}",
        f"{owner}.{expiry}.{signature}.",
        f"{owner}.{expiry}.",
        f"{owner}..é",
        f"{owner}",
        "..",
        Gate(KEYS, bytes(32)).session_cookie(ALICE),
    ]

    assert identify(gate, f"{owner}.{expiry}.{signature}") == ALICE
    for forgery in forgeries:
        with pytest.raises(Unauthorized):
            identify(gate, forgery)


def test_without_keys_a_visitor_is_known_by_a_cookie_and_named_by_its_hash() -> None:
    with client(Gate({}, SECRET)) as http:
        first = http.get("/whoami")
        cookie = http.cookies[VISITOR_COOKIE]
        again = http.get("/whoami", headers=bearer("whatever"))

    assert first.headers["set-cookie"].endswith("; HttpOnly; Max-Age=31536000; Path=/; SameSite=lax")
    assert len(cookie) == 32 and cookie not in first.text
    assert again.json() == first.json() and "set-cookie" not in again.headers
    assert len(first.json()["owner"]) == len("visitor:") + 32


@pytest.mark.parametrize("cookie", ["", "x", "0" * 31, "A" * 32, "0" * 33, '"1"'])
def test_a_visitor_without_a_good_cookie_gets_a_new_one(cookie: str) -> None:
    first, second = (Gate({}, SECRET).identify(connection(cookie=f"{VISITOR_COOKIE}={cookie}")) for _ in range(2))

    assert first.new_cookie and second.new_cookie and first.owner != second.owner
    assert first.new_cookie not in repr(first)


def test_with_keys_each_sees_its_own_and_an_admin_all_and_without_keys_whoever_knows_the_id() -> None:
    root, visitor = Caller("key:root", is_admin=True), Caller("visitor:1")

    assert ALICE.may_see("key:alice", has_keys=True)
    assert not ALICE.may_see("key:bob", has_keys=True)
    assert not ALICE.may_see("visitor:1", has_keys=True)
    assert root.may_see("key:bob", has_keys=True) and root.may_see("visitor:1", has_keys=True)
    assert visitor.may_see("visitor:2", has_keys=False)


def test_the_secret_is_made_once_and_for_its_owner_only(tmp_path: Path) -> None:
    secret = load_secret_bytes(tmp_path)

    assert len(secret) == 32 and load_secret_bytes(tmp_path) == secret
    assert [path.name for path in tmp_path.iterdir()] == ["session-secret"]
    assert stat.S_IMODE((tmp_path / "session-secret").stat().st_mode) == 0o600


def test_the_secret_is_made_after_a_start_that_was_killed_over_it(tmp_path: Path) -> None:
    (tmp_path / ".session-secret.part").write_text("ab" * 40)

    assert len(load_secret_bytes(tmp_path)) == 32


@pytest.mark.parametrize("text", ["", "ab" * 31, "zz" * 32, "é" * 64])
def test_a_damaged_secret_is_refused_without_quoting_it(tmp_path: Path, text: str) -> None:
    (tmp_path / "session-secret").write_text(text, encoding="utf-8")

    with pytest.raises(InvalidOption, match=r"session-secret is damaged\. Delete it"):
        load_secret_bytes(tmp_path)


def test_a_secret_that_cannot_be_kept_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidOption, match="cannot be read or written"):
        load_secret_bytes(tmp_path / "missing")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "localhost", "::1", "[::1]"])
def test_this_computer_alone_needs_no_keys(host: str) -> None:
    check_exposure(host, has_keys=False, allow_anonymous=False)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "192.168.1.2", "example.org", "127.0.0.1.example.org"])
def test_other_computers_need_keys_or_leave(host: str) -> None:
    check_exposure(host, has_keys=True, allow_anonymous=False)
    check_exposure(host, has_keys=False, allow_anonymous=True)
    with pytest.raises(InvalidOption, match="API_KEYS, or ALLOW_ANONYMOUS"):
        check_exposure(host, has_keys=False, allow_anonymous=False)


def test_a_burst_passes_and_then_one_request_per_interval() -> None:
    clock = Clock()
    limit = RateLimit(per_minute=7, burst=3, clock=clock)

    assert [limit.take("a") for _ in range(5)] == [0, 0, 0, 8.571, 8.571]
    assert limit.take("b") == 0
    clock.now += 8.571
    assert [limit.take("a") for _ in range(2)] == [0, 8.572]
    clock.now += 3600
    assert [limit.take("a") for _ in range(4)] == [0, 0, 0, 8.571]


def test_the_rate_limit_forgets_who_is_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    limit = RateLimit(per_minute=60, burst=10, clock=clock)
    for i in range(100):
        limit.take(str(i))
    clock.now += 1
    limit.take("last")
    assert list(limit._whole_at) == ["last"]

    monkeypatch.setattr(auth, "MAX_BUCKETS", 5)
    for i in range(100):
        limit.take(str(i))
    assert list(limit._whole_at) == ["95", "96", "97", "98", "99"]


def test_a_key_is_limited_wherever_it_is_used_and_a_visitor_by_address() -> None:
    def key(host: str, caller: Caller) -> str:
        return rate_key(connection(client=(host, 1)), caller)

    visitor, other = Caller("visitor:1"), Caller("visitor:2")
    assert key("192.0.2.1", ALICE) == key("192.0.2.2", ALICE) == "key:alice"
    assert key("192.0.2.1", visitor) == key("192.0.2.1", other) != key("192.0.2.2", visitor)
    assert key("2001:db8::1", visitor) == key("2001:db8::ffff:0:0:9", visitor) != key("2001:db8:0:1::1", visitor)
    assert key("::ffff:192.0.2.1", visitor) != key("::ffff:192.0.2.2", visitor)
    assert rate_key(connection(client=None), visitor) == ""


def test_who_guesses_keys_is_asked_to_wait_but_not_who_used_a_right_one_there() -> None:
    gate, guesser, other = Gate(KEYS, SECRET), connection(), connection(client=("192.0.2.2", 5))
    assert gate.check_key(guesser, ALICE_KEY) == ALICE

    for _ in range(MAX_GUESSES):
        with pytest.raises(Unauthorized):
            gate.check_key(guesser, "wrong-0123456789abc")
    for key in ("wrong-0123456789abc", BOB_KEY):  # right or not, it is not told
        with pytest.raises(RateLimited, match="Too many wrong keys from your address") as refused:
            gate.check_key(guesser, key)
        assert 0 < refused.value.retry_after_s <= 6

    assert gate.check_key(guesser, ALICE_KEY) == ALICE
    assert gate.check_key(other, BOB_KEY).owner == "key:bob"


def test_a_limit_of_bytes_counts_each() -> None:
    now_s = 0.0
    limit = RateLimit(per_minute=60, burst=100, clock=lambda: now_s)  # a byte each second

    assert [limit.take("a", 60), limit.take("a", 40)] == [0, 0]
    assert (limit.take("a", 10), limit.wait_s("a"), limit.wait_s("b")) == (10, 1, 0)
