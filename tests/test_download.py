"""The downloader against a real web server on this host, and against everything that tries to lead it astray.

That strangers' URLs reach nothing is asserted twice: by a server that counts connections, and by the addresses that the
client asked to be connected to.
"""

import contextlib
import re
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from local_server import MP4, Lab, LocalServer, fetch, http, redirect

from pipeline.download import DownloadLimits, check_video_url, download
from pipeline.errors import DescriberError, DownloadFailed, UnsupportedUrl
from pipeline.urls import UrlRules

ONE_TRY = DownloadLimits(max_tries=1)

# What arrives


def test_a_body_that_drips_is_given_up_after_a_minute(lab: Lab, server: LocalServer, tmp_path: Path) -> None:
    def drip(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000\r\n\r\n" + MP4)
        while not server.is_stopped.wait(0.01):
            lab.skipped_s += 10
            connection.sendall(bytes(1000))

    server.replies["/drip.mp4"] = [drip]

    with pytest.raises(DownloadFailed, match=r"it sends only \d{2,3} bytes a second"):
        fetch(lab, f"http://video.example:{server.port}/drip.mp4", tmp_path, server)


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


def test_an_ipv6_address_stands_in_brackets_in_the_request(lab: Lab, server: LocalServer, tmp_path: Path) -> None:
    lab.public, lab.reroutes = {"::1"}, {"::1": "127.0.0.1"}  # the host need not have IPv6

    fetch(lab, f"http://[::1]:{server.port}/video.mp4", tmp_path, server)

    assert lab.connected == ["::1"]
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
