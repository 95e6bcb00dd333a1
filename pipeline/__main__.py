"""The command line: `python -m pipeline [VIDEO_OR_URL]` describes a video, one line per frame as it comes.

Answers go to stdout, progress and messages to stderr. Exit codes: 0, 2 for bad input, 3 for no model, 130 after Ctrl-C.
"""

import argparse
import json
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from pipeline.errors import DescriberError, InputError, InvalidOption, ModelError
from pipeline.results import FrameResult, ModelName, VideoResults

if TYPE_CHECKING:
    from pipeline.moondream.checkpoint import Checkpoint
    from pipeline.moondream.prompts import Task

SAMPLE_VIDEO = Path(__file__).parent / "demo" / "sample.mp4"
EXIT_BAD_INPUT, EXIT_NO_MODEL, EXIT_INTERRUPTED, EXIT_TERMINATED = 2, 3, 130, 143
DEMO_NOTICE = "Demo model: it knows drawn coloured shapes and nothing else. For real videos, leave --model out."


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline",
        description="Describe a video frame by frame with Moondream2.",
        epilog="Options may be written with - or _.",
    )

    def option(name: str, **settings: Any) -> None:
        parser.add_argument(name, *([name[:2] + name[2:].replace("-", "_")] if "-" in name[2:] else []), **settings)

    parser.add_argument("video", nargs="?", metavar="VIDEO", help="a video file or its URL (default: the sample video)")
    option("--video-url", metavar="VIDEO", help="the same as VIDEO")
    option("--target-fps", type=float, default=1.0, help="frames to describe per second of video (default: 1)")
    option("--question", default="Describe this scene.", help="what to ask of each frame (default: %(default)s)")
    option("--caption", choices=("short", "normal", "long"), help="caption each frame instead of asking a question")
    option("--output-json-file", type=Path, help="also write all results to this file")
    option(
        "--allow-private-urls", default="", metavar="HOSTS", help="hosts that URLs may lead to in your own network: a,b"
    )
    option("--proxy", metavar="URL", help="download by this HTTP proxy (default: none, whatever the environment says)")
    option("--start-s", type=float, default=0.0, help="begin here, in seconds")
    option("--end-s", type=float, help="end before here, in seconds")
    option("--max-frames", type=int, help="describe only the first N frames")
    option("--max-tokens", type=int, default=256, help="longest answer, in tokens (default: 256)")
    option("--model", default=None, help="hub id, checkpoint folder, or demo (default: vikhyatk/moondream2)")
    option("--revision", default=None, help="revision of a hub id (default: the one this version is tested with)")
    option("--slots", type=int, default=8, help="frames in flight together (default: 8)")
    option("--device", default="auto", help="auto, cuda, cuda:N, mps or cpu (default: auto)")
    option("--dtype", default="auto", help="auto, bfloat16, float16 or float32 (default: auto)")
    option("--compile", action="store_true", help="run heavy layers through torch.compile")
    args = parser.parse_args(arguments)
    if args.video and args.video_url:
        parser.error("VIDEO and --video-url name two videos: give one of them.")
    args.video = args.video or args.video_url
    return args


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    try:
        return run(args)
    except InputError as error:
        return _report(error, EXIT_BAD_INPUT)
    except ModelError as error:
        return _report(error, EXIT_NO_MODEL)
    except KeyboardInterrupt:
        print("Interrupted before the first frame.", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Whoever read the answers has gone; with stdout still open, the interpreter would complain once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def run(args: argparse.Namespace) -> int:
    """Describe the video and return the exit code. Raises DescriberError."""
    from pipeline.frames import sample_frames

    _check(args)
    sample_frames(SAMPLE_VIDEO, args.target_fps, **_window(args))  # checks these options before a long download
    with _local_video(args) as (video, download_s):
        return _describe_file(args, video, download_s)


def _window(args: argparse.Namespace) -> dict[str, Any]:
    return {"start_s": args.start_s, "end_s": args.end_s, "max_frames": args.max_frames}


def _describe_file(args: argparse.Namespace, video: Path, download_s: float) -> int:
    from pipeline.frames import SamplingNotes, probe, sample_frames

    started_s = time.monotonic() - download_s
    window = _window(args)
    notes = SamplingNotes()
    info = probe(video)
    num_frames = info.estimate_samples(args.target_fps, **window)
    frames = sample_frames(video, args.target_fps, **window, notes=notes)

    checkpoint = _load(args)
    name = ModelName(
        checkpoint.name, checkpoint.revision, str(checkpoint.device), str(checkpoint.dtype).removeprefix("torch.")
    )
    results = VideoResults(args.video or video.name, args.target_fps, info.average_fps, name)
    results.run.timings.video_download = download_s
    was_interrupted = False
    with tqdm(total=num_frames, unit="frame", file=sys.stderr, dynamic_ncols=True) as bar:
        try:
            for result in _describe(args, checkpoint, frames, results):
                results.frames.append(result)
                _say(line(result), bar)
                bar.update()
        except KeyboardInterrupt:
            was_interrupted = True
    results.run.timings.overall_pipeline_internal = time.monotonic() - started_s
    results.is_truncated, results.warnings = notes.is_truncated or was_interrupted, notes.warnings
    if was_interrupted:
        results.warnings = [*notes.warnings, f"Interrupted after {len(results.frames)} frames."]
    return _finish(args, results, EXIT_INTERRUPTED if was_interrupted else 0)


def line(result: FrameResult) -> str:
    """A frame's answer as printed: `[mm:ss.mmm] description`; minutes run past 59, paragraphs are joined."""
    minutes, milliseconds = divmod(result.timestamp_ms, 60_000)
    text = result.description if result.status == "success" else f"error: {result.error_message}"
    return f"[{minutes:02}:{milliseconds // 1000:02}.{milliseconds % 1000:03}] {' '.join(text.split())}"


def _say(text: str, bar: "tqdm[Any]") -> None:
    if sys.stdout.isatty():
        bar.write(text, file=sys.stdout)  # lifts the bar out of the way
    else:
        print(text, flush=True)


def _describe(
    args: argparse.Namespace, checkpoint: "Checkpoint", frames: Any, results: VideoResults
) -> Iterator[FrameResult]:
    from pipeline.describe import describe_frames
    from pipeline.moondream.engine import Engine, positions_needed

    task = _task(args)
    engine = Engine(checkpoint, args.slots, positions_needed(task, checkpoint))
    failure: str | None = None
    for result in describe_frames(frames, engine, task, results.run):
        failure = result.error_message or failure
        yield result
    if failure and not any(frame.status == "success" for frame in results.frames):
        raise ModelError(f"No frame could be described. {failure}")


def _task(args: argparse.Namespace) -> "Task":
    from pipeline.moondream.prompts import Caption, Query

    if args.caption:
        return Caption(args.caption, max_tokens=args.max_tokens)
    return Query(args.question, max_tokens=args.max_tokens)


def _load(args: argparse.Namespace) -> "Checkpoint":
    from pipeline.moondream import hub
    from pipeline.moondream.checkpoint import load_checkpoint

    model = args.model or hub.MODEL_ID
    print(DEMO_NOTICE if model == hub.DEMO else f"Loading {model} ...", file=sys.stderr)
    return load_checkpoint(model, args.revision, args.device, args.dtype, args.compile)


@contextmanager
def _local_video(args: argparse.Namespace) -> Iterator[tuple[Path, float]]:
    """The video as a file, and the seconds its download took. What was downloaded is removed at the end."""
    if not re.match("[a-z][a-z0-9+.-]*://", args.video or "", re.IGNORECASE):
        yield Path(args.video) if args.video else SAMPLE_VIDEO, 0.0
        return
    from pipeline.download import download
    from pipeline.safe_http import Network
    from pipeline.urls import UrlRules, parse_hosts

    rules, network = UrlRules(allow_private_urls=parse_hosts(args.allow_private_urls)), Network(proxy_url=args.proxy)
    with tempfile.TemporaryDirectory(prefix="moonreel-") as folder, _ending_on_sigterm():
        with tqdm(unit="B", unit_scale=True, desc="Downloading", file=sys.stderr, dynamic_ncols=True) as bar:

            def show(num_bytes: int, num_total_bytes: int | None) -> None:
                bar.total = num_total_bytes
                bar.update(num_bytes - bar.n)

            arrived = download(args.video, Path(folder) / "video", rules=rules, network=network, on_progress=show)
        yield arrived.path, arrived.seconds


@contextmanager
def _ending_on_sigterm() -> Iterator[None]:
    """Let a termination run the cleaning up, which it would skip."""

    def end(*_: object) -> None:
        sys.exit(EXIT_TERMINATED)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _check(args: argparse.Namespace) -> None:
    """Find what is wrong before the model is loaded."""
    if args.slots < 1:
        raise InvalidOption(f"slots must be at least 1, not {args.slots}.")
    if args.proxy and not re.match("https?://.", args.proxy):
        raise InvalidOption("proxy is no URL: write it as http://host:port.")
    if args.output_json_file and not args.output_json_file.resolve().parent.is_dir():
        raise InvalidOption(f"There is no folder {args.output_json_file.resolve().parent} to write the results to.")


def _finish(args: argparse.Namespace, results: VideoResults, exit_code: int) -> int:
    for warning in results.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    num_failed = sum(frame.status == "error" for frame in results.frames)
    seconds = results.run.timings.overall_pipeline_internal
    print(f"{len(results.frames)} frames described, {num_failed} failed, in {seconds:.1f} s.", file=sys.stderr)
    if args.output_json_file:
        write_atomically(args.output_json_file, json.dumps(results.to_json(), indent=2, ensure_ascii=False) + "\n")
        print(f"Results are in {args.output_json_file}.", file=sys.stderr)
    return exit_code


def write_atomically(path: Path, text: str) -> None:
    """Write a whole file or nothing of it. Raises InvalidOption if the place cannot be written."""
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        raise InvalidOption(f"{path} cannot be written: {error.strerror}.") from error


def _report(error: DescriberError, exit_code: int) -> int:
    print(f"error: {error}", file=sys.stderr)
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
