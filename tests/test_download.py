"""The downloader against a real web server on this host, and against everything that tries to lead it astray.

That strangers' URLs reach nothing is asserted twice: by a server that counts connections, and by the addresses that the
client asked to be connected to.
"""

import contextlib
import logging
import re
import socket
import ssl
import threading
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest
import trustme
from local_server import MP4, Lab, LocalServer, Reply, http, redirect

from pipeline.addresses import IPAddress
from pipeline.download import Download, DownloadLimits, check_video_url, download
from pipeline.errors import Canceled, DescriberError, DownloadFailed, UnsupportedUrl, VideoTooLarge, VideoUnreadable
from pipeline.urls import UrlRules

ONE_TRY = DownloadLimits(max_tries=1)


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def trusting(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    authority.configure_trust(context)
    return context


@pytest.fixture
def lab(trusting: ssl.SSLContext) -> Lab:
    """127.0.0.1 counts as public, 127.0.0.2 and everything else on this host does not."""
    lab = Lab()
    lab.public = {"127.0.0.1"}
    lab.names = {"video.example": ["127.0.0.1"]}
    lab.ssl_context = trusting
    return lab


@pytest.fixture
def server() -> Iterator[LocalServer]:
    server = LocalServer()
    server.replies["/video.mp4"] = [http(MP4, headers=("Content-Type: video/mp4",))]
    yield server
    server.stop()


@pytest.fixture
def tls_server(authority: trustme.CA) -> Iterator[LocalServer]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("video.example").configure_cert(context)
    server = LocalServer(tls=context)
    server.replies["/video.mp4"] = [http(MP4)]
    yield server
    server.stop()


@pytest.fixture
def canary(server: LocalServer) -> Iterator[LocalServer]:
    """Listens where nobody may come: on 127.0.0.2, at the server's port."""
    canary = LocalServer("127.0.0.2", server.port)
    canary.replies = server.replies
    yield canary
    canary.stop()
    assert canary.num_connections == 0


def fetch(lab: Lab, url: str, folder: Path, *servers: LocalServer, **options: object) -> Download:
    """Download into folder, which has to stay empty if that fails."""
    options = {"rules": lab.rules(*(server.port for server in servers)), "network": lab.network(), **options}
    try:
        return download(url, folder / "video", **options)  # type: ignore[arg-type]
    except DescriberError:
        assert list(folder.iterdir()) == []
        raise


# What arrives


def test_a_video_arrives_whole_under_its_name(lab: Lab, server: LocalServer, tmp_path: Path) -> None:
    progress: list[tuple[int, int | None]] = []

    arrived = fetch(
        lab,
        f"http://video.example:{server.port}/video.mp4?token=secret#part",
        tmp_path,
        server,
        on_progress=lambda num_bytes, num_total_bytes: progress.append((num_bytes, num_total_bytes)),
    )

    assert arrived.path.read_bytes() == MP4
    assert list(tmp_path.iterdir()) == [arrived.path]
    assert (arrived.num_bytes, arrived.container, arrived.content_type) == (len(MP4), "mp4", "video/mp4")
    assert arrived.url_shown == f"http://video.example:{server.port}/video.mp4?…"
    assert arrived.num_tries == 1
    assert progress[-1] == (len(MP4), len(MP4)) and progress == sorted(progress)
    assert lab.connected == ["127.0.0.1"]


def test_the_request_names_the_host_and_asks_for_the_plain_file(lab: Lab, server: LocalServer, tmp_path: Path) -> None:
    server.replies["/video.mp4?token=a%20b"] = server.replies["/video.mp4"]

    fetch(lab, f"http://video.example:{server.port}/video.mp4?token=a b", tmp_path, server)

    (head,) = server.requests
    assert head.startswith("GET /video.mp4?token=a%20b HTTP/1.1\r\n")
    assert f"\r\nHost: video.example:{server.port}\r\n" in head
    assert "\r\nAccept-Encoding: identity\r\n" in head
    assert "\r\nUser-Agent: Moonreel\r\n" in head


def test_the_destination_is_replaced_only_by_a_whole_video(lab: Lab, server: LocalServer, tmp_path: Path) -> None:
    (tmp_path / "video").write_bytes(b"old")
    (tmp_path / "video.part").write_bytes(b"left by a killed process" * 1000)
    server.replies["/short.mp4"] = [http(MP4, length=len(MP4) + 1)]
    options = {"rules": lab.rules(server.port), "network": lab.network()}

    with pytest.raises(DownloadFailed):
        download(f"http://video.example:{server.port}/short.mp4", tmp_path / "video", **options)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("video", b"old")]

    download(f"http://video.example:{server.port}/video.mp4", tmp_path / "video", **options)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("video", MP4)]


def test_a_body_without_a_length_is_taken_as_it_comes(lab: Lab, server: LocalServer, tmp_path: Path) -> None:
    chunked = b"%x\r\n%b\r\n%x\r\n%b\r\n0\r\n\r\n" % (100, MP4[:100], len(MP4) - 100, MP4[100:])
    server.replies["/chunked"] = [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunked]
    server.replies["/closing"] = [b"HTTP/1.0 200 OK\r\n\r\n" + MP4]

    for path in ("chunked", "closing"):
        totals: list[int | None] = []
        arrived = fetch(
            lab,
            f"http://video.example:{server.port}/{path}",
            tmp_path,
            server,
            on_progress=lambda _, num_total_bytes, totals=totals: totals.append(num_total_bytes),
        )
        assert arrived.path.read_bytes() == MP4
        assert set(totals) == {None}


def test_redirects_are_followed(lab: Lab, server: LocalServer, tls_server: LocalServer, tmp_path: Path) -> None:
    lab.names["a.example"] = ["127.0.0.1"]
    server.replies["/a"] = [redirect("/b", "301 Moved")]
    server.replies["/b"] = [redirect("c?x=1", "303 See Other")]
    server.replies["/c?x=1"] = [redirect(f"https://video.example:{tls_server.port}/d", "307 Temporary")]
    tls_server.replies["/d"] = [redirect("/video.mp4", "308 Permanent")]

    arrived = fetch(lab, f"http://a.example:{server.port}/a", tmp_path, server, tls_server)

    assert arrived.path.read_bytes() == MP4
    assert arrived.url_shown == f"https://video.example:{tls_server.port}/video.mp4"
    assert lab.asked == ["a.example"] * 3 + ["video.example"] * 2


def test_another_address_is_tried_if_the_first_does_not_answer(lab: Lab, server: LocalServer, tmp_path: Path) -> None:
    lab.names["video.example"] = ["93.184.215.14", "2606:4700::1", "127.0.0.1"]

    assert fetch(lab, f"http://video.example:{server.port}/video.mp4", tmp_path, server).num_tries == 1
    assert lab.connected == ["93.184.215.14", "2606:4700::1", "127.0.0.1"]
    assert lab.timeouts_s[0] <= 10 / 3 and lab.timeouts_s[1] <= 10 / 2  # none may use up the time of the others


def test_an_ipv6_address_stands_in_brackets_in_the_request(lab: Lab, tmp_path: Path) -> None:
    try:
        server = LocalServer("::1")
    except OSError:
        pytest.skip("this host has no IPv6")
    server.replies["/video.mp4"] = [http(MP4)]
    lab.public = {"::1"}

    fetch(lab, f"http://[::1]:{server.port}/video.mp4", tmp_path, server)
    server.stop()

    assert f"\r\nHost: [::1]:{server.port}\r\n" in server.requests[0]


def test_the_certificate_is_checked_against_the_name(lab: Lab, tls_server: LocalServer, tmp_path: Path) -> None:
    lab.names["other.example"] = ["127.0.0.1"]

    assert fetch(lab, f"https://video.example:{tls_server.port}/video.mp4", tmp_path, tls_server)
    (tmp_path / "video").unlink()
    with pytest.raises(DownloadFailed, match=r"certificate is not valid.*Hostname mismatch"):
        fetch(lab, f"https://other.example:{tls_server.port}/video.mp4", tmp_path, tls_server)
    with pytest.raises(DownloadFailed, match=r"certificate is not valid.*IP address mismatch"):
        fetch(lab, f"https://127.0.0.1:{tls_server.port}/video.mp4", tmp_path, tls_server)
    lab.ssl_context = None
    with pytest.raises(DownloadFailed, match=r"certificate is not valid.*issuer"):
        fetch(lab, f"https://video.example:{tls_server.port}/video.mp4", tmp_path, tls_server)
    assert len(tls_server.requests) == 1
    assert tls_server.num_connections == 4  # no second try for a bad certificate


# What may not be followed

HOSTILE = """
http://127.0.0.1:PORT/ http://127.0.0.1.:PORT/ http://localhost:PORT/ http://LOCALHOST.:PORT/ http://127.1:PORT/
http://127.0.1:PORT/ http://0:PORT/ http://0.0.0.0:PORT/ http://127.127.127.127:PORT/ http://0x7f.1:PORT/
http://0x7f000001:PORT/ http://0X7F.0.0.1:PORT/ http://2130706433:PORT/ http://0177.0.0.1:PORT/ http://017700000001:PORT/
http://0127.0.0.1:PORT/ http://127.0.0.01:PORT/ http://127.0.0.1..:PORT/ http://１２７.０.０.１:PORT/
http://127。0。0。1:PORT/ http://①②⑦.⓪.⓪.①:PORT/ http://ⓛⓞⓒⓐⓛⓗⓞⓢⓣ:PORT/ http://١٢٧.0.0.1:PORT/ http://%31%32%37.0.0.1:PORT/
http://127.0.0.1%00.example.com:PORT/ http://0x:PORT/ http://256.0.0.1:PORT/ http://4294967297:PORT/
http://[::1]:PORT/ http://[::]:PORT/ http://[0:0:0:0:0:0:0:1]:PORT/ http://[::127.0.0.1]:PORT/
http://[::ffff:127.0.0.1]:PORT/ http://[::ffff:7f00:1]:PORT/ http://[::FFFF:127.0.0.1]:PORT/
http://[0:0:0:0:0:ffff:127.0.0.1]:PORT/ http://[64:ff9b::7f00:1]:PORT/ http://[64:ff9b::127.0.0.1]:PORT/
http://[64:ff9b:1::7f00:1]:PORT/ http://[2002:7f00:1::]:PORT/ http://[2001:0:7f00:1::1]:PORT/ http://[fe80::1]:PORT/
http://[fe80::1%25eth0]:PORT/ http://[fe80::1%25lo]:PORT/ http://[fe80::1%eth0]:PORT/ http://[::1%25lo]:PORT/
http://[2606:4700::1%25lo]:PORT/ http://[fec0::1]:PORT/ http://[fc00::1]:PORT/ http://[fd00:ec2::254]:PORT/ http://[ff02::1]:PORT/
http://[::1]x:PORT/ http://[127.0.0.1]:PORT/ http://[v1.x]:PORT/ http://[::1:PORT/ http://::1:PORT/
http://169.254.169.254/latest/meta-data/ http://169.254.169.254:PORT/ http://2852039166/ http://0xA9FEA9FE/ http://[::ffff:a9fe:a9fe]/
http://metadata.google.internal/ http://10.0.0.1/ http://172.16.0.1/ http://192.168.1.1/ http://100.64.0.1/
http://100.100.100.200/ http://192.0.0.192/ http://168.63.129.16/ http://198.18.0.1/ http://224.0.0.1/ http://255.255.255.255/
http://user@video.example:PORT/ http://user:secret@video.example:PORT/ http://:@video.example:PORT/ http://@video.example:PORT/
http://video.example:PORT@127.0.0.1:PORT/ http://video.example\\@127.0.0.1:PORT/ http://127.0.0.1:PORT\\@video.example/
http://127.0.0.1:PORT#@video.example/ http://127.0.0.1:PORT?@video.example/ http:\\\\127.0.0.1:PORT/
http://video.example:22/ http://video.example:25/ http://video.example:6379/ http://video.example:0/
http://video.example:65536/ http://video.example:99999999/ http://video.example:-1/ http://video.example:+PORT/
http://video.example:PORTx/ http://video.example:٨٠/ http://video.example:80:80/
gopher://127.0.0.1:PORT/_GET file:///etc/passwd file://127.0.0.1/etc/passwd ftp://127.0.0.1:PORT/
data:video/mp4;base64,AAAA
dict://127.0.0.1:PORT/ ws://127.0.0.1:PORT/ jar:http://127.0.0.1:PORT/!/ unix:/tmp/x //127.0.0.1:PORT/ /etc/passwd
concat:http://127.0.0.1:PORT/ javascript:alert(1) http: http:/ http:// http:/127.0.0.1:PORT/ http:127.0.0.1:PORT
https:///127.0.0.1:PORT/ http://.:PORT/ http://..:PORT/ http://a..b:PORT/ http://-a:PORT/ http://a-.example:PORT/
http://*:PORT/ http://a,b:PORT/ http://private.example:PORT/ http://mixed.example:PORT/ http://mixed6.example:PORT/
http://mapped.example:PORT/ http://nat64.example:PORT/ http://6to4.example:PORT/ http://zone.example:PORT/
http://metadata.example/ http://cgnat.example/ http://many.example:PORT/ https://private.example:PORT/
""".replace("\\\\", "\\").split()
HOSTILE_WITH_BLANKS = [
    "http://127.0.0.1:PORT\t/",
    "http://127.0.0.1\n:PORT/",
    "http://exa\tmple.com/",
    "ht\ntp://127.0.0.1:PORT/",
    "http://video.example:PORT/\r\nHost: 127.0.0.1",
    "http://127.0.0.1 :PORT/",
    "http://video.example :PORT/",
    "http://127.0.0.1\0.video.example:PORT/",
    "\x01http://127.0.0.1:PORT/",
    "",
    " ",
]
HOSTILE_NAMES: dict[str, list[str] | Exception] = {
    "localhost": ["127.0.0.1", "::1"],
    "private.example": ["127.0.0.1"],
    "mixed.example": ["93.184.215.14", "127.0.0.1"],
    "mixed6.example": ["2606:4700::1", "::1"],
    "mapped.example": ["::ffff:127.0.0.1"],
    "nat64.example": ["64:ff9b::7f00:1"],
    "6to4.example": ["2002:7f00:1::1"],
    "zone.example": ["fe80::1%lo"],
    "metadata.example": ["169.254.169.254"],
    "metadata.google.internal": ["169.254.169.254"],
    "cgnat.example": ["100.64.0.1"],
    "many.example": [f"93.184.215.{i}" for i in range(100)] + ["10.0.0.1"],
}


@pytest.fixture(scope="module")
def loopback_canary() -> Iterator[LocalServer]:
    """Listens on 127.0.0.1, where no hostile URL may get; the tests with it take no loopback address for public."""
    canary = LocalServer()
    yield canary
    canary.stop()
    assert canary.num_connections == 0


def test_there_are_many_hostile_urls() -> None:
    assert len(set(HOSTILE + HOSTILE_WITH_BLANKS)) > 120


@pytest.mark.parametrize("url", HOSTILE + HOSTILE_WITH_BLANKS, ids=ascii)
def test_a_hostile_url_connects_to_nothing(url: str, lab: Lab, loopback_canary: LocalServer, tmp_path: Path) -> None:
    lab.public, lab.names = set(), HOSTILE_NAMES

    with pytest.raises(DescriberError) as failure:
        fetch(lab, url.replace("PORT", str(loopback_canary.port)), tmp_path, loopback_canary, limits=ONE_TRY)

    if not isinstance(failure.value, DownloadFailed) or "no host of that name" not in str(failure.value):
        assert isinstance(failure.value, UnsupportedUrl)
        assert str(failure.value).startswith("Invalid video URL: ")
    assert "secret" not in str(failure.value)
    assert lab.connected == []


def test_no_redirect_to_a_hostile_url_connects_to_more_than_the_redirecting_server(
    lab: Lab, server: LocalServer, canary: LocalServer, tmp_path: Path
) -> None:
    """That server has to count as public here, so what leads to its address leads to the canary's instead."""
    for name, answer in HOSTILE_NAMES.items():
        assert isinstance(answer, list)
        lab.names[name] = [address.replace("127.0.0.1", "127.0.0.2") for address in answer]
    for url in HOSTILE + HOSTILE_WITH_BLANKS:
        location = url.replace("127.0.0.1", "127.0.0.2").replace("PORT", str(server.port))
        if location.strip() and not re.search("[\\n\\0]", location):  # a header cannot say these
            server.replies["/start"] = [redirect("/next")]
            server.replies["/next"] = [redirect(location)]

            with pytest.raises(DescriberError):
                fetch(lab, f"http://video.example:{server.port}/start", tmp_path, server, limits=ONE_TRY)
            assert set(lab.connected) == {"127.0.0.1"}, location


def test_what_a_name_leads_to_is_asked_once_and_kept(
    lab: Lab, server: LocalServer, canary: LocalServer, tmp_path: Path
) -> None:
    """Rebinding: a name server that answers a public address to the check and a private one to the connection."""
    answers = iter([["127.0.0.1"], ["127.0.0.2"], ["127.0.0.2"]])

    class Rebinding(dict[str, list[str] | Exception]):
        def get(self, *_: object) -> list[str]:  # type: ignore[override]
            return next(answers)

    lab.names = Rebinding()
    server.replies["/again"] = [redirect("/video.mp4")]

    with pytest.raises(UnsupportedUrl, match=r"Invalid video URL: .*not public"):
        fetch(lab, f"http://video.example:{server.port}/again", tmp_path, server)

    assert lab.asked == ["video.example"] * 2  # once for each request
    assert lab.connected == ["127.0.0.1"]


def test_redirects_end(lab: Lab, server: LocalServer, tmp_path: Path) -> None:
    server.replies["/loop"] = [redirect("/loop")]
    server.replies["/nowhere"] = [http(status="302 Found")]

    with pytest.raises(DownloadFailed, match="redirects more than 5 times"):
        fetch(lab, f"http://video.example:{server.port}/loop", tmp_path, server)
    assert server.num_connections == 6
    with pytest.raises(DownloadFailed, match="redirects to nowhere"):
        fetch(lab, f"http://video.example:{server.port}/nowhere", tmp_path, server)


def test_no_redirect_leaves_https(lab: Lab, server: LocalServer, tls_server: LocalServer, tmp_path: Path) -> None:
    tls_server.replies["/down"] = [redirect(f"http://video.example:{server.port}/video.mp4")]

    with pytest.raises(UnsupportedUrl, match="from https to http"):
        fetch(lab, f"https://video.example:{tls_server.port}/down", tmp_path, server, tls_server)
    assert server.num_connections == 0


def test_a_listed_host_may_be_private(lab: Lab, server: LocalServer, tmp_path: Path) -> None:
    lab.public = set()
    lab.names = {"nas.local": ["127.0.0.1"], "other.local": ["127.0.0.1"]}
    rules = UrlRules(allow_private_urls=frozenset({"nas.local"}))

    assert fetch(lab, f"http://nas.local:{server.port}/video.mp4", tmp_path, rules=rules).num_bytes == len(MP4)
    (tmp_path / "video").unlink()
    with pytest.raises(UnsupportedUrl):
        fetch(
            lab,
            f"http://other.local:{server.port}/video.mp4",
            tmp_path,
            rules=replace(rules, ports=lab.rules(server.port).ports),
        )
    with pytest.raises(UnsupportedUrl, match="not public"):
        fetch(lab, "http://other.local/video.mp4", tmp_path, rules=rules)
    assert server.num_connections == 1


def test_the_proxies_of_the_environment_are_not_used(
    lab: Lab, server: LocalServer, canary: LocalServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.2:{canary.port}")

    assert fetch(lab, f"http://video.example:{server.port}/video.mp4", tmp_path, server)


def test_a_proxy_that_is_asked_for_connects_instead(
    lab: Lab, server: LocalServer, tls_server: LocalServer, canary: LocalServer, tmp_path: Path
) -> None:
    """It resolves the names, so nobody asks for them here; it may be private, and a URL's own address still may not."""

    def tunnel(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 Connected\r\n\r\n")
        with socket.create_connection(("127.0.0.1", tls_server.port)) as far:
            connection.settimeout(0.02)
            far.settimeout(0.02)
            while not server.is_stopped.is_set():
                for source, sink in ((connection, far), (far, connection)):
                    with contextlib.suppress(TimeoutError):
                        sink.sendall(source.recv(65536))

    server.replies |= {
        "http://video.example:80/video.mp4": [http(MP4)],
        "video.example:443": [tunnel],
        "closed.example:443": [http(status="403 Forbidden")],
    }
    lab.public, lab.names = set(), {"proxy.local": ["127.0.0.1"]}
    network = replace(lab.network(), proxy_url=f"http://proxy.local:{server.port}")

    for url in ("http://video.example/video.mp4", "https://video.example/video.mp4"):
        assert fetch(lab, url, tmp_path, network=network).path.read_bytes() == MP4
    (tmp_path / "video").unlink()
    with pytest.raises(DownloadFailed, match="the proxy refused"):
        fetch(lab, "https://closed.example/", tmp_path, network=network)
    with pytest.raises(UnsupportedUrl, match="not public"):
        fetch(lab, "http://127.0.0.2/", tmp_path, network=network)
    assert lab.asked == ["proxy.local"] * 3


def test_a_url_can_be_checked_before_anything_is_asked() -> None:
    assert check_video_url("https://example.com/a.mp4").host == "example.com"
    with pytest.raises(UnsupportedUrl, match=r"^Invalid video URL: only http"):
        check_video_url("ftp://example.com/a.mp4")


# What does not end


def drip(lab: Lab, server: LocalServer, start: bytes, piece: bytes) -> Reply:
    """Send piece by piece, a second of the client's clock after the other, until the client has gone."""

    def reply(connection: socket.socket) -> None:
        connection.sendall(start)
        while not server.is_stopped.wait(0.001):
            connection.sendall(piece)
            lab.skipped_s += 1

    return reply


def hang(lab: Lab, server: LocalServer, start: bytes = b"") -> Reply:
    """Send the start and nothing more for as long as the client stays, while its clock runs fast."""

    def reply(connection: socket.socket) -> None:
        connection.sendall(start)
        connection.settimeout(0.02)
        received = b"?"
        while received and not server.is_stopped.is_set():
            with contextlib.suppress(TimeoutError):
                received = connection.recv(1)
            lab.skipped_s += 31

    return reply


HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000\r\n\r\n"


SLOW_HEAD, SLOW_BODY = {"idle_s": 30, "total_s": 1e9}, {"idle_s": 1e9, "total_s": 60}  # the one that will bite


@pytest.mark.parametrize(
    ("start", "piece", "limits", "words"),
    [
        (b"HTTP/1.1 200 OK\r\nX-Slow: ", b"x", SLOW_HEAD, "did not answer within 30 s"),
        (b"HTTP/1.1 ", b"1", SLOW_HEAD, "did not answer within 30 s"),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n", SLOW_HEAD, "did not answer within 30 s"),
        (HEAD + MP4, b"x", SLOW_BODY, "longer than 60 s in all"),
        (HEAD, b"x", SLOW_BODY, "longer than 60 s in all"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n", SLOW_BODY, "longer than 60 s in all"),
        (
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX-Slow: ",
            b"x",
            SLOW_BODY,
            "longer than 60 s in all",
        ),
    ],
)
def test_a_drip_of_single_bytes_ends_in_time(
    start: bytes, piece: bytes, limits: dict[str, float], words: str, lab: Lab, server: LocalServer, tmp_path: Path
) -> None:
    server.replies["/drip"] = [drip(lab, server, start, piece)]

    with pytest.raises(DownloadFailed, match=words):
        fetch(
            lab,
            f"http://video.example:{server.port}/drip",
            tmp_path,
            server,
            limits=replace(ONE_TRY, **limits),
        )


def test_the_deadline_holds_on_the_real_clock(lab: Lab, server: LocalServer, tmp_path: Path) -> None:
    def reply(connection: socket.socket) -> None:
        connection.sendall(HEAD)
        while not server.is_stopped.wait(0.05):
            connection.sendall(b"x")

    server.replies["/drip"] = [reply]

    with pytest.raises(DownloadFailed, match=r"longer than 0\.3 s in all"):
        fetch(lab, f"http://video.example:{server.port}/drip", tmp_path, server, limits=DownloadLimits(total_s=0.3))


@pytest.mark.parametrize(
    ("start", "words"), [(b"", "did not answer within 30 s"), (HEAD + MP4, "sent nothing for 30 s")]
)
def test_silence_ends_a_try(start: bytes, words: str, lab: Lab, server: LocalServer, tmp_path: Path) -> None:
    server.replies["/silent"] = [hang(lab, server, start)]

    with pytest.raises(DownloadFailed, match=words):
        fetch(lab, f"http://video.example:{server.port}/silent", tmp_path, server, limits=replace(ONE_TRY, total_s=1e9))


def test_a_server_that_does_not_speak_tls_ends_a_try(lab: Lab, server: LocalServer, tmp_path: Path) -> None:
    with pytest.raises(DownloadFailed, match=r"reached in time|encrypted"):
        fetch(
            lab,
            f"https://video.example:{server.port}/video.mp4",
            tmp_path,
            server,
            limits=replace(ONE_TRY, connect_s=0.2),
        )


def test_a_resolver_that_hangs_ends_a_try(lab: Lab, tmp_path: Path) -> None:
    is_over = threading.Event()

    def resolve(host: str, port: int) -> list[IPAddress]:
        is_over.wait(20)
        return []

    network = replace(lab.network(), resolve=resolve)

    with pytest.raises(DownloadFailed, match=r"reached within 0\.1 s"):
        fetch(lab, "http://video.example/", tmp_path, network=network, limits=replace(ONE_TRY, connect_s=0.1))
    is_over.set()


def test_an_endless_body_ends_at_the_cap(lab: Lab, server: LocalServer, tmp_path: Path) -> None:
    def reply(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n" + MP4)
        while not server.is_stopped.is_set():
            connection.sendall(bytes(65536))

    server.replies["/endless"] = [reply]

    with pytest.raises(VideoTooLarge, match="1,000,000 bytes"):
        fetch(
            lab,
            f"http://video.example:{server.port}/endless",
            tmp_path,
            server,
            limits=DownloadLimits(max_download_bytes=1_000_000),
        )


def test_an_announced_size_above_the_cap_is_refused_at_once(lab: Lab, server: LocalServer, tmp_path: Path) -> None:
    server.replies["/large"] = [http(MP4, length=3_000_000_000)]

    with pytest.raises(VideoTooLarge, match="2,000,000,000 bytes"):
        fetch(lab, f"http://video.example:{server.port}/large", tmp_path, server)


def test_an_endless_head_is_refused(lab: Lab, server: LocalServer, tmp_path: Path) -> None:
    server.replies["/head"] = [b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 100_000]

    with pytest.raises(DownloadFailed, match="not proper HTTP"):
        fetch(lab, f"http://video.example:{server.port}/head", tmp_path, server, limits=ONE_TRY)


# What is tried again


@pytest.mark.parametrize(
    "failure",
    [
        http(status="429 Too Many Requests"),
        http(status="500 Internal Server Error"),
        http(status="503 Service Unavailable"),
        http(MP4, length=len(MP4) + 1),
        http(MP4 + MP4, length=3 * len(MP4)),  # more than the whole video
        b"",
        b"HTTP/1.1 200 OK\r\nContent-",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n10\r\nhalf",
        b"no HTTP at all\r\n\r\n",
    ],
)
def test_what_may_pass_is_tried_again_from_the_start(
    failure: bytes, lab: Lab, server: LocalServer, tmp_path: Path
) -> None:
    server.replies["/flaky"] = [failure, failure, http(MP4)]

    arrived = fetch(lab, f"http://video.example:{server.port}/flaky", tmp_path, server)

    assert arrived.path.read_bytes() == MP4
    assert (arrived.num_tries, server.num_connections) == (3, 3)
    assert lab.slept_s == pytest.approx(1 + 2)


def test_three_tries_are_all(lab: Lab, server: LocalServer, tmp_path: Path) -> None:
    server.replies["/down"] = [http(status="503 Service Unavailable")]
    lab.names["gone.example"] = ["93.184.215.14"]
    lab.names["mute.example"] = socket.gaierror(socket.EAI_AGAIN, "try again")

    with pytest.raises(DownloadFailed, match="it answered 503"):
        fetch(lab, f"http://video.example:{server.port}/down", tmp_path, server)
    assert server.num_connections == 3
    with pytest.raises(DownloadFailed, match="could not be reached"):
        fetch(lab, "http://gone.example/", tmp_path)
    assert lab.connected.count("93.184.215.14") == 3
    with pytest.raises(DownloadFailed, match="could not be resolved"):
        fetch(lab, "http://mute.example/", tmp_path)
    assert lab.asked.count("mute.example") == 3


@pytest.mark.parametrize(
    ("status", "words"),
    [
        ("400 Bad Request", "it answered 400"),
        ("401 Unauthorized", "wants a login"),
        ("403 Forbidden", "link has expired"),
        ("404 Not Found", "no such file"),
        ("408 Request Timeout", "it answered 408"),
        ("410 Gone", "gone"),
        ("204 No Content", "it answered 204"),
        ("206 Partial Content", "it answered 206"),
        ("304 Not Modified", "it answered 304"),
    ],
)
def test_what_stays_is_not_tried_again(status: str, words: str, lab: Lab, server: LocalServer, tmp_path: Path) -> None:
    server.replies["/x"] = [http(status=status)]

    with pytest.raises(DownloadFailed, match=words):
        fetch(lab, f"http://video.example:{server.port}/x", tmp_path, server)
    assert (server.num_connections, lab.slept_s) == (1, 0)


def test_an_unknown_name_is_not_tried_again(lab: Lab, tmp_path: Path) -> None:
    lab.names["empty.example"] = []

    for name in ("unknown.example", "empty.example"):
        with pytest.raises(DownloadFailed, match=f"from {name}: "):
            fetch(lab, f"http://{name}/", tmp_path)
        assert lab.asked.count(name) == 1


def test_retry_after_is_honoured_within_bounds(lab: Lab, server: LocalServer, tmp_path: Path) -> None:
    def busy(retry_after: str) -> bytes:
        return http(status="429 Too Many Requests", headers=(f"Retry-After: {retry_after}",))

    in_40_s = format_datetime(datetime.now(UTC) + timedelta(seconds=40), usegmt=True)
    server.replies["/busy"] = [busy("20"), busy(in_40_s), http(MP4)]
    server.replies["/odd"] = [busy("soon"), busy("-5"), http(MP4)]
    server.replies["/tomorrow"] = [busy("86400")]

    fetch(lab, f"http://video.example:{server.port}/busy", tmp_path, server)
    assert 20 + 10 < lab.slept_s <= 20 + 40
    lab.slept_s = 0
    fetch(lab, f"http://video.example:{server.port}/odd", tmp_path, server)
    assert lab.slept_s == pytest.approx(1 + 2)
    (tmp_path / "video").unlink()
    with pytest.raises(DownloadFailed, match="asks to come back in 86400 s"):
        fetch(lab, f"http://video.example:{server.port}/tomorrow", tmp_path, server)


def test_a_wait_that_would_outlast_the_deadline_is_not_begun(lab: Lab, server: LocalServer, tmp_path: Path) -> None:
    server.replies["/busy"] = [http(status="503 Busy", headers=("Retry-After: 50",))]

    with pytest.raises(DownloadFailed, match="longer than 40 s in all"):
        fetch(lab, f"http://video.example:{server.port}/busy", tmp_path, server, limits=DownloadLimits(total_s=40))
    assert lab.slept_s == 0


# What is no video


@pytest.mark.parametrize(
    ("host", "words"),
    [
        ("www.youtube.com", "an HTML page: this looks like a YouTube watch page, not a video file"),
        ("youtu.be", "a YouTube watch page"),
        ("vimeo.com", "a Vimeo page"),
        ("x.com", "a page of a social network"),
        ("www.dropbox.com", "dl=1"),
        ("video.example", "What came is an HTML page, not a video file"),
        ("notyoutube.com", "What came is an HTML page, not a video file"),
    ],
)
def test_a_page_is_called_a_page(host: str, words: str, lab: Lab, server: LocalServer, tmp_path: Path) -> None:
    lab.names[host] = ["127.0.0.1"]
    page = b"<!-- hello --><!DOCTYPE html><html>" + b" " * 10_000_000  # read to its fourth kilobyte only
    server.replies["/watch?v=1"] = [http(page, headers=("Content-Type: video/mp4",))]

    with pytest.raises(VideoUnreadable, match=words):
        fetch(lab, f"http://{host}:{server.port}/watch?v=1", tmp_path, server)
    assert server.num_connections == 1


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "empty"),
        (b"#EXTM3U\n#EXT-X-VERSION:3\n", "a playlist"),
        (b"ffconcat version 1.0\nfile http://127.0.0.1/x\n", "a playlist"),
        (b"\x89PNG\r\n\x1a\n" + bytes(9000), "a still picture"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "a web page"),
        (b"{'error': 'no such video, sorry'}", "text"),
        (b"\x7fELF" + bytes(9000), "no video we know"),
    ],
)
def test_anything_else_is_named_too(body: bytes, words: str, lab: Lab, server: LocalServer, tmp_path: Path) -> None:
    server.replies["/x.mp4"] = [http(body, headers=("Content-Type: video/mp4",))]

    with pytest.raises(VideoUnreadable, match=words):
        fetch(lab, f"http://video.example:{server.port}/x.mp4", tmp_path, server)


@pytest.mark.parametrize("header", ["Content-Encoding: gzip", "Content-Encoding: br, gzip", "Transfer-Encoding: gzip"])
def test_an_encoded_body_is_refused(header: str, lab: Lab, server: LocalServer, tmp_path: Path) -> None:
    server.replies["/x.mp4"] = [http(b"\x1f\x8b" + bytes(9000), headers=(header,))]

    with pytest.raises(DownloadFailed, match=r"compressed|not proper HTTP"):
        fetch(lab, f"http://video.example:{server.port}/x.mp4", tmp_path, server, limits=ONE_TRY)


# What is stopped, and what is said


@pytest.mark.parametrize("after_bytes", [0, 5000])
def test_a_cancellation_leaves_nothing(after_bytes: int, lab: Lab, server: LocalServer, tmp_path: Path) -> None:
    cancelled = threading.Event()

    def reply(connection: socket.socket) -> None:
        connection.sendall(HEAD + MP4[:after_bytes])
        if not after_bytes:
            cancelled.set()
        connection.recv(1)  # until the client has gone

    server.replies["/x"] = [reply]

    with pytest.raises(Canceled):
        fetch(
            lab,
            f"http://video.example:{server.port}/x",
            tmp_path,
            server,
            is_cancelled=cancelled.is_set,
            on_progress=lambda *_: cancelled.set(),
        )


def test_a_cancellation_ends_the_wait_for_the_next_try(lab: Lab, server: LocalServer, tmp_path: Path) -> None:
    server.replies["/x"] = [http(status="503 Busy", headers=("Retry-After: 60",))]

    with pytest.raises(Canceled):
        fetch(lab, f"http://video.example:{server.port}/x", tmp_path, server, is_cancelled=lambda: lab.slept_s > 5)
    assert lab.slept_s < 6
    assert server.num_connections == 1


def test_an_error_of_the_caller_leaves_nothing(lab: Lab, server: LocalServer, tmp_path: Path) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(lab, f"http://video.example:{server.port}/video.mp4", tmp_path, server, on_progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_an_error_of_ours(lab: Lab, server: LocalServer, tmp_path: Path) -> None:
    url, rules = f"http://video.example:{server.port}/video.mp4", lab.rules(server.port)

    with pytest.raises(DownloadFailed, match="cannot be stored"):
        download(url, tmp_path / "no" / "folder" / "video", rules=rules, network=lab.network())


def test_no_log_or_message_tells_a_query(
    lab: Lab, server: LocalServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    caplog.set_level(logging.INFO, "httpcore2")  # whose DEBUG tells every header
    base = f"http://video.example:{server.port}"
    server.replies["/a?k=secret"] = [http(status="503 Busy"), redirect("/b?k=secret")]
    server.replies["/b?k=secret"] = [http(MP4)]
    server.replies["/c?k=secret"] = [redirect("http://10.0.0.1/?k=secret")]
    server.replies["/d?k=secret"] = [http(MP4, length=99_999)]

    arrived = fetch(lab, f"{base}/a?k=secret", tmp_path, server)
    (tmp_path / "video").unlink()
    messages = [arrived.url_shown]
    for path in ("c", "d", "e"):
        with pytest.raises(DescriberError) as failure:
            fetch(lab, f"{base}/{path}?k=secret", tmp_path, server)
        messages.append(str(failure.value))

    assert "secret" not in "\n".join([*messages, caplog.text])
    assert f"Downloaded {base}/a?…" in caplog.text
