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

from pipeline.decoder import decode_video
from pipeline.decoder_events import End, Event, Failure, Progress, decode_request, write_event
from pipeline.errors import DecoderStopped, InputError
from pipeline.sampling import DecodeLimits, Frame

try:
    import resource
except ImportError:  # Windows: the process can still be ended from outside
    resource = None


def main() -> None:
    request = sys.stdin.buffer.read()
    pipe = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever a library prints is no event
    with contextlib.suppress(BrokenPipeError):  # nobody wants to know any more
        _decode(request, pipe)


def _decode(request: bytes, pipe: BinaryIO) -> None:
    path, window, limits = decode_request(request)
    last_event: Event = End()
    try:
        for event in decode_video(path, window, limits, lambda: confine(limits)):
            allow_cpu_time(limits, event)
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
    """Give up what decoding does not need. The one file that may still be opened is the video itself."""
    if resource is None:
        return
    free_fd = os.open(os.devnull, os.O_RDONLY)
    os.close(free_fd)
    _set_limit(resource.RLIMIT_NOFILE, free_fd + 1)
    _set_limit(resource.RLIMIT_FSIZE, 0)
    _set_limit(resource.RLIMIT_CORE, 0)
    _set_limit(resource.RLIMIT_CPU, math.ceil(limits.cpu_s))
    _set_limit(resource.RLIMIT_AS, limits.max_memory_bytes)


def allow_cpu_time(limits: DecodeLimits, event: Event) -> None:
    """Grant what the video has earned by what it has shown, not by the duration that it claims."""
    if resource is not None and isinstance(event, Frame | Progress):
        _set_limit(resource.RLIMIT_CPU, math.ceil(limits.cpu_s + event.time_s * limits.cpu_s_per_video_s))


def _set_limit(what: int, amount: int) -> None:
    assert resource
    _, most = resource.getrlimit(what)
    with contextlib.suppress(OSError, ValueError):  # macOS knows no bound of the address space
        resource.setrlimit(what, (amount if most == resource.RLIM_INFINITY else min(amount, most), most))


if __name__ == "__main__":
    main()
