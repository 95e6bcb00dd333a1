"""What slow, broken and lying servers can do to a download: little, and not for long."""

import contextlib
import logging
import socket
import threading
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest
from local_server import MP4, Lab, LocalServer, Reply, fetch, http, redirect

from pipeline.addresses import IPAddress
from pipeline.download import DownloadLimits, download
from pipeline.errors import Canceled, DescriberError, DownloadFailed, VideoTooLarge, VideoUnreadable

ONE_TRY = DownloadLimits(max_tries=1)


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


SLOW_HEAD = {"idle_s": 30, "total_s": 1e9}  # the one that will bite
SLOW_BODY = {"idle_s": 1e9, "total_s": 60, "min_bytes_per_s": 0}


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

    with pytest.raises(VideoTooLarge, match=r"has more bytes; 1,000,000 are .*limit max_video_bytes\)"):
        fetch(
            lab,
            f"http://video.example:{server.port}/endless",
            tmp_path,
            server,
            limits=DownloadLimits(max_video_bytes=1_000_000),
        )


def test_an_announced_size_above_the_cap_is_refused_at_once(lab: Lab, server: LocalServer, tmp_path: Path) -> None:
    server.replies["/large"] = [http(MP4, length=3_000_000_000)]

    with pytest.raises(VideoTooLarge, match="has 3,000,000,000 bytes; 2,000,000,000 are"):
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
