"""Sample the frames of a local video, by presentation time, in a process of its own.

`sample_frames` streams: memory holds one frame, never the video. A stranger's file is opened and decoded only in the
decoder's process (decoder_process.py, decoder.py), which this module starts, listens to and ends; a decoder that
crashes, hangs or grows is an error about that video and nothing more. Knows nothing of URLs, models or jobs.

Check it against a folder of videos: python -m pipeline.frames tests/data/odd
"""

import argparse
import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, BinaryIO, cast

from pipeline.decoder_events import End, Event, Failure, NotAnEvent, Note, Progress, Request, read_events
from pipeline.errors import DecoderStopped, NoFrames, VideoUnreadable
from pipeline.sampling import DEFAULT_LIMITS, DecodeLimits, Frame, VideoInfo, Window

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

ROOT = Path(__file__).parent.parent
COMMAND = [sys.executable, "-m", "pipeline.decoder_process"]
# What the process gets of our environment: where its libraries are, and no secrets.
ENVIRONMENT = ("PATH", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT", "LANG", "LC_")
NICE = 5  # of a decoder: requests and the model go before
# A library that prepares for all cores of a large host would fill the address space.
FEW_THREADS = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}
PIPE_BYTES = 1 << 20  # the most that Linux gives to any process: fewer turns between the two of a frame's megabytes
END_S = 10  # to wait for a killed process, before it is left to the system

logger = logging.getLogger(__name__)


@dataclass
class SamplingNotes:
    """What sample_frames finds out on its way; complete when it has ended."""

    info: VideoInfo | None = None  # known with the first frame
    warnings: list[str] = field(default_factory=list)  # damaged intervals, an early end, a cut at max_frames
    is_truncated: bool = False  # max_frames left out frames of the window


def probe(path: str | os.PathLike[str], limits: DecodeLimits = DEFAULT_LIMITS) -> VideoInfo:
    """Read what is known before sampling, decoding one frame.

    Raises VideoNotFound, VideoUnreadable (saying what the file is), VideoTooLarge or DecoderStopped."""
    with contextlib.closing(_decode(Request(os.path.abspath(path), None, limits))) as events:
        return next(event for event in events if isinstance(event, VideoInfo))


def sample_frames(
    path: str | os.PathLike[str],
    target_fps: float,
    *,
    start_s: float = 0.0,
    end_s: float | None = None,
    max_frames: int | None = None,
    limits: DecodeLimits = DEFAULT_LIMITS,
    notes: SamplingNotes | None = None,
    on_progress: Callable[[float], None] | None = None,
) -> Generator[Frame, None, None]:
    """Sample target_fps frames per second of the window [start_s, end_s), the first max_frames of them.

    Time is cut into buckets of 1 / target_fps, counted from start_s. Each gives the first frame presented in it, under
    that frame's own time, or nothing if there is none: a target above the source's rate yields every frame once.
    Damaged packets are skipped; `notes`, if given, records what is missing. Closing the generator ends the process.
    `on_progress` is called with the time in the video, in seconds, with every frame and now and then between; what it
    raises ends the sampling.

    Raises InvalidOption at the call. While iterating, after the frames before it: VideoNotFound, VideoUnreadable
    (saying what the file is), NoFrames (nothing is presented in the window), VideoTooLarge or DecoderStopped."""
    window = Window(
        float(target_fps),
        float(start_s),
        None if end_s is None else float(end_s),
        None if max_frames is None else int(max_frames),
    )
    return _sample(path, window, limits, notes or SamplingNotes(), on_progress)


def seek_frame(path: str | os.PathLike[str], timestamp_ms: int, limits: DecodeLimits = DEFAULT_LIMITS) -> Frame | None:
    """Decode the one frame that sample_frames gave this timestamp, by way of the file's index: at once, also late in a
    long video. None if that does not find one.

    Where timestamps are damaged, it may be another frame: who has a picture of it compares. Its frame_idx is not that
    of the whole video. Raises VideoNotFound or VideoTooLarge."""
    window = Window(1.0, timestamp_ms / 1000, (timestamp_ms + 1) / 1000)
    request = Request(os.path.abspath(path), window, limits, seeks=True)
    wrong_place = (NoFrames, VideoUnreadable, DecoderStopped)  # the whole video may decode all the same
    with contextlib.suppress(*wrong_place), contextlib.closing(_decode(request)) as events:
        return next((event for event in events if isinstance(event, Frame)), None)
    return None


def _sample(
    path: str | os.PathLike[str],
    window: Window,
    limits: DecodeLimits,
    notes: SamplingNotes,
    on_progress: Callable[[float], None] | None,
) -> Generator[Frame, None, None]:
    with contextlib.closing(_decode(Request(os.path.abspath(path), window, limits))) as events:
        for event in events:
            if on_progress is not None and isinstance(event, Frame | Progress):
                on_progress(event.time_s)
            if isinstance(event, Frame):
                yield event
            elif isinstance(event, VideoInfo):
                notes.info = event
            elif isinstance(event, Note):
                notes.warnings.append(event.warning)
                notes.is_truncated |= event.is_truncated


def _decode(request: Request) -> Generator[Event, None, None]:
    """Run the decoder in a process and yield its events. Closing this generator ends the process."""
    process, window, limits = _start(), request.window, request.limits
    time_s, has_begun, was_idle = 0.0, False, threading.Event()

    def end_idle_process() -> None:
        was_idle.set()
        process.kill()

    try:
        with contextlib.suppress(BrokenPipeError), _pipe(process.stdin) as requests:  # reading tells why it has gone
            requests.write(request.encode())
        max_frames = 0 if window is None else min(window.max_frames or limits.max_frames, limits.max_frames)
        events = read_events(_pipe(process.stdout), max_frames)
        while True:
            watchdog = threading.Timer(limits.idle_s, end_idle_process)
            watchdog.daemon = True
            watchdog.start()
            try:
                event = next(events)
            except NotAnEvent as error:
                raise _stopped("it sent what is no event", time_s, has_begun) from error
            except (StopIteration, EOFError) as error:
                raise _stopped(_cause_of_death(process, was_idle.is_set(), limits), time_s, has_begun) from error
            finally:
                watchdog.cancel()
            has_begun = True
            if isinstance(event, End):
                return
            if isinstance(event, Failure):
                if event.details:
                    logger.error("The decoder failed at %.3f s: %s", time_s, event.details)
                raise event.to_error()
            if isinstance(event, Frame | Progress):
                time_s = event.time_s
            yield event
    finally:
        _end(process)


def _start() -> subprocess.Popen[bytes]:
    """Raises DecoderStopped."""
    environment = {name: value for name, value in os.environ.items() if name.startswith(ENVIRONMENT)}
    try:
        process = subprocess.Popen(
            COMMAND,
            cwd=ROOT,
            env={**environment, **FEW_THREADS},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # Ctrl-C is for the parent, which ends it. In a session of its own, Linux would give it as much of
            # the cores as the whole server has (autogroup), whatever its priority is.
            process_group=0,
        )
    except OSError as error:
        raise DecoderStopped(
            f"The decoder could not be started: {error.strerror}. Free some memory or processes, and try again."
        ) from error
    if sys.platform != "win32":
        with contextlib.suppress(OSError):  # it has ended already
            os.setpriority(os.PRIO_PROCESS, process.pid, NICE)
    if fcntl is not None:
        with contextlib.suppress(OSError):
            fcntl.fcntl(_pipe(process.stdout), fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    return process


def _pipe(pipe: IO[bytes] | None) -> BinaryIO:
    assert pipe
    return cast(BinaryIO, pipe)


def _cause_of_death(process: subprocess.Popen[bytes], was_idle: bool, limits: DecodeLimits) -> str:
    """Explain a process that has ended without a last event."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(END_S)
    if was_idle:
        return f"it did nothing for {limits.idle_s:g} s (limit idle_s)"
    if process.returncode is None or process.returncode >= 0:
        return f"it ended without a word (exit code {process.returncode})"
    number = -process.returncode
    name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
    if name == "SIGXCPU":
        return (
            f"it took more CPU time than {limits.cpu_s:g} s and {limits.cpu_s_per_video_s:g} s for each second of "
            "video (limits cpu_s and cpu_s_per_video_s)"
        )
    if name == "SIGKILL":
        return "it was killed from outside, perhaps since this host ran out of memory"
    return f"it crashed ({name})"


def _stopped(why: str, time_s: float, has_begun: bool) -> DecoderStopped:
    if not has_begun:
        return DecoderStopped(
            f"The decoder stopped before it had read anything of the video: {why}. Re-encode the video as H.264. If "
            "that happens with every video, look at this host's log."
        )
    return DecoderStopped(
        f"The decoder stopped at {time_s:.3f} s of the video: {why}. Re-encode the video as H.264, or ask for a part "
        "that ends before."
    )


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    _pipe(process.stdout).close()
    try:
        process.wait(END_S)
    except subprocess.TimeoutExpired:  # it waits for a disk or a network file system
        logger.warning("The decoder's process %d does not end", process.pid)


def main() -> int:
    """Check a folder of videos against its expected.json; exit 0 if every video comes out right."""
    from pipeline.frames_check import check_folder  # which imports this module

    parser = argparse.ArgumentParser(prog="python -m pipeline.frames", description=main.__doc__)
    parser.add_argument("folder", type=Path, help="holds videos and expected.json")
    return check_folder(parser.parse_args().folder)


if __name__ == "__main__":
    sys.exit(main())
