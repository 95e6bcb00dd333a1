"""Measure what it takes to sample a video: `python -m benchmark.ingest`.

Makes clips of 60 s, 360p to 2160p, H.264 and HEVC, at 30 frames per second. Compares the CPU time of sampling them at 1
and 5 frames per second, the decoder's process with its start and the pipe included, with that of OpenCV reading every
frame, without OpenCV's start; and the time to the first frame. Then samples one minute and 60 minutes of 360p and
compares the peak memories. Each measurement is a fresh process; the variants of a clip take turns. The last line is a
JSON object. Not measured: the model. Test: pytest tests/test_benchmark_ingest.py
"""

import argparse
import importlib.metadata
import itertools
import json
import math
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from benchmark.hardware import child_pids, cpu_name, num_cores, peak_rss_bytes
from pipeline.frames import sample_frames

ROOT = Path(__file__).parent.parent
HEIGHTS = (360, 720, 1080, 2160)
FPS, LOOP_S, GOP = 30, 10, 60
CODECS = {
    "h264": ("libx264", {"preset": "veryfast", "g": str(GOP)}),
    "hevc": ("libx265", {"preset": "ultrafast", "x265-params": f"keyint={GOP}:open-gop=0:log-level=none"}),
}
VARIANTS = {"cv2": 0.0, "1 fps": 1.0, "5 fps": 5.0}
MB = 1e6


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmark.ingest", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, help="keep the clips here (default: a temporary folder)")
    parser.add_argument("--repeats", type=int, default=3, help="measurements of each variant (default: %(default)s)")
    parser.add_argument("--heights", type=int, nargs="+", default=HEIGHTS, help="(default: 360 720 1080 2160)")
    parser.add_argument("--clip-s", type=int, default=60, help="length of a clip (default: %(default)s)")
    parser.add_argument("--long-s", type=int, default=3600, help="length of the long clip (default: %(default)s)")
    parser.add_argument("--one", nargs=2, metavar=("VARIANT", "CLIP"), help=argparse.SUPPRESS)  # in a fresh process
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse_arguments(arguments)
    if args.one:
        print(json.dumps(measure(args.one[0], Path(args.one[1]))))
        return 0
    with kept_or_temporary(args.folder) as folder:
        clips = [compare(folder, codec, height, args) for height, codec in itertools.product(args.heights, CODECS)]
        memory = {}
        for seconds in (args.clip_s, args.long_s):
            found = measure_apart("1 fps", make_clip(folder, "h264", min(args.heights), seconds))
            memory[seconds] = {key: found[key] for key in ("peak_mb", "decoder_peak_mb")}
            print(f"{seconds} s of {min(args.heights)}p: peak memory {memory[seconds]}", flush=True)
    means = {variant: geometric_mean([clip["ratio"][variant] for clip in clips]) for variant in ("1 fps", "5 fps")}
    print(f"CPU time against cv2, geometric mean: {means}")
    libraries = {name: importlib.metadata.version(name) for name in ("av", "opencv-python-headless")}
    hardware = {"cpu": cpu_name(), "num_cores": num_cores(), **libraries}
    print(
        json.dumps(
            {"hardware": hardware, "repeats": args.repeats, "clips": clips, "mean_ratio": means, "memory": memory}
        )
    )
    return 0


def compare(folder: Path, codec: str, height: int, args: argparse.Namespace) -> dict[str, Any]:
    """Measure the variants of one clip in turn; -> medians, and CPU times as multiples of cv2's."""
    clip = make_clip(folder, codec, height, args.clip_s)
    found: dict[str, list[dict[str, float]]] = {variant: [] for variant in VARIANTS}
    for _ in range(args.repeats):
        for variant in VARIANTS:
            found[variant].append(measure_apart(variant, clip))
    cpu_s, first_s = (
        {variant: round(statistics.median(one[key] for one in found[variant]), 3) for variant in VARIANTS}
        for key in ("cpu_s", "first_frame_s")
    )
    ratio = {variant: round(cpu_s[variant] / cpu_s["cv2"], 3) for variant in VARIANTS}
    print(f"{height}p {codec}: CPU {cpu_s} s, {ratio} of cv2; first frame {first_s} s", flush=True)
    return {"height": height, "codec": codec, "cpu_s": cpu_s, "ratio": ratio, "first_frame_s": first_s}


def measure_apart(variant: str, clip: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmark.ingest", "--one", variant, str(clip.resolve())]
    return json.loads(subprocess.check_output(command, cwd=ROOT))


def measure(variant: str, clip: Path) -> dict[str, float]:
    """CPU seconds of reading the clip, wall seconds to the first frame, peak memories in MB."""
    if variant == "cv2":
        import cv2  # noqa: F401 - its start is not measured; the sampler's process shall not hold it
    cpu_before_s, started_s, first_frame_s, decoder_peak_bytes = cpu_time_s(), time.monotonic(), 0.0, 0
    for _ in read_all(clip) if variant == "cv2" else sample_frames(clip, VARIANTS[variant]):
        first_frame_s = first_frame_s or time.monotonic() - started_s
        if variant != "cv2":
            decoder_peak_bytes = max([decoder_peak_bytes, *map(peak_rss_bytes, child_pids())])
    return {
        "cpu_s": round(cpu_time_s() - cpu_before_s, 3),
        "first_frame_s": round(first_frame_s, 3),
        "peak_mb": round(peak_rss_bytes() / MB, 1),
        "decoder_peak_mb": round(decoder_peak_bytes / MB, 1),
    }


def cpu_time_s() -> float:
    """Of this process and of those of its children that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def read_all(clip: Path) -> Iterator[Any]:
    """Every frame, as OpenCV gives it."""
    import cv2

    capture = cv2.VideoCapture(str(clip), cv2.CAP_FFMPEG)
    while True:
        is_read, image = capture.read()
        if not is_read:
            return
        yield image


def geometric_mean(ratios: Sequence[float]) -> float:
    return round(math.exp(statistics.fmean(map(math.log, ratios))), 3)


@contextmanager
def kept_or_temporary(folder: Path | None) -> Iterator[Path]:
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="moonreel-") as temporary:
            yield Path(temporary)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder


def make_clip(folder: Path, codec: str, height: int, seconds: int) -> Path:
    """Encode LOOP_S seconds of a camera that pans over a textured wall with moving things, and repeat them."""
    clip = folder / f"{height}p-{codec}-{seconds}s.mp4"
    if clip.exists():
        return clip
    loop = folder / f"{height}p-{codec}-loop.mp4"
    if not loop.exists():
        print(f"encoding {loop.name}", file=sys.stderr)
        encode(loop, codec, height)
    part = clip.with_suffix(".part")
    repeat(loop, part, seconds // LOOP_S)
    part.rename(clip)
    return clip


def encode(path: Path, codec: str, height: int) -> None:
    import av
    import cv2
    from av.video.stream import VideoStream

    width, (encoder, options) = height * 16 // 9, CODECS[codec]
    rng = np.random.default_rng(height)
    wall_size = width * 3 // 2, height * 3 // 2
    wall = sum(
        cv2.resize(rng.integers(0, 255 // 3, (9 * scale, 16 * scale, 3)).astype(np.float32), wall_size)
        for scale in (2, 12, 48)
    )
    wall = np.clip(wall, 0, 255).astype(np.uint8)
    part = path.with_suffix(".part")
    with av.open(str(part), "w", format="mp4") as container:
        stream = container.add_stream(encoder, rate=FPS, options=options)
        assert isinstance(stream, VideoStream)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for index in range(FPS * LOOP_S):
            turn = 2 * math.pi * index / (FPS * LOOP_S)
            x, y = round((1 + math.cos(turn)) * width / 4), round((1 + math.sin(turn)) * height / 4)
            image = np.ascontiguousarray(wall[y : y + height, x : x + width])
            for thing in range(5):
                center = round(width * (0.5 + 0.4 * math.sin(3 * turn + thing))), height * (2 * thing + 1) // 10
                cv2.circle(image, center, height // 12, (50 * thing, 255 - 50 * thing, 128), -1)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image)))
        container.mux(stream.encode(None))
    part.rename(path)


def repeat(loop: Path, path: Path, times: int) -> None:
    import av

    with av.open(str(path), "w", format="mp4") as repeated:
        stream = None
        for turn in range(times):
            with av.open(str(loop)) as container:
                source = container.streams.video[0]
                stream = stream or repeated.add_stream_from_template(source)
                for packet in container.demux(source):
                    if packet.dts is None or packet.pts is None or packet.time_base is None:
                        continue
                    shift = int(Fraction(turn * LOOP_S) / packet.time_base)
                    packet.dts, packet.pts, packet.stream = packet.dts + shift, packet.pts + shift, stream
                    repeated.mux(packet)


if __name__ == "__main__":
    sys.exit(main())
