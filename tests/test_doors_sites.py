"""Which requests the doors let in: names of this server, and pages of this site or a listed one.

Sizes and headers: test_doors_middleware.py. Both ask as door_client.py does.
"""

import asyncio
import json

import pytest
from door_client import HOST, App, Pairs, ask, doors, scope_of
from starlette.types import Message, Receive, Scope, Send

from jobs.doors import LOOPBACK_NAMES, Site, default_allowed_hosts, is_loopback, parse_origin, parse_site
from pipeline.errors import InvalidOption

FRIEND = "https://friend.example"  # listed in CORS_ORIGINS


# Hosts


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "LocalHost:7860",
        "localhost.",
        "localhost.:80",
        "localhost:",
        "127.0.0.1:7860",
        "[::1]:7860",
        "[::1]",
        "[0:0:0:0:0:0:0:1]:7860",
        "video.example.org",
        "VIDEO.example.org.:443",
        "a.lan.example",
        "a.b.lan.example:8080",
    ],
)
def test_a_name_of_this_server_comes_in(host: str) -> None:
    assert ask(doors(), headers=[("Host", host)]).status == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "localhost.evil.example",
        "evil-localhost",
        "www.video.example.org",
        "lan.example",
        "evillan.example",
        ".lan.example",
        "*.lan.example",
        "127.0.0.2",
        "[::2]",
        "[::1",
        "::1",
        "[127.0.0.1]",
        "[::1%lo]",
        "[:::]",
        "user@localhost",
        "localhost:7860:1",
        "localhost:x",
        "localhost:99999",
        "localhost..",
        "localhost/",
        "localhost, localhost",
        " localhost",
        "löcalhost",
        "",
        ".",
    ],
)
@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "POST"])
def test_another_name_or_a_malformed_one_stays_out(host: str, method: str) -> None:
    """DNS rebinding: the page of evil.example, whose name leads to 127.0.0.1 now, is of this origin to its browser."""
    answer = ask(doors(), method, headers=[("Host", host)])

    assert (answer.status, answer.code) == (400, "foreign_host")


@pytest.mark.parametrize("headers", [[], [HOST, HOST], [HOST, ("Host", "evil.example")]])
@pytest.mark.parametrize("allowed_hosts", [None, ["localhost"]])
def test_a_missing_or_repeated_host_stays_out(headers: Pairs, allowed_hosts: list[str] | None) -> None:
    assert ask(doors(allowed_hosts=allowed_hosts), headers=headers).code == "foreign_host"


def test_the_refusal_says_which_setting_to_change() -> None:
    answer = ask(doors(), headers=[("Host", "Nas.Local:7860")])

    assert "by the name nas.local." in json.loads(answer.body)["detail"]
    assert "ALLOWED_HOSTS" in json.loads(answer.body)["detail"]


def test_any_name_comes_in_where_names_are_not_known_but_no_malformed_one() -> None:
    app = doors(allowed_hosts=None)

    assert ask(app, headers=[("Host", "someone-video.hf.space")]).status == 200
    assert ask(app, headers=[("Host", "a b")]).code == "foreign_host"


def test_names_known_by_default_are_those_of_the_address_listened_on() -> None:
    assert default_allowed_hosts("127.0.0.1", []) == {"localhost", "127.0.0.1", "::1"}
    assert default_allowed_hosts("127.0.0.7", ["nas.local"]) == {*LOOPBACK_NAMES, "127.0.0.7", "nas.local"}
    assert default_allowed_hosts("0.0.0.0", ["nas.local"]) == {*LOOPBACK_NAMES, "0.0.0.0", "nas.local"}
    assert default_allowed_hosts("0.0.0.0", []) is None
    assert doors(allowed_hosts=default_allowed_hosts("[::1]", ["::2"]))._allowed_hosts == {*LOOPBACK_NAMES, "::2"}


def test_loopback_is_what_leads_to_this_computer_only() -> None:
    assert all(map(is_loopback, ["localhost", "LOCALHOST", "127.0.0.1", "127.9.9.9", "::1", "[::1]"]))
    assert not any(map(is_loopback, ["", "0.0.0.0", "::", "10.0.0.1", "example.org", "localhost.example.org"]))


@pytest.mark.parametrize("entry", ["https://a.example", "a b", "*", "*.", "a.*.example", "", "::x"])
def test_a_setting_that_names_no_host_is_refused(entry: str) -> None:
    with pytest.raises(InvalidOption, match="ALLOWED_HOSTS"):
        doors(allowed_hosts=[entry])


@pytest.mark.parametrize(
    "entry", ["*", "null", "a.example", "https://a.example/page", "https://", "https://u@a.example"]
)
def test_a_setting_that_names_no_origin_is_refused(entry: str) -> None:
    with pytest.raises(InvalidOption, match="CORS_ORIGINS"):
        doors(cors_origins=[entry])
    with pytest.raises(InvalidOption, match="EMBED_ORIGINS"):
        doors(embed_origins=[entry])


def test_a_host_and_an_origin_are_compared_without_scheme_and_default_ports() -> None:
    assert parse_site("A.example:443") == parse_site("a.example.") == parse_origin("http://a.example:80")
    assert parse_site("[2001:DB8:0::1]:81") == Site("2001:db8::1", 81) == parse_origin("https://[2001:db8::1]:81")
    assert parse_origin("null") is parse_origin("https://a.example/") is parse_origin("//a.example") is None


# Other sites


def origin(value: str) -> tuple[str, str]:
    return ("Origin", value)


def fetch_site(value: str) -> tuple[str, str]:
    return ("Sec-Fetch-Site", value)


OWN_REQUESTS: list[Pairs] = [
    [HOST],
    [HOST, fetch_site("same-origin")],
    [HOST, fetch_site("none")],
    [HOST, origin("http://localhost:7860"), fetch_site("same-origin")],
    [("Host", "video.example.org"), origin("https://video.example.org")],
    [("Host", "video.example.org:80"), origin("https://video.example.org:443")],
    [("Host", "[::1]:7860"), origin("http://[::1]:7860")],
]
FOREIGN_REQUESTS: list[Pairs] = [
    [HOST, origin("https://evil.example"), fetch_site("cross-site")],
    [HOST, origin("http://localhost:3000")],
    [HOST, origin("http://localhost")],
    [HOST, origin("http://127.0.0.1:7860")],
    [HOST, origin("null")],
    [HOST, origin("")],
    [HOST, origin("http://localhost:7860"), origin("http://localhost:7860")],
    [HOST, origin("http://localhost:7860 https://evil.example")],
    [HOST, origin("http://localhost:7860@evil.example")],
    [HOST, origin("localhost:7860")],
    [HOST, fetch_site("cross-site")],
    [HOST, fetch_site("same-site")],
    [HOST, fetch_site("whatever")],
    [HOST, origin(FRIEND + ".evil.example")],
    [HOST, origin("http://friend.example")],
]


@pytest.mark.parametrize("headers", OWN_REQUESTS)
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
def test_this_server_s_own_page_and_programs_come_in(headers: Pairs, method: str) -> None:
    assert ask(doors(), method, headers=headers).status == 200


@pytest.mark.parametrize("headers", FOREIGN_REQUESTS)
@pytest.mark.parametrize("cors_origins", [[], [FRIEND]])
def test_a_page_of_another_site_changes_nothing(headers: Pairs, cors_origins: list[str]) -> None:
    app = doors(cors_origins=cors_origins)

    for method in ("POST", "DELETE", "PUT", "PATCH", "QUERY", "TRACE"):
        answer = ask(app, method, headers=headers)
        assert (answer.status, answer.code) == (403, "cross_site")
        assert "CORS_ORIGINS" in json.loads(answer.body)["detail"]


@pytest.mark.parametrize("headers", [*FOREIGN_REQUESTS, [HOST, origin(FRIEND)]])
def test_without_listed_origins_no_answer_lets_other_sites_read_it(headers: Pairs) -> None:
    """Gradio's own CORS does, with credentials, on every host but localhost."""
    preflight = [*headers, ("Access-Control-Request-Method", "POST")]
    for answer in (ask(doors(), "GET", headers=headers), ask(doors(), "OPTIONS", headers=preflight)):
        assert not any(name.startswith("access-control-") for name in answer.headers)
        assert answer.headers["cross-origin-resource-policy"] == "same-origin"


def test_the_page_of_a_listed_origin_may_use_the_api() -> None:
    app = doors(cors_origins=[FRIEND.title() + "/"])
    headers = [HOST, origin(FRIEND), fetch_site("cross-site")]

    wanted = [("Access-Control-Request-Method", "POST"), ("Access-Control-Request-Headers", "authorization")]
    preflight = ask(app, "OPTIONS", headers=[*headers, *wanted])
    assert preflight.status == 200
    assert preflight.headers["access-control-allow-origin"] == FRIEND
    assert "DELETE" in preflight.headers["access-control-allow-methods"]
    assert "Idempotency-Key" in preflight.headers["access-control-allow-headers"]

    answer = ask(app, "POST", headers=headers)
    assert answer.status == 200
    assert answer.headers["access-control-allow-origin"] == FRIEND
    assert "Retry-After" in answer.headers["access-control-expose-headers"]
    assert answer.headers["cross-origin-resource-policy"] == "cross-origin"
    assert "Origin" in answer.headers["vary"]
    assert "access-control-allow-credentials" not in preflight.headers | answer.headers

    refused = ask(app, "POST", "/json", headers=[*headers, ("Content-Length", "1001")])
    assert (refused.code, refused.headers["access-control-allow-origin"]) == ("too_large", FRIEND)


def test_the_page_of_an_unlisted_origin_may_not_beside_a_listed_one() -> None:
    app = doors(cors_origins=[FRIEND])
    headers = [HOST, origin("https://evil.example")]

    assert ask(app, "OPTIONS", headers=[*headers, ("Access-Control-Request-Method", "POST")]).status == 400
    assert "access-control-allow-origin" not in ask(app, headers=headers).headers


def connect(app: App, headers: Pairs) -> list[Message]:
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "websocket.connect"}

    async def send(message: Message) -> None:
        sent.append(message)

    asyncio.run(app(scope_of("websocket", "GET", "/", headers), receive, send))
    return sent


async def accept(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "websocket.accept"})


def test_web_sockets_are_for_this_server_s_own_page_and_programs() -> None:
    """Any site may open one, and read it: browsers ask no leave."""
    app = doors(accept, cors_origins=[FRIEND])

    for headers in (*OWN_REQUESTS, [HOST, origin(FRIEND)]):
        assert connect(app, headers) == [{"type": "websocket.accept"}]
    for headers in (*FOREIGN_REQUESTS, [("Host", "evil.example")], []):
        assert connect(app, headers) == [{"type": "websocket.close", "code": 1008}]
