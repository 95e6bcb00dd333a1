"""What a benchmark's figures hold for, and how much memory a process has taken."""

import contextlib
import os
import platform
import re
import resource
from pathlib import Path


def cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.*)", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else []
    return names[0] if names else platform.processor()


def num_cores() -> int | None:
    return os.cpu_count()


def peak_rss_bytes(pid: int | None = None) -> int:
    """The most memory that a process, this one by default, has had resident so far, mapped files included."""
    status = Path(f"/proc/{pid or 'self'}/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in bytes on macOS
    # Not ru_maxrss: on Linux a process takes over its parent's, which may have been large.
    peaks_kib = re.findall(r"^VmHWM:\s*(\d+) kB", status.read_text(), re.MULTILINE)
    return int(peaks_kib[0]) * 1024 if peaks_kib else 0  # a process that has just ended has none


def reset_peak_rss() -> None:
    """Let the peak of this process begin at what it has resident now; where the system cannot, it stays as it is."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def child_pids() -> list[int]:
    """The processes that this one's main thread has started and that run still; Linux only."""
    return list(map(int, Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()))
