"""Mutated videos through the whole way in: `python -m tests.fuzz_video --files 1000`.

Each file is a real one of a dozen containers, damaged by one to three mutators, downloaded from a server on this host,
probed and sampled. What may come of it: frames, or an error of ours, within DEADLINE_S. A decoder that dies is such an
error; it is counted apart. Anything else, an exception that is not ours or a file that takes longer, is wrong, and
the file is kept. The last line is JSON; exit 0 only if nothing is wrong. The same --seed makes the same files.
"""

import argparse
import contextlib
import json
import os
import random
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # as pytest does

from local_server import LocalServer, http  # noqa: E402
from video_files import write_video  # noqa: E402

from pipeline.download import download  # noqa: E402
from pipeline.errors import DecoderStopped, InputError  # noqa: E402
from pipeline.frames import probe, sample_frames  # noqa: E402
from pipeline.sampling import DecodeLimits  # noqa: E402
from pipeline.urls import UrlRules  # noqa: E402

DEADLINE_S = 60.0
LIMITS = DecodeLimits(cpu_s=20, cpu_s_per_video_s=1, idle_s=20)
NUM_AT_ONCE = 2
ODD = ROOT / "tests" / "data" / "odd"
REAL = (
    "rot90.mp4",
    "av1.mp4",
    "hevc10hdr.mp4",
    "frag_pipe.mp4",
    "delay2s.mp4",
    "pipe_nodur.webm",
    "alpha_vp9.webm",
    "odd_size.mkv",
    "transp.gif",
    "interlaced.mp4",
)
MADE = {  # name: codec, pixel format
    "made.mov": ("mjpeg", "yuvj420p"),
    "made.avi": ("mpeg4", "yuv420p"),
    "made.ts": ("libx264", "yuv420p"),
    "made.mpg": ("mpeg2video", "yuv420p"),
    "made.flv": ("flv1", "yuv420p"),
    "made.wmv": ("wmv2", "yuv420p"),
    "made.ogv": ("libvpx", "yuv420p"),
    "made.ivf": ("libvpx-vp9", "yuv420p"),
    "made.3gp": ("h263", "yuv420p"),
}
Mutator = Callable[[random.Random, bytearray], bytes | bytearray]
NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


def flip_bits(rng: random.Random, data: bytearray) -> bytearray:
    for _ in range(rng.choice((1, 4, 16, 64, len(data) // 200 + 1))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return data


def flip_early_bits(rng: random.Random, data: bytearray) -> bytearray:
    for _ in range(rng.randint(1, 12)):
        data[rng.randrange(min(2048, len(data)))] ^= 1 << rng.randrange(8)
    return data


def set_numbers(rng: random.Random, data: bytearray) -> bytearray:
    """Sizes and counts stand big-endian in MP4, little-endian in AVI."""
    for _ in range(rng.randint(1, 6)):
        place = rng.randrange(max(1, len(data) - 4))
        data[place : place + 4] = struct.pack(rng.choice("<>") + "I", rng.choice(NUMBERS))
    return data


def cut(rng: random.Random, data: bytearray) -> bytearray:
    return data[: rng.randrange(len(data))]


def drop(rng: random.Random, data: bytearray) -> bytearray:
    start = rng.randrange(len(data))
    return data[:start] + data[start + rng.randint(1, 1 + len(data) // 4) :]


def blank(rng: random.Random, data: bytearray) -> bytearray:
    start, length = rng.randrange(len(data)), rng.randint(1, 1 + len(data) // 4)
    data[start : start + length] = bytes([rng.choice((0, 0xFF))]) * min(length, len(data) - start)
    return data


def insert_noise(rng: random.Random, data: bytearray) -> bytearray:
    place = rng.randrange(len(data))
    return data[:place] + rng.randbytes(rng.randint(1, 4096)) + data[place:]


def repeat_part(rng: random.Random, data: bytearray) -> bytearray:
    start, length = rng.randrange(len(data)), rng.randint(1, 1 + len(data) // 8)
    return data[: start + length] + data[start : start + length] * rng.randint(1, 8) + data[start + length :]


def swap_parts(rng: random.Random, data: bytearray) -> bytearray:
    first, second = sorted(rng.randrange(len(data)) for _ in range(2))
    return data[:first] + data[second:] + data[first:second]


MUTATORS: tuple[Mutator, ...] = (
    flip_bits,
    flip_early_bits,
    set_numbers,
    cut,
    drop,
    blank,
    insert_noise,
    repeat_part,
    swap_parts,
)


@dataclass(frozen=True)
class Outcome:
    container: str  # of the file before it was damaged
    what: str  # "frames", an error's code, "decoder died", or what is wrong
    seconds: float
    is_right: bool


def sources(folder: Path) -> dict[str, bytes]:
    files = {name: (ODD / name).read_bytes() for name in REAL}
    for name, (codec, pix_fmt) in MADE.items():
        size = (352, 288) if codec == "h263" else (160, 120)
        files[name] = write_video(folder / name, size, codec, pix_fmt, num_frames=50).read_bytes()
    return files


def mutated(rng: random.Random, files: dict[str, bytes]) -> tuple[str, bytes]:
    """-> container, damaged content"""
    name = rng.choice(sorted(files))
    data = bytearray(files[name])
    for mutate in rng.choices(MUTATORS, k=rng.randint(1, 3)):
        data = bytearray(mutate(rng, data)) or bytearray(b"\0")
    return Path(name).suffix[1:], bytes(data)


def take_in(content: bytes, container: str, folder: Path) -> Outcome:
    """Download, probe and sample one file."""
    started_s, is_right = time.monotonic(), True
    try:
        num_frames = ingest(content, folder)
        what = "frames" if num_frames else "nothing"
        is_right = num_frames > 0
    except DecoderStopped as error:
        what = "decoder died"
        if "of its own" in str(error) or "no event" in str(error):  # our own code is to blame
            what, is_right = str(error), False
    except InputError as error:
        what = error.code
    except BaseException as error:  # this is what the fuzzing is for
        what, is_right = f"{type(error).__name__}: {error}", False
    seconds = time.monotonic() - started_s
    if seconds > DEADLINE_S:
        what, is_right = f"took {seconds:.0f} s ({what})", False
    return Outcome(container, what, seconds, is_right)


def ingest(content: bytes, folder: Path) -> int:
    """-> number of sampled frames. Raises InputError."""
    server = LocalServer()
    server.replies["/video"] = [http(content)]
    with tempfile.TemporaryDirectory(dir=folder) as place, contextlib.ExitStack() as stack:
        stack.callback(server.stop)
        rules = UrlRules(allow_private_urls=frozenset({"127.0.0.1"}))
        path = download(f"http://127.0.0.1:{server.port}/video", Path(place) / "video", rules=rules).path
        probe(path, LIMITS)
        num_frames, last_ms = 0, -1
        for frame in sample_frames(path, 5, max_frames=200, limits=LIMITS):
            assert frame.timestamp_ms >= last_ms, "times go back"
            assert frame.image.ndim == 3 and frame.image.size > 0
            num_frames, last_ms = num_frames + 1, frame.timestamp_ms
        return num_frames


def fuzz(num_files: int, seed: int, keep: Path) -> int:
    rng = random.Random(seed)
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory(prefix="moonreel-") as temporary, ThreadPoolExecutor(NUM_AT_ONCE) as workers:
        folder = Path(temporary)
        files = sources(folder)
        damaged = [mutated(rng, files) for _ in range(num_files)]
        pending = [workers.submit(take_in, content, container, folder) for container, content in damaged]
        for number, future in enumerate(pending):
            try:
                outcome = future.result(timeout=4 * DEADLINE_S)
            except TimeoutError:
                kept = keep_file(keep, seed, number, damaged[number][1])
                print(f"WRONG: the caller hangs, on {kept} or one near it", flush=True)
                os._exit(1)  # nothing can end its thread
            outcomes.append(outcome)
            if not outcome.is_right:
                print(f"WRONG: {keep_file(keep, seed, number, damaged[number][1])}: {outcome.what}", flush=True)
            if (number + 1) % 100 == 0:
                print(f"{number + 1} files", file=sys.stderr, flush=True)
    return report(outcomes)


def keep_file(keep: Path, seed: int, number: int, content: bytes) -> Path:
    keep.mkdir(parents=True, exist_ok=True)
    path = keep / f"{seed}-{number}"
    path.write_bytes(content)
    return path


def report(outcomes: list[Outcome]) -> int:
    for container in sorted({outcome.container for outcome in outcomes}):
        counts = Counter(outcome.what for outcome in outcomes if outcome.container == container)
        listed = ", ".join(f"{count} {what}" for what, count in counts.most_common())
        print(f"{container:5} {sum(counts.values()):4} files: {listed}")
    num_wrong = sum(not outcome.is_right for outcome in outcomes)
    counts = Counter(outcome.what if outcome.is_right else "wrong" for outcome in outcomes)
    slowest_s = max(outcome.seconds for outcome in outcomes)
    print(json.dumps({"files": len(outcomes), **counts, "slowest_s": round(slowest_s, 2), "wrong": num_wrong}))
    return 1 if num_wrong else 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz_video", description=__doc__)
    parser.add_argument("--files", type=int, default=1000, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="(default: %(default)s)")
    parser.add_argument(
        "--keep", type=Path, default=Path("runs/fuzz"), help="for files that go wrong (default: %(default)s)"
    )
    args = parser.parse_args()
    return fuzz(args.files, args.seed, args.keep)


if __name__ == "__main__":
    sys.exit(main())
