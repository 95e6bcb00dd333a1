"""What a server holds of the machine, read off /proc (Linux): memory, open files, threads, processes, disk.

For the load and soak programs. Test: pytest tests/test_soak.py
"""

import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

PAGE_BYTES = 4096
SPARE = 2  # open files and threads more than before: pools of threads breathe


@dataclass(frozen=True)
class Held:
    """At one moment. Memory is resident: of the server, and of its children, which decode videos."""

    rss_bytes: int
    children_bytes: int
    num_files: int
    num_threads: int
    num_children: int
    disk_bytes: int = 0
    num_disk_entries: int = 0  # files and folders


def held(pid: int, *folders: Path) -> Held:
    """What the process holds, and what lies in folders."""
    process = Path("/proc") / str(pid)
    children = _children(pid)
    # os.walk goes on where a folder is removed meanwhile.
    walked = [
        (Path(at), name) for folder in folders for at, inner, names in os.walk(folder) for name in (*inner, *names)
    ]
    sizes = [_size(at / name) for at, name in walked]
    return Held(
        rss_bytes=rss_bytes(pid),
        children_bytes=sum(map(rss_bytes, children)),
        num_files=sum(1 for _ in (process / "fd").iterdir()),
        num_threads=sum(1 for _ in (process / "task").iterdir()),
        num_children=len(children),
        disk_bytes=sum(sizes),
        num_disk_entries=len(sizes),
    )


def _children(pid: int) -> list[int]:
    found: list[int] = []
    for task in (Path("/proc") / str(pid) / "task").iterdir():
        try:
            found += map(int, (task / "children").read_text().split())
        except OSError:  # the thread has ended
            continue
    return found


def rss_bytes(pid: int) -> int:
    """Resident memory of a process; 0 where there is none."""
    try:
        return int((Path("/proc") / str(pid) / "statm").read_text().split()[1]) * PAGE_BYTES
    except OSError:  # the child has ended
        return 0


def _size(path: Path) -> int:
    try:
        return path.stat().st_size if path.is_file() else 0
    except OSError:  # removed meanwhile
        return 0


def more_at_rest(before: Held, after: Held) -> list[str]:
    """Of what there should be no more after some work than before, in words."""
    counts = [
        (name, getattr(before, name), getattr(after, name)) for name in ("num_files", "num_threads", "num_children")
    ]
    return [f"{name} at rest went from {had} to {has}" for name, had, has in counts if has > had + SPARE]


def slope_per_hour(times_s: Sequence[float], values: Sequence[float]) -> float:
    """Of the straight line nearest to the values (least squares), in their unit per hour."""
    return 3600 * statistics.linear_regression(times_s, values).slope


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that so many percent of the values do not exceed (nearest rank)."""
    ordered = sorted(values)
    return ordered[max(0, -int(-len(ordered) * percent // 100) - 1)]
