"""What wrong files and URLs answer: `python -m tests.wrong_inputs` asks the code and prints the README's table.

test_docs.py compares the two. No row is written by hand: each is a real file through the real decoder, or a URL through
the real downloader to a server on this host, under made-up names and addresses.
"""

import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # as pytest does

from local_server import MP4, Lab, LocalServer, fetch, http, redirect  # noqa: E402
from video_files import write_video  # noqa: E402

from pipeline.download import DownloadLimits  # noqa: E402
from pipeline.errors import DescriberError  # noqa: E402
from pipeline.frames import SamplingNotes, sample_frames  # noqa: E402
from pipeline.sampling import DEFAULT_LIMITS, DecodeLimits  # noqa: E402

ODD = ROOT / "tests" / "data" / "odd"
PAGE = b"<!DOCTYPE html><html><title>Watch</title></html>"
FILES = {  # that are no videos, by their content
    "nothing at all": b"",
    "a web page saved as a video": PAGE,
    "JSON or other text": b'{"error": "no such video"}',
    "a playlist (M3U8, DASH, concat, ASX, SDP ...)": b"#EXTM3U\nhttp://127.0.0.1/a.ts\n",
    "a photo": b"\xff\xd8\xff\xe0\0\x10JFIF",
    "an animated WebP": b"RIFF\0\0\0\0WEBPVP8X\x0a\0\0\0\x02" + bytes(9) + b"ANIM",
    "an MP3": b"ID3\x04\0\0",
    "a ZIP file": b"PK\x03\x04\x14\0",
    "a PDF": b"%PDF-1.7\n",
    "a bare H.264 stream": b"\0\0\0\x01\x67\x64\0\x1f",
    "anything else": bytes(range(128, 192)),
}


def files(folder: Path) -> Iterator[tuple[str, Path, dict[str, object], DecodeLimits]]:
    """What is wrong, the file, options of sample_frames, limits."""
    path = folder / "video.mp4"
    for what, content in FILES.items():
        path.write_bytes(content)
        yield what, path, {}, DEFAULT_LIMITS
    yield "sound without pictures, in a video's container", ODD / "audio.m4a", {}, DEFAULT_LIMITS
    path.write_bytes((ODD / "rot90.mp4").read_bytes()[:50_000])
    yield "a video cut off before its index", path, {}, DEFAULT_LIMITS
    data = (ODD / "oneframe.mp4").read_bytes()
    path.write_bytes(data.replace(b"avc1", b"zzzz"))
    yield "a codec that nobody knows", path, {}, DEFAULT_LIMITS
    start = data.index(b"mdat") + 4
    path.write_bytes(data[:start] + b"\xff" * 1200 + data[start + 1200 :])
    yield "a video of which nothing decodes", path, {}, DEFAULT_LIMITS
    yield "a window in which nothing is shown", ODD / "oneframe.mp4", {"start_s": 60.0}, DEFAULT_LIMITS
    video = write_video(folder / "video.avi", num_frames=75)
    for what, limits in (
        ("too many bytes", DecodeLimits(max_video_bytes=10_000)),
        ("too many pixels", DecodeLimits(max_pixels=1000)),
        ("too long", DecodeLimits(max_duration_s=2)),
        ("too many frames", DecodeLimits(max_frames=2)),
    ):
        yield what, video, {}, limits
    yield "a damaged stretch, and more than the limit", ODD / "zeros_mid.mp4", {}, DecodeLimits(max_bad_packets=3)
    yield "a damaged stretch within the limits", ODD / "corrupt_mid.mp4", {}, DEFAULT_LIMITS
    yield "a video that ends too early", ODD / "trunc_faststart.mp4", {}, DEFAULT_LIMITS
    yield "a path where no file is", Path("missing.mp4"), {}, DEFAULT_LIMITS


def urls(lab: Lab, server: LocalServer) -> Iterator[tuple[str, str]]:
    base = f"http://video.example:{server.port}"
    yield "another scheme", "ftp://video.example/video.mp4"
    yield "a password", "https://me:secret@video.example/video.mp4"
    yield "an unusual port", "http://video.example:22/video.mp4"
    yield "a private address", "http://192.168.1.20/video.mp4"
    yield "an address in an unusual spelling", "http://0x7f.1/video.mp4"
    lab.names["intranet.example"] = ["10.0.0.5"]
    yield "a name with a private address", "http://intranet.example/video.mp4"
    server.replies["/moved"] = [redirect("http://169.254.169.254/latest/meta-data")]
    yield "a redirect to a private address", f"{base}/moved"
    server.replies["/loop"] = [redirect("/loop")]
    yield "redirects without end", f"{base}/loop"
    yield "a name that does not exist", "http://nowhere.example/video.mp4"
    lab.names["dead.example"] = ["93.184.215.14"]
    yield "a host that does not answer", "http://dead.example/video.mp4"
    for what, status in (
        ("no such file", "404 Not Found"),
        ("an expired link", "403 Forbidden"),
        ("a login", "401 Unauthorized"),
        ("a server in trouble, three times", "503 Service Unavailable"),
    ):
        server.replies[f"/{status[:3]}"] = [http(status=status)]
        yield what, f"{base}/{status[:3]}"
    lab.names["www.youtube.com"] = ["127.0.0.1"]
    server.replies["/watch"] = [http(PAGE)]
    yield "a YouTube page", f"http://www.youtube.com:{server.port}/watch?v=1"
    server.replies["/large"] = [http(MP4, length=3_000_000_000)]
    yield "too many bytes announced", f"{base}/large"
    server.replies["/packed"] = [http(MP4, headers=("Content-Encoding: gzip",))]
    yield "a compressed answer", f"{base}/packed"
    server.replies["/short"] = [http(MP4, length=2 * len(MP4))]
    yield "an answer that breaks off, three times", f"{base}/short"


def answer_of_file(path: Path, options: dict[str, object], limits: DecodeLimits) -> tuple[str, str]:
    """-> code and message; for a video that is described all the same, its frames and warnings"""
    notes = SamplingNotes()
    try:
        num_frames = len(list(sample_frames(path, 1, limits=limits, notes=notes, **options)))  # type: ignore[arg-type]
    except DescriberError as error:
        return f"`{error.code}`", str(error).replace(str(path.absolute()), path.name)
    return "no error", f"{num_frames} frames, and the warning: {' '.join(notes.warnings)}"


def answer_of_url(lab: Lab, server: LocalServer, url: str, folder: Path) -> tuple[str, str]:
    try:
        fetch(lab, url, folder, server, limits=replace(DownloadLimits(), backoff_s=0.01))
    except DescriberError as error:
        return f"`{error.code}`", str(error).replace(f", {server.port}", "")  # a port that only this server needs
    raise AssertionError(f"{url} was downloaded")


def table() -> str:
    lines = ["| a file that is, or has | code | answer |", "| --- | --- | --- |"]
    with tempfile.TemporaryDirectory() as place:
        for what, path, options, limits in files(Path(place)):
            lines.append(f"| {what} | {' | '.join(answer_of_file(path, options, limits))} |")
    lines += ["", "| a URL with, or that leads to | code | answer |", "| --- | --- | --- |"]
    with tempfile.TemporaryDirectory() as place, ExitStack() as stack:
        server, lab = LocalServer(), Lab()
        stack.callback(server.stop)
        lab.public, lab.names["video.example"] = {"127.0.0.1"}, ["127.0.0.1"]
        for what, url in urls(lab, server):
            lines.append(f"| {what} | {' | '.join(answer_of_url(lab, server, url, Path(place)))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
