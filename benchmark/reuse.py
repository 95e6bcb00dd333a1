"""Measure what it saves to describe no picture twice: `python -m benchmark.reuse [VIDEO ...]`.

Each video, and a 10-minute recording of drawn scenes that mostly stand still (unless --no-recording), is described by
the demo model at 1 and 5 frames per second, with and without reuse, in turns in one process. Prints how many frames
took over an answer, how much faster the model's part was, and the largest difference that was accepted; puts the most
doubtful reuses beside their originals in a PNG, to be looked at. Prints as well what else repeats: crops that are the
same, to the pixel, as in the frame before, and so would not have to be encoded again; and, described without reuse,
answers that are the same as the one before. The last line is a JSON object. Decoding, which takes longer than the demo
model, is left out of the speed-up. Test: pytest tests/test_benchmark_reuse.py
"""

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
from numpy.typing import NDArray

from benchmark.hardware import cpu_name, num_cores
from pipeline.demo.scenes import draw_scene, random_scene
from pipeline.describe import describe_frames
from pipeline.frames import sample_frames
from pipeline.moondream.checkpoint import load_checkpoint
from pipeline.moondream.config import VisionConfig
from pipeline.moondream.engine import Engine
from pipeline.moondream.image_crops import make_crops
from pipeline.moondream.prompts import Query
from pipeline.results import RunStats
from pipeline.sampling import Frame
from pipeline.similarity import DEFAULT_THRESHOLD, Gate, difference, signature

RATES = (1.0, 5.0)
NUM_DOUBTFUL = 12
TILE_PX = (320, 180)  # width, height
FPS = 5  # of the recording
LONGEST_STAND_S = 60


@dataclass(frozen=True)
class Doubt:
    """A frame that took over an answer, and the one it took it from."""

    difference: float
    label: str
    original: NDArray[np.uint8]
    repeat: NDArray[np.uint8]


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmark.reuse", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("videos", type=Path, nargs="*", metavar="VIDEO")
    parser.add_argument("--threshold", type=float, default=DEFAULT_THRESHOLD, help="(default: %(default)g)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each kind (default: %(default)s)")
    parser.add_argument("--recording-s", type=int, default=600, help="length of the recording (default: %(default)s)")
    parser.add_argument("--no-recording", action="store_true", help="only the videos named")
    parser.add_argument(
        "--sheet", type=Path, default=Path("reuse.png"), help="the contact sheet (default: %(default)s)"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse_arguments(arguments)
    engine = Engine(load_checkpoint("demo", device="cpu"))
    rows, doubts = [], []
    with tempfile.TemporaryDirectory() as folder:
        videos = list(args.videos)
        if not args.no_recording:
            videos.append(record(Path(folder) / "recording.mp4", args.recording_s))
        for video in videos:
            for target_fps in RATES:
                rows.append(measure(video, target_fps, engine, args, doubts))
                print(line(rows[-1]), flush=True)
    doubts.sort(key=lambda doubt: -doubt.difference)
    write_sheet(args.sheet, doubts[:NUM_DOUBTFUL])
    print(f"The {len(doubts[:NUM_DOUBTFUL])} most doubtful reuses are in {args.sheet}.")
    hardware = {"cpu": cpu_name(), "num_cores": num_cores()}
    print(json.dumps({"hardware": hardware, "threshold": args.threshold, "repeats": args.repeats, "videos": rows}))
    return 0


def line(row: dict[str, Any]) -> str:
    return (
        f"{row['video']} at {row['target_fps']:g} fps: {row['num_reused']} of {row['num_frames']} frames reused "
        f"({row['share_reused']:.0%}), {row['speed_up']:.2f} times as fast, largest difference accepted "
        f"{row['largest_difference']:.1f}; {row['share_crops_unchanged']:.1%} of the crops did not change, "
        f"{row['share_answers_repeated']:.0%} of the answers repeat the one before"
    )


def measure(
    video: Path, target_fps: float, engine: Engine, args: argparse.Namespace, doubts: list[Doubt]
) -> dict[str, Any]:
    """Describe a video with and without reuse, in turns. Adds its reuses to `doubts`, the most doubtful ones only."""
    seconds: dict[bool, list[float]] = {True: [], False: []}
    answers: list[str] = []
    for _ in range(args.repeats):
        for reuses in (True, False):
            taken_s, answers = describe(video, target_fps, engine, args.threshold if reuses else 0.0)
            seconds[reuses].append(taken_s)
    found = list(reuses_of(video, target_fps, args.threshold))
    accepted = sorted((doubt for doubt in found if isinstance(doubt, Doubt)), key=lambda doubt: -doubt.difference)
    doubts += accepted[:NUM_DOUBTFUL]
    return {
        "video": video.name,
        "target_fps": target_fps,
        "num_frames": len(found),
        "num_reused": len(accepted),
        "share_reused": round(len(accepted) / len(found), 4),
        "speed_up": round(statistics.median(seconds[False]) / statistics.median(seconds[True]), 3),
        "largest_difference": round(accepted[0].difference, 2) if accepted else 0.0,
        "share_crops_unchanged": round(share_crops_unchanged(video, target_fps), 4),
        "share_answers_repeated": round(sum(a == b for a, b in itertools.pairwise(answers)) / len(answers), 4),
    }


def describe(video: Path, target_fps: float, engine: Engine, threshold: float) -> tuple[float, list[str]]:
    """-> what the model and the gate take for a video, all but decoding, in seconds; and what the frames are told to
    show"""
    decoding_s = 0.0

    def timed(frames: Iterator[Frame]) -> Iterator[Frame]:
        nonlocal decoding_s
        while True:
            started_s = time.perf_counter()
            frame = next(frames, None)
            decoding_s += time.perf_counter() - started_s
            if frame is None:
                return
            yield frame

    started_s = time.perf_counter()
    frames = Gate(threshold).sift(timed(sample_frames(video, target_fps)))
    answers = [result.description for result in describe_frames(frames, engine, Query(), RunStats())]
    return time.perf_counter() - started_s - decoding_s, answers


def share_crops_unchanged(video: Path, target_fps: float) -> float:
    """Of all crops that the real model would be given, those that equal the same crop of the frame before."""
    num_unchanged, num_crops, before = 0, 0, np.empty(0, np.uint8)
    for frame in sample_frames(video, target_fps):
        pixels = make_crops(frame.image, VisionConfig()).pixels  # (n, 378, 378, 3); n is the same in all frames
        if before.size:
            num_unchanged += int((pixels == before).all(axis=(1, 2, 3)).sum())
        num_crops, before = num_crops + len(pixels), pixels
    return num_unchanged / num_crops


def reuses_of(video: Path, target_fps: float, threshold: float) -> Iterator[Doubt | None]:
    """Of each frame, None where it is described."""
    gate = Gate(threshold)
    original: Frame | None = None
    for frame in sample_frames(video, target_fps):
        if gate.repeat(frame) is None:
            original = frame
            yield None
            continue
        assert original is not None
        how_much = difference(signature(original.image), signature(frame.image))
        times = f"{original.time_s:.1f} s, {frame.time_s:.1f} s"
        yield Doubt(how_much, f"{video.name} {times}: {how_much:.1f}", tile(original.image), tile(frame.image))


def tile(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.asarray(cv2.resize(image, TILE_PX, interpolation=cv2.INTER_AREA), np.uint8)


def write_sheet(path: Path, doubts: list[Doubt]) -> None:
    """A row per reuse: the original, the frame that took over its answer, and their difference, ten times as strong."""
    rows = []
    for doubt in doubts:
        strong = np.clip(cv2.absdiff(doubt.original, doubt.repeat).astype(np.int32) * 10, 0, 255).astype(np.uint8)
        pictures = np.hstack([doubt.original, doubt.repeat, strong])
        label = np.full((24, pictures.shape[1], 3), 255, np.uint8)
        cv2.putText(label, doubt.label, (6, 17), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (0, 0, 0), 1, cv2.LINE_AA)
        rows += [label, pictures]
    sheet = np.vstack(rows) if rows else np.full((24, 3 * TILE_PX[0], 3), 255, np.uint8)
    cv2.imwrite(str(path), cv2.cvtColor(sheet, cv2.COLOR_RGB2BGR))


def record(path: Path, seconds: int) -> Path:
    """Write drawn scenes that stand for up to a minute each, with the noise of a camera, as H.264."""
    rng = np.random.default_rng(7)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"preset": "veryfast", "g": str(FPS * 10)})
        stream.width, stream.height, stream.pix_fmt, stream.time_base = 640, 360, "yuv420p", Fraction(1, FPS)
        index = 0
        while index < seconds * FPS:
            scene = random_scene(rng, (360, 360))
            image = cv2.resize(draw_scene(scene, rng, max_noise=0), (640, 360)).astype(np.float32)
            for _ in range(min(int(rng.integers(10, LONGEST_STAND_S)) * FPS, seconds * FPS - index)):
                noisy = np.clip(image + rng.normal(0, 4, image.shape), 0, 255).astype(np.uint8)
                frame = av.VideoFrame.from_ndarray(noisy, format="rgb24")
                frame.pts = index
                index += 1
                container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


if __name__ == "__main__":
    sys.exit(main())
