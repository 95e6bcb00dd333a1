"""Devices, number formats, and halving. Run: pytest tests/test_device.py"""

import os
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from pipeline.errors import DeviceUnavailable, InvalidOption
from pipeline.moondream import device
from pipeline.moondream.device import (
    choose_device,
    choose_dtype,
    free_bytes,
    halving,
    has_native_bfloat16,
    is_out_of_memory,
)

CPU, CUDA, MPS = (torch.device(kind) for kind in ("cpu", "cuda", "mps"))


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A host that has neither CUDA nor MPS, unless the test says so."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    return monkeypatch


# --- devices


def test_auto_prefers_cuda_to_mps_to_cpu(host: pytest.MonkeyPatch) -> None:
    chosen = [choose_device("auto")]
    host.setattr(torch.backends.mps, "is_available", lambda: True)
    chosen.append(choose_device("auto"))
    host.setattr(torch.cuda, "is_available", lambda: True)
    chosen.append(choose_device("auto"))

    assert chosen == [CPU, MPS, CUDA]


@pytest.mark.parametrize("name", ["cuda", "cuda:0", "mps", "meta", "xpu"])
def test_a_device_that_is_not_here_is_named(host: pytest.MonkeyPatch, name: str) -> None:
    with pytest.raises(DeviceUnavailable, match=f"no device '{name}'"):
        choose_device(name)


def test_a_gpu_past_the_last_is_not_here(host: pytest.MonkeyPatch) -> None:
    host.setattr(torch.cuda, "is_available", lambda: True)
    host.setattr(torch.cuda, "device_count", lambda: 2)

    assert choose_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(DeviceUnavailable):
        choose_device("cuda:2")


@pytest.mark.parametrize("name", ["gpu", "", "cuda:x", "CPU please"])
def test_a_name_that_is_no_device_is_an_invalid_option(host: pytest.MonkeyPatch, name: str) -> None:
    with pytest.raises(InvalidOption, match="auto, cuda"):
        choose_device(name)


# --- number formats


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_a_named_dtype_is_taken_as_it_is(name: str) -> None:
    assert choose_dtype(name, CPU, is_demo=True) == getattr(torch, name)


def test_an_unknown_dtype_is_an_invalid_option() -> None:
    with pytest.raises(InvalidOption, match="auto, bfloat16, float32, float16"):
        choose_dtype("int8", CPU, is_demo=False)


@pytest.mark.parametrize(
    ("is_native", "is_demo", "chosen"),
    [
        (True, False, torch.bfloat16),
        (True, True, torch.float32),
        (False, False, torch.float32),
    ],
)
def test_auto_on_a_cpu_is_bfloat16_only_where_it_is_native_and_never_for_the_demo(
    monkeypatch: pytest.MonkeyPatch, is_native: bool, is_demo: bool, chosen: torch.dtype
) -> None:
    monkeypatch.setattr(device, "has_native_bfloat16", lambda: is_native)

    assert choose_dtype("auto", CPU, is_demo) == chosen


@pytest.mark.parametrize(("is_supported", "chosen"), [(True, torch.bfloat16), (False, torch.float16)])
def test_auto_on_cuda_is_bfloat16_where_it_is_supported(
    monkeypatch: pytest.MonkeyPatch, is_supported: bool, chosen: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: is_supported)

    assert choose_dtype("auto", CUDA, is_demo=False) == chosen


def test_auto_on_mps_is_float32() -> None:
    assert choose_dtype("auto", MPS, is_demo=False) == torch.float32


def test_the_cpu_can_be_asked_for_bfloat16() -> None:
    assert has_native_bfloat16() in (True, False)


# --- memory


def test_free_memory_of_the_host_is_between_nothing_and_all() -> None:
    assert 0 < free_bytes(CPU) <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(("limit", "free"), [("1000", 700), ("300", 0), ("max", None)])
def test_a_container_has_no_more_than_its_limit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, limit: str, free: int | None
) -> None:
    """Its pages of files can be given back."""
    for name, text in {"max": limit, "current": "500", "stat": "anon 300\ninactive_file 200"}.items():
        (tmp_path / f"memory.{name}").write_text(text + "\n")
    monkeypatch.setattr(device, "CGROUP", tmp_path)

    assert free_bytes(CPU) == free if free is not None else free_bytes(CPU) > 1000


def test_a_host_that_does_not_tell_its_free_memory_tells_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """macOS does not: the ValueError hid that an image did not fit."""
    monkeypatch.setattr(device, "MEMINFO", Path("/no/such/file"))

    assert free_bytes(CPU) == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(
    ("error", "is_it"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"), True),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
            True,
        ),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"), True),
        (RuntimeError("shape '[2]' is invalid for input of size 3"), False),
    ],
    ids=str,
)
def test_a_failed_allocation_is_known_by_its_class_or_words(error: RuntimeError, is_it: bool) -> None:
    assert is_out_of_memory(error) == is_it


def test_this_torchs_own_failed_allocation_is_known() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)

    assert is_out_of_memory(caught.value)


# --- halving


def halve(items: list[int], limit: int, poison: int | None = None) -> tuple[list[list[int]], list[int]]:
    """-> the parts that ran through, and the items that failed, where more than `limit` or `poison` run out."""
    ran: list[list[int]] = []

    def run(part: Sequence[int]) -> None:
        if len(part) > limit or poison in part:
            raise torch.OutOfMemoryError("out of memory")
        ran.append(list(part))

    failed = halving(run, items, CPU)
    return ran, failed


def test_what_fits_runs_at_once() -> None:
    assert halve([1, 2, 3], limit=3) == ([[1, 2, 3]], [])


def test_what_does_not_fit_is_halved_in_order() -> None:
    assert halve([1, 2, 3, 4, 5], limit=2) == ([[1, 2], [3], [4, 5]], [])


def test_items_that_do_not_fit_alone_are_returned_and_the_others_run() -> None:
    assert halve([1, 2, 3, 4], limit=4, poison=3) == ([[1, 2], [4]], [3])
    assert halve([1, 2], limit=0) == ([], [1, 2])


def test_nothing_runs_for_nothing() -> None:
    assert halve([], limit=0) == ([], [])


def test_another_error_passes_through() -> None:
    def run(part: Sequence[int]) -> None:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        halving(run, [1, 2], CPU)
