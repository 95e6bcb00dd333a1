"""Files and servers made to take everything: `python -m tests.bombs` throws each at the sampler or the downloader.

Each goes off in a fresh process, so that its peak memory is its own. A line says what came of it, in what time, and the
peak memories of that process (the parent) and of its decoder's. The last line is JSON {bombs, ok, wrong}. Right is what
stands in BOMBS, within its time and memory. Exit 0 only if all are right.
Where a limit would take minutes to reach, it is lowered; the line says so. In pytest: tests/test_bombs.py
"""

import argparse
import json
import resource
import socket
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # as pytest does

from indirections import box, rebuilt  # noqa: E402
from local_server import MP4, LocalServer  # noqa: E402

from benchmark.hardware import peak_rss_bytes  # noqa: E402
from pipeline.download import DownloadLimits, download  # noqa: E402
from pipeline.errors import InputError  # noqa: E402
from pipeline.frames import sample_frames  # noqa: E402
from pipeline.sampling import parse_limits  # noqa: E402
from pipeline.urls import UrlRules  # noqa: E402

MAX_PARENT_MB, MAX_DECODER_MB = 200, 2600  # the second: the address space it may have
MB = 1e6
HEAD = b"HTTP/1.1 200 OK\r\n"
STBL = [b"moov", b"trak", b"mdia", b"minf", b"stbl"]


@dataclass(frozen=True)
class Bomb:
    """A file, or a server's answer, and what has to come of it."""

    code: str  # of the error
    make: Callable[[Path], object] | None = None  # writes the file
    answer: Callable[[socket.socket], None] | None = None  # serves it
    limits: tuple[str, ...] = ()  # lowered, as "name=number"
    target_fps: float = 1.0
    max_s: float = 20.0
    suffix: str = ".mov"  # FFmpeg writes by the name


# Files


def sample_video(path: Path, codec: str = "mjpeg", pix_fmt: str = "yuvj420p", **options: Any) -> bytes:
    from video_files import write_video  # brings PyAV, which the process that is measured shall not hold

    return write_video(path, codec=codec, pix_fmt=pix_fmt, **options).read_bytes()


def huge_gif(path: Path) -> None:
    path.write_bytes(gif(16_000, 16_000, num_frames=1))


def gif(width: int, height: int, num_frames: int, num_pauses: int = 0) -> bytes:
    """Frames of one pixel each, 50 per second, on a canvas of this size; the first num_pauses stay for ten minutes."""
    palette = b"\0\0\0\xff\xff\xff"
    head = b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + palette
    image = b"\x2c" + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02\x44\x01\0"
    late, soon = (b"\x21\xf9\x04\0" + struct.pack("<H", delay) + b"\0\0" + image for delay in (60_000, 2))
    return head + late * num_pauses + soon * (num_frames - num_pauses) + b"\x3b"


def huge_png_frames(path: Path) -> None:
    """A video of 64 x 48, says the container; each of its pictures is a PNG of 16,000 x 16,000, and 0.2 MB."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(2001)) for _ in range(16_000)) + packer.flush()  # one bit a pixel
    header = struct.pack(">IIBBBBB", 16_000, 16_000, 1, 0, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    movie = sample_video(path, codec="png", pix_fmt="rgb24", num_frames=1)
    place = movie.index(b"mdat") - 4
    movie = movie[:place] + box(b"mdat", png) + movie[place + struct.unpack_from(">I", movie, place)[0] :]
    path.write_bytes(rebuilt(movie, [*STBL, b"stsz"], lambda _: struct.pack(">III", 0, len(png), 1)))


def huge_vp8(path: Path) -> None:
    """A WebM of 64 x 48, says the container, whose frames say 16,000 x 16,000."""
    data = sample_video(path, codec="libvpx", pix_fmt="yuv420p", options={"g": "1"})
    start = b"\x9d\x01\x2a"
    path.write_bytes(data.replace(start + struct.pack("<HH", 64, 48), start + struct.pack("<HH", 16_000, 16_000)))


def growing_h264(path: Path) -> None:
    """A broadcast that goes on with frames of 64 million pixels after a second."""
    small = sample_video(path, codec="libx264", pix_fmt="yuv420p", num_frames=25)
    options = {"preset": "ultrafast"}
    path.write_bytes(
        small + sample_video(path, codec="libx264", pix_fmt="yuv420p", size=(8000, 8000), num_frames=2, options=options)
    )


def many_samples(path: Path, count: int) -> None:
    """An index that claims a sample for every byte, and more."""
    movie = sample_video(path)
    for kind, content in (
        (b"stts", struct.pack(">IIII", 0, 1, count, 1)),
        (b"stsz", struct.pack(">III", 0, 1, count)),
        (b"stsc", struct.pack(">IIIII", 0, 1, 1, count, 1)),
    ):
        movie = rebuilt(movie, [*STBL, kind], lambda _, content=content: content)
    path.write_bytes(movie)


def packed_index(path: Path) -> None:
    """A MOV whose index is compressed, and claims to be 2 GB when unpacked."""
    packed = zlib.compress(bytes(200_000_000), 9)
    movie = box(b"cmvd", struct.pack(">I", 2_000_000_000) + packed)
    path.write_bytes(box(b"moov", box(b"cmov", box(b"dcom", b"zlib") + movie)))


def endless_broadcast(path: Path) -> None:
    """More than four hours that say nothing of their length: the same ten minutes again and again."""
    options = {"bf": "0", "g": "600"}
    path.write_bytes(
        sample_video(path, codec="libx264", pix_fmt="yuv420p", fps=1, num_frames=600, options=options) * 25
    )


# Servers


def endless_body(connection: socket.socket) -> None:
    connection.sendall(HEAD + b"\r\n" + MP4)
    while True:
        connection.sendall(bytes(1 << 20))


def drip(connection: socket.socket) -> None:
    connection.sendall(HEAD + b"Content-Length: 1000000\r\n\r\n")
    while True:
        connection.sendall(b"x")
        time.sleep(0.1)


def slow_head(connection: socket.socket) -> None:
    connection.sendall(HEAD + b"X-Slow: ")
    while True:
        connection.sendall(b"x")
        time.sleep(0.1)


def packed_body(connection: socket.socket) -> None:
    packer = zlib.compressobj(9, wbits=31)
    connection.sendall(HEAD + b"Content-Type: video/mp4\r\nContent-Encoding: gzip\r\n\r\n" + packer.compress(MP4))
    while True:
        connection.sendall(packer.compress(bytes(1 << 20)))


def announced_terabytes(connection: socket.socket) -> None:
    connection.sendall(HEAD + b"Content-Length: 10000000000000\r\n\r\n" + MP4)


def endless_head(connection: socket.socket) -> None:
    connection.sendall(HEAD)
    while True:
        connection.sendall(b"X-More: and more\r\n" * 1000)


BOMBS: dict[str, Bomb] = {
    "gif of 16,000 x 16,000": Bomb("too_large", make=huge_gif),
    "png frames of 16,000 x 16,000": Bomb("too_large", make=huge_png_frames),
    "vp8 frames of 16,000 x 16,000": Bomb("not_a_video", make=huge_vp8, suffix=".webm"),
    "size switch in mid-stream": Bomb("too_large", make=growing_h264, suffix=".ts"),
    "50 million samples": Bomb("not_a_video", make=lambda path: many_samples(path, 50_000_000)),
    "80 million samples": Bomb("not_a_video", make=lambda path: many_samples(path, 80_000_000)),
    "a billion samples": Bomb("not_a_video", make=lambda path: many_samples(path, 1_000_000_000)),
    "packed index of 2 GB": Bomb("not_a_video", make=packed_index),
    "endless broadcast": Bomb("too_large", make=endless_broadcast, suffix=".ts"),
    "endless frames": Bomb(
        "too_large", make=lambda path: path.write_bytes(gif(64, 48, 60_000)), target_fps=50, limits=("max_frames=2000",)
    ),
    "much work in few bytes": Bomb(
        "decoder_stopped",
        make=lambda path: path.write_bytes(gif(5900, 5900, 2000)),
        limits=("cpu_s=3", "cpu_s_per_video_s=0.1"),
    ),
    "much work after long pauses": Bomb(
        "decoder_stopped",
        make=lambda path: path.write_bytes(gif(5900, 5900, 2000, num_pauses=3)),
        limits=("cpu_s=3", "cpu_s_per_video_s=0.1"),
    ),
    "endless body": Bomb("too_large", answer=endless_body, limits=("max_video_bytes=500_000_000",)),
    "10 TB announced": Bomb("too_large", answer=announced_terabytes),
    "gzip bomb": Bomb("download_failed", answer=packed_body),
    "slow drip of the body": Bomb("download_failed", answer=drip),
    "slow drip of the head": Bomb("download_failed", answer=slow_head),
    "endless head": Bomb("download_failed", answer=endless_head),
}


def run(name: str, folder: Path) -> dict[str, Any]:
    """Make a bomb and let it go off in a fresh process. -> its findings, "ok" among them"""
    bomb, path = BOMBS[name], folder / f"clip{BOMBS[name].suffix}"
    if bomb.make:
        bomb.make(path)
    command = [sys.executable, "-m", "tests.bombs", "--one", name, str(path)]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=10 * bomb.max_s)
    if process.returncode:
        return {"name": name, "ok": False, "answer": process.stderr[-500:] or f"exit code {process.returncode}"}
    found = json.loads(process.stdout)
    found["ok"] = (
        found["code"] == bomb.code
        and found["seconds"] <= bomb.max_s
        and found["parent_mb"] <= MAX_PARENT_MB
        and found["decoder_mb"] <= MAX_DECODER_MB
    )
    return {"name": name, "limits": bomb.limits, **found}


def go_off(name: str, path: Path) -> dict[str, Any]:
    """Take it in, in this process."""
    bomb, started_s, num_frames, code, answer = BOMBS[name], time.monotonic(), 0, "", ""
    limits = parse_limits(list(bomb.limits))
    try:
        if bomb.answer:
            fetch(bomb, path, limits.max_video_bytes)
        for _ in sample_frames(path, bomb.target_fps, limits=limits):
            num_frames += 1
    except InputError as error:
        code, answer = error.code, str(error)
    return {
        "code": code,
        "answer": answer,
        "num_frames": num_frames,
        "seconds": round(time.monotonic() - started_s, 2),
        "parent_mb": round(peak_rss_bytes() / MB),
        "decoder_mb": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / MB),
    }


def fetch(bomb: Bomb, path: Path, max_bytes: int) -> None:
    assert bomb.answer
    server = LocalServer()
    server.replies["/video"] = [bomb.answer]
    rules = UrlRules(allow_private_urls=frozenset({"127.0.0.1"}))
    limits = DownloadLimits(max_video_bytes=max_bytes, max_tries=2, total_s=3, idle_s=2, backoff_s=0.1)
    try:
        download(f"http://127.0.0.1:{server.port}/video", path, limits=limits, rules=rules)
    finally:
        server.stop()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bombs", description=__doc__)
    parser.add_argument("--one", nargs=2, metavar=("NAME", "FILE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(go_off(args.one[0], Path(args.one[1]))))
        return 0
    wrong = []
    for name in BOMBS:
        with tempfile.TemporaryDirectory() as folder:
            found = run(name, Path(folder))
        verdict = "ok" if found["ok"] else "WRONG"
        lowered = f" ({', '.join(found['limits'])})" if found.get("limits") else ""
        figures = f"{found.get('seconds')} s, parent {found.get('parent_mb')} MB, decoder {found.get('decoder_mb')} MB"
        print(f"{verdict}: {name}{lowered}: {figures}, {found.get('num_frames')} frames, {found['answer']}", flush=True)
        wrong += [] if found["ok"] else [name]
    print(json.dumps({"bombs": len(BOMBS), "ok": len(BOMBS) - len(wrong), "wrong": wrong}))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
