"""The command line: `python -m pipeline [VIDEO_OR_URL]` describes a video, one line per frame as it comes.

Answers go to stdout, progress and messages to stderr. Exit codes: 0, 2 for bad input, 3 for no model, 130 after Ctrl-C.
"""

import argparse
import contextlib
import io
import json
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from pipeline.atomic import check_writable, write_atomically
from pipeline.demo import SAMPLE_VIDEO
from pipeline.errors import DescriberError, InputError, InvalidOption, ModelError
from pipeline.moondream.config import TokenizerConfig
from pipeline.moondream.hub import DEMO, MODEL_ID
from pipeline.moondream.prompts import DEFAULT_MAX_TOKENS, DEFAULT_QUESTION, Caption, Query
from pipeline.moondream.prompts import check as check_task
from pipeline.moondream.scheduler import DEFAULT_SLOTS, MAX_SLOTS
from pipeline.results import FrameResult, ModelName, VideoResults
from pipeline.sampling import LIMITS, DecodeLimits, Window, check_size, parse_limits
from pipeline.similarity import DEFAULT_THRESHOLD, Gate, Repeat

if TYPE_CHECKING:  # these bring torch, which --help need not wait for
    from pipeline.moondream.checkpoint import Checkpoint
    from pipeline.sampling import Frame

EXIT_NO_READER, EXIT_BAD_INPUT, EXIT_NO_MODEL, EXIT_INTERRUPTED, EXIT_TERMINATED = 1, 2, 3, 130, 143
BAR: dict[str, Any] = {
    "unit": "frames",
    "bar_format": "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}]",
    "dynamic_ncols": True,
}
DEMO_NOTICE = "Demo model: it knows drawn coloured shapes and nothing else. For real videos, leave --model out."


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline",
        description="Describe a video frame by frame with Moondream2.",
        epilog="Options may be written with - or _.",
        allow_abbrev=False,
    )

    def option(name: str, **settings: Any) -> None:
        parser.add_argument(name, *([name[:2] + name[2:].replace("-", "_")] if "-" in name[2:] else []), **settings)

    parser.add_argument("video", nargs="?", metavar="VIDEO", help="a video file or its URL (default: the sample video)")
    option("--video-url", metavar="VIDEO", help="the same as VIDEO")
    option("--target-fps", type=float, default=1.0, help="frames to describe per second of video (default: 1)")
    option("--question", default=DEFAULT_QUESTION, help="what to ask of each frame (default: %(default)s)")
    option("--caption", choices=("short", "normal", "long"), help="caption each frame instead of asking a question")
    option("--output-json-file", type=Path, help="also write all results to this file")
    option(
        "--allow-private-urls", default="", metavar="HOSTS", help="hosts that URLs may lead to in your own network: a,b"
    )
    option("--proxy", metavar="URL", help="download by this HTTP proxy (default: none, whatever the environment says)")
    option("--start-s", type=float, default=0.0, help="begin here, in seconds")
    option("--end-s", type=float, help="end before here, in seconds")
    option("--max-frames", type=int, help="describe only the first N frames")
    option("--limit", action="append", default=[], metavar="NAME=N", help=f"take more or less of a video: {limits()}")
    option(
        "--max-tokens", type=int, default=DEFAULT_MAX_TOKENS, help="longest answer, in tokens (default: %(default)s)"
    )
    option(
        "--reuse-similar",
        type=float,
        default=DEFAULT_THRESHOLD,
        metavar="N",
        help="a frame that differs by at most N of 255 from the last described one takes over its answer; 0: none does "
        "(default: %(default)g)",
    )
    option("--model", default=MODEL_ID, help="hub id, checkpoint folder, or demo (default: %(default)s)")
    option("--revision", default=None, help="revision of a hub id (default: the one this version is tested with)")
    option("--slots", type=int, default=DEFAULT_SLOTS, help="frames in flight together (default: %(default)s)")
    option("--device", default="auto", help="auto, cuda, cuda:N, mps or cpu (default: auto)")
    option("--dtype", default="auto", help="auto, bfloat16, float16 or float32 (default: auto)")
    option("--compile", action="store_true", help="run heavy layers through torch.compile")
    args = parser.parse_args(arguments)
    if args.video and args.video_url:
        parser.error("VIDEO and --video-url name two videos: give one of them.")
    args.video = args.video_url if args.video is None else args.video
    return args


def limits() -> str:
    return "; ".join(f"{name}={limit.default:,.12g}, {limit.metadata['help']}" for name, limit in LIMITS.items())


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    if sys.stdout is None:  # closed by the caller
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - for as long as the process lives
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character must not end the run
    try:
        return run(args)
    except InputError as error:
        return _report(error, EXIT_BAD_INPUT)
    except ModelError as error:
        return _report(error, EXIT_NO_MODEL)
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Whoever read the answers has gone; with stdout still open, the interpreter would complain once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_NO_READER


def run(args: argparse.Namespace) -> int:
    """Describe the video and return the exit code. Raises DescriberError, and what else ended the run."""
    window = Window(args.target_fps, args.start_s, args.end_s, args.max_frames)
    limits = parse_limits(args.limit)
    _check(args)
    with _local_video(args, limits) as (video, download_s):
        return _describe_file(args, video, window, limits, download_s)


def _describe_file(
    args: argparse.Namespace, video: Path, window: Window, limits: DecodeLimits, download_s: float
) -> int:
    """Describe a local file. Whatever ends the run, the results so far are written."""
    from pipeline.frames import SamplingNotes, probe, sample_frames

    started_s = time.monotonic() - download_s
    info = probe(video, limits)
    check_size(info, window, limits)
    num_frames = info.estimate_samples(window)
    asked = "an unknown number of frames" if num_frames is None else f"{num_frames:,} frames"
    print(f"{info}. That is {asked} at {window.target_fps:g} per second.", file=sys.stderr)
    notes = SamplingNotes()
    frames = sample_frames(video, **vars(window), limits=limits, notes=notes)
    checkpoint = _load(args)
    name = ModelName(checkpoint.name, checkpoint.revision, str(checkpoint.device), checkpoint.dtype_name)
    shown = os.fsencode(video.name if args.video is None else args.video).decode(errors="replace")
    results = VideoResults(shown, args.target_fps, info.average_fps, name)
    results.run.timings.video_download = download_s

    ended_by: BaseException | None = None
    with contextlib.closing(frames), tqdm(total=num_frames, file=sys.stderr, **BAR) as bar:
        try:
            for result in _describe(args, checkpoint, Gate(args.reuse_similar).sift(frames), results):
                results.frames.append(result)
                _say(line(result), bar)
                bar.update()
        except (KeyboardInterrupt, Exception) as error:
            ended_by = error
    if ended_by and not results.frames:
        raise ended_by  # nothing to keep: an older results file stays
    results.run.timings.overall_pipeline_internal = time.monotonic() - started_s
    results.is_truncated, results.warnings = notes.is_truncated or ended_by is not None, list(notes.warnings)
    if ended_by:
        results.warnings.append(f"{_ending(ended_by)} after {len(results.frames)} frames.")
    with _uninterrupted():
        _finish(args, results)
    if isinstance(ended_by, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    if ended_by:
        raise ended_by
    if results.frames and all(frame.status == "error" for frame in results.frames):
        raise ModelError(f"No frame could be described. {results.frames[0].error_message}")
    return 0


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """A second Ctrl-C must not lose what is being written."""
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def _ending(error: BaseException) -> str:
    return "Interrupted" if isinstance(error, KeyboardInterrupt) else f"Ended by {type(error).__name__}: {error}"


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
    args: argparse.Namespace, checkpoint: "Checkpoint", frames: Iterable["Frame | Repeat"], results: VideoResults
) -> Iterator[FrameResult]:
    from pipeline.describe import describe_frames
    from pipeline.moondream.engine import Engine, positions_needed

    task = _task(args)
    engine = Engine(checkpoint, args.slots, positions_needed(task, checkpoint))
    return describe_frames(frames, engine, task, results.run)


def _task(args: argparse.Namespace) -> Query | Caption:
    if args.caption:
        return Caption(args.caption, max_tokens=args.max_tokens)
    return Query(args.question, max_tokens=args.max_tokens)


def _load(args: argparse.Namespace) -> "Checkpoint":
    from pipeline.moondream.checkpoint import load_checkpoint

    print(DEMO_NOTICE if args.model == DEMO else f"Loading {args.model} ...", file=sys.stderr)
    return load_checkpoint(args.model, args.revision, args.device, args.dtype, args.compile)


@contextmanager
def _local_video(args: argparse.Namespace, limits: DecodeLimits) -> Iterator[tuple[Path, float]]:
    """The video as a file, and the seconds its download took. What was downloaded is removed at the end."""
    if not re.match("[a-z][a-z0-9+.-]*://", args.video or "", re.IGNORECASE):
        yield SAMPLE_VIDEO if args.video is None else Path(args.video), 0.0
        return
    from pipeline.download import DownloadLimits, download
    from pipeline.safe_http import Network
    from pipeline.urls import UrlRules, parse_hosts

    rules, network = UrlRules(allow_private_urls=parse_hosts(args.allow_private_urls)), Network(proxy_url=args.proxy)
    with tempfile.TemporaryDirectory(prefix="moonreel-") as folder, _ending_on_sigterm():
        with tqdm(unit="B", unit_scale=True, desc="Downloading", file=sys.stderr, dynamic_ncols=True) as bar:

            def show(num_bytes: int, num_total_bytes: int | None) -> None:
                bar.total = num_total_bytes
                bar.update(num_bytes - bar.n)

            arrived = download(
                args.video,
                Path(folder) / "video",
                limits=DownloadLimits(max_video_bytes=limits.max_video_bytes),
                rules=rules,
                network=network,
                on_progress=show,
            )
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
    """Find what is wrong before anything is downloaded or loaded. Raises InvalidOption."""
    if not 1 <= args.slots <= MAX_SLOTS:
        raise InvalidOption(f"slots must be from 1 to {MAX_SLOTS}, not {args.slots}.")
    check_task(_task(args), TokenizerConfig())
    if not 0 <= args.reuse_similar <= 255:
        raise InvalidOption(f"reuse_similar must be from 0 to 255, not {args.reuse_similar:g}.")
    if args.proxy and not re.match("https?://.", args.proxy):
        raise InvalidOption("proxy is no URL: write it as http://host:port.")
    if args.output_json_file is not None:
        check_writable(args.output_json_file, must_not_be=None if args.video is None else Path(args.video))


def _finish(args: argparse.Namespace, results: VideoResults) -> None:
    for warning in results.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    num_failed = sum(frame.status == "error" for frame in results.frames)
    num_reused = sum(frame.reused_from_frame_idx is not None for frame in results.frames)
    failed = f" ({num_reused} look like the one before)" if num_reused else ""
    failed += f", {num_failed} failed" if num_failed else ""
    seconds = results.run.timings.overall_pipeline_internal
    print(f"{len(results.frames) - num_failed} frames described{failed}, in {seconds:.1f} s.", file=sys.stderr)
    if args.output_json_file is not None:
        write_atomically(args.output_json_file, json.dumps(results.to_json(), indent=2, ensure_ascii=False) + "\n")
        print(f"Results are in {args.output_json_file}.", file=sys.stderr)


def _report(error: DescriberError, exit_code: int) -> int:
    print(f"error: {error}", file=sys.stderr)
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
