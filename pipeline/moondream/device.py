"""Devices, number formats and memory: what this host offers and what an attempt that ran out of it looks like."""

import logging
import os
import platform
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch

from pipeline.errors import DeviceUnavailable, InvalidOption, OutOfMemory

logger = logging.getLogger(__name__)

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}
OUT_OF_MEMORY_WORDS = ("can't allocate memory", "not enough memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
GIB = 1024**3
MEMINFO, CPUINFO, CGROUP = Path("/proc/meminfo"), Path("/proc/cpuinfo"), Path("/sys/fs/cgroup")
NUM_THREADS = torch.get_num_threads()  # by custom, or as OMP_NUM_THREADS has it; read before anybody sets another
Item = TypeVar("Item")


def choose_device(name: str) -> torch.device:
    """ "auto" is cuda, else mps, else cpu. Raises DeviceUnavailable for one that is not here."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, is_here in available.items() if is_here))
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InvalidOption(f"device must be auto, cuda, cuda:N, mps or cpu, not {name!r}.") from error
    if not available.get(device.type, False) or (
        device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()
    ):
        raise DeviceUnavailable(f"There is no device {name!r} on this host. Choose another with --device, or auto.")
    return device


def all_devices(name: str) -> list[str]:
    """The devices that a name means: with "auto", each of several GPUs; else that one."""
    num_gpus = torch.cuda.device_count() if name == "auto" and torch.cuda.is_available() else 0
    return [f"cuda:{index}" for index in range(num_gpus)] if num_gpus > 1 else [name]


def choose_dtype(name: str, device: torch.device, is_demo: bool) -> torch.dtype:
    """ "auto" is bfloat16 where the hardware computes in it, else float32; for the demo model on a CPU, float32."""
    if name != "auto":
        if name not in DTYPES:
            raise InvalidOption(f"dtype must be auto, {', '.join(DTYPES)}, not {name!r}.")
        return DTYPES[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type == "cpu" and not is_demo and has_native_bfloat16():
        return torch.bfloat16
    return torch.float32


def has_native_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware (AVX512_BF16 or AMX)."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def free_bytes(device: torch.device) -> int:
    """Memory that can still be allocated on the device; for cpu, that of the host (all of it where the system does not
    tell), or of the container."""
    if device.type == "cuda":
        kept_bytes = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by torch, for later
        return torch.cuda.mem_get_info(device)[0] + kept_bytes
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    if MEMINFO.exists():  # counts what the page cache can give back, too
        (available_kib,) = re.findall(r"^MemAvailable:\s*(\d+) kB", MEMINFO.read_text(), re.MULTILINE)
        available_bytes, left_bytes = int(available_kib) * 1024, _left_in_container()
        return available_bytes if left_bytes is None else min(available_bytes, left_bytes)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _left_in_container() -> int | None:
    """What a container may still use, if it has a limit (cgroup v2): the kernel ends whoever goes beyond."""
    try:
        limit_bytes = int((CGROUP / "memory.max").read_text())
        used_bytes = int((CGROUP / "memory.current").read_text())
        stat = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        return max(0, limit_bytes - used_bytes + int(stat["inactive_file"]))  # files' pages are given back
    except (OSError, ValueError, KeyError):  # no container, or one without a limit: "max"
        return None


def cpu_name() -> str:
    """As the system calls it; perhaps nothing."""
    names = re.findall(r"^model name\s*: (.*)", CPUINFO.read_text(), re.MULTILINE) if CPUINFO.exists() else []
    return names[0] if names else platform.processor()


def num_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def share_threads(num_instances: int) -> None:
    """Give the calling thread, one of so many instances on a CPU, its share of the cores. (Threads that begin later
    take over the last number that any thread has set: all instances have to set the same.)"""
    torch.set_num_threads(max(1, NUM_THREADS // num_instances))


def own_stream(device: torch.device) -> "torch.cuda.Stream | None":
    """A stream for the work of one engine, which then runs beside that of others; where there are none, None, which
    torch.cuda.stream() takes, too. What the device was given until now (weights) is done when this returns."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    return torch.cuda.Stream(device)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that it was given in this thread's stream, so that a clock can be read."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
    elif device.type == "mps":
        torch.mps.synchronize()


def is_out_of_memory(error: Exception) -> bool:
    """Whether an exception means that an allocation failed; only NumPy and CUDA have a class for it."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(
        words in str(error) for words in OUT_OF_MEMORY_WORDS
    )


@contextmanager
def explained_memory(what: str, device: torch.device, needed_bytes: int) -> Iterator[None]:
    """Turn a failed allocation into OutOfMemory."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise out_of_memory(what, device, needed_bytes) from error


def out_of_memory(what: str, device: torch.device, needed_bytes: int) -> OutOfMemory:
    """The error for something that does not fit."""
    return OutOfMemory(
        f"{what} does not fit the memory of {device}: it needs about {needed_bytes / GIB:.1f} GiB, "
        f"{free_bytes(device) / GIB:.1f} GiB are free. Use fewer slots, free memory, or another device."
    )


def halving(run: Callable[[Sequence[Item]], None], items: Sequence[Item], device: torch.device) -> list[Item]:
    """Call run(items); where it runs out of memory, call it on each half instead, down to single items.

    -> the items that do not fit even alone. `run` must be safe to repeat.
    """
    if not items:
        return []
    try:
        run(items)
        return []
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    # Outside the handler: the exception holds the frames, and so the tensors, of the failed attempt.
    if device.type == "cuda":
        torch.cuda.empty_cache()
    if len(items) == 1:
        return list(items)
    logger.warning("out of memory on %s with %d at once: halving", device, len(items))
    middle = len(items) // 2
    return halving(run, items[:middle], device) + halving(run, items[middle:], device)
