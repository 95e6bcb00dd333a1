"""The process in which a video is decoded: reads one request from stdin, confines itself, and writes events to stdout.

A file of 759 bytes can make FFmpeg take 2.9 GB, and nothing can interrupt native code in a thread. So each video has a
process of its own, with bounds that the kernel keeps: address space, CPU time, no written files, and one file to open.
It is started anew and never forked, as the parent holds a model. Test: pytest tests/test_frames.py
"""

import contextlib
import math
import os
import sys
import traceback
from typing import BinaryIO

# PyAV imports these only when it needs them, and then no file can be opened any more.
import av.audio.codeccontext
import av.audio.stream
import av.subtitles.codeccontext
import av.subtitles.stream  # noqa: F401
import cv2

from pipeline.decoder import decode_video
from pipeline.decoder_events import End, Event, Failure, Progress, Request, write_event
from pipeline.errors import DecoderStopped, InputError
from pipeline.picture import NUM_THREADS
from pipeline.sampling import DecodeLimits, Frame

try:
    import resource
except ImportError:  # Windows: the process can still be ended from outside
    resource = None


def main() -> None:
    cv2.setNumThreads(NUM_THREADS)
    request = sys.stdin.buffer.read()
    pipe = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    # Up to here, what goes wrong is for our own log; from here on, what libraries say is about the video, and no event.
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())
        os.dup2(nowhere.fileno(), sys.stderr.fileno())
    with contextlib.suppress(BrokenPipeError):  # nobody wants to know any more
        _decode(request, pipe)


def _decode(request: bytes, pipe: BinaryIO) -> None:
    asked = Request.decode(request)
    limits = asked.limits
    last_event: Event = End()
    allowance = CpuAllowance(limits)
    try:
        for event in decode_video(asked.path, asked.window, limits, lambda: confine(limits), seeks=asked.seeks):
            if isinstance(event, Frame | Progress):
                allowance.earn(event.time_s)
            write_event(event, pipe)
    except InputError as error:
        last_event = Failure(error.code, str(error))
    except BrokenPipeError:
        raise
    except Exception as error:
        message = f"The decoder stopped by an error of its own: {type(error).__name__}: {error}. Please report it."
        last_event = Failure(DecoderStopped.code, message, traceback.format_exc())
    write_event(last_event, pipe)


def confine(limits: DecodeLimits) -> None:
    """Give up for good what decoding does not need. The one file that may still be opened is the video itself."""
    if resource is None:
        return
    free_fd = os.open(os.devnull, os.O_RDONLY)
    os.close(free_fd)
    _give_up(resource.RLIMIT_NOFILE, free_fd + 1)
    _give_up(resource.RLIMIT_FSIZE, 0)
    _give_up(resource.RLIMIT_CORE, 0)
    _give_up(resource.RLIMIT_AS, limits.max_memory_bytes)
    most_cpu_s = limits.cpu_s + limits.max_duration_s * limits.cpu_s_per_video_s
    _give_up(resource.RLIMIT_CPU, math.ceil(most_cpu_s) + 1, math.ceil(limits.cpu_s))


def _give_up(what: int, most: int, amount: int | None = None) -> None:
    """Set the most that can ever be had, and what may be had now, all of it by default."""
    assert resource
    _, most_before = resource.getrlimit(what)
    most = most if most_before == resource.RLIM_INFINITY else min(most, most_before)
    with contextlib.suppress(OSError, ValueError):  # macOS knows no bound of the address space
        resource.setrlimit(what, (most if amount is None else min(amount, most), most))


class CpuAllowance:
    """The CPU time that a video has earned by what it has shown, not by what it claims.

    One step earns for MAX_STEP_S at most: timestamps cost nothing, and a few frames far apart would earn hours."""

    MAX_STEP_S = 10.0

    def __init__(self, limits: DecodeLimits) -> None:
        self._limits, self._last_s, self._earned_s = limits, 0.0, 0.0

    def earn(self, time_s: float) -> None:
        self._earned_s += min(time_s - self._last_s, self.MAX_STEP_S)
        self._last_s = time_s
        if resource is None:
            return
        allowed_s = math.ceil(self._limits.cpu_s + self._earned_s * self._limits.cpu_s_per_video_s)
        _, most = resource.getrlimit(resource.RLIMIT_CPU)
        resource.setrlimit(resource.RLIMIT_CPU, (allowed_s if most < 0 else min(allowed_s, most), most))


if __name__ == "__main__":
    main()
