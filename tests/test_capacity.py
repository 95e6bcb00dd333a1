"""How many instances and slots a device takes, and what makes their engines. GPUs are played here: none is needed."""

import dataclasses
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from pool_watch import alone_with_an_engine, describe, frames, told
from transformers import PreTrainedTokenizerFast

from pipeline.moondream import capacity, device, instances
from pipeline.moondream.capacity import STARTING_POINTS, Setting, device_name, device_slug, plan, read_tuned
from pipeline.moondream.checkpoint import Checkpoint
from pipeline.moondream.config import MoondreamConfig
from pipeline.moondream.instances import engine_makers, load_on_all
from pipeline.moondream.model import Moondream
from pipeline.pool import Pool

CONTEXT = 2048
CUDA = torch.device("cuda")
WEIGHTS_AND_CUDA_GB = 3.85 + 0.5


@pytest.fixture(scope="module")
def real() -> Checkpoint:
    """The real model without its weights."""
    with torch.device("meta"):
        model = Moondream(MoondreamConfig())
    return Checkpoint(model, PreTrainedTokenizerFast, "real", None, torch.device("cpu"), torch.bfloat16)  # type: ignore[arg-type]


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> "Host":
    return Host(monkeypatch)


class Host:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch

    def has(self, name: str, free_gb: float) -> None:
        self._monkeypatch.setattr(capacity, "device_name", lambda device: name)
        self._monkeypatch.setattr(capacity, "free_bytes", lambda device: int(free_gb * 1e9))


def chosen(setting: Setting) -> tuple[int, int]:
    return setting.instances, setting.slots


def saved(folder: Path, **model: Any) -> Path:
    best = {"instances": 2, "slots": 16}
    entry = {"dtype": "bfloat16", "measured_at": "2026-11-24", "best": best, **model}
    text = json.dumps({"device": "NVIDIA A10G", "models": [{**entry, "num_parameters": 1}, entry]})
    (folder / "nvidia-a10g.json").write_text(text, encoding="utf-8")
    return folder


# Arithmetic


def test_a_slot_of_the_real_model_takes_403_mb(real: Checkpoint) -> None:
    assert CONTEXT * real.kv_bytes_per_position == 402_653_184


@pytest.mark.parametrize(
    ("name", "usable_gb", "expected"),
    [
        ("Tesla T4", 15.8, (2, 8)),
        ("NVIDIA A10G", 23.7, (2, 16)),
        ("NVIDIA L4", 23.7, (2, 16)),
        ("NVIDIA L40S", 47.8, (2, 32)),
        ("NVIDIA A100-SXM4-40GB", 42.4, (2, 32)),
        ("NVIDIA A100 80GB PCIe", 84.9, (2, 32)),
        ("NVIDIA H100 80GB HBM3", 84.9, (2, 32)),
    ],
)
def test_the_starting_points_are_what_the_memory_of_these_gpus_holds(
    real: Checkpoint, host: Host, name: str, usable_gb: float, expected: tuple[int, int]
) -> None:
    host.has(name, usable_gb - WEIGHTS_AND_CUDA_GB)
    setting = plan(dataclasses.replace(real, device=CUDA), None, None, CONTEXT, None)

    assert chosen(setting) == expected
    assert expected in STARTING_POINTS.values() and "computed, not measured" in setting.why


@pytest.mark.parametrize(
    ("free_gb", "expected"),
    [(0.1, (1, 1)), (2.5, (1, 2)), (8.0, (1, 13)), (10.5, (2, 8)), (14.0, (2, 11)), (99.0, (2, 32))],
)
def test_of_a_gpu_as_much_is_used_as_is_free(
    real: Checkpoint, host: Host, free_gb: float, expected: tuple[int, int]
) -> None:
    """Whatever its name: others may use it, too."""
    host.has("Some GPU", free_gb)
    setting = plan(dataclasses.replace(real, device=CUDA), None, None, CONTEXT, None)
    assert chosen(setting) == expected

    host.has("NVIDIA H100 80GB HBM3", free_gb)
    assert chosen(plan(dataclasses.replace(real, device=CUDA), None, None, CONTEXT, None)) == expected


@pytest.mark.parametrize(("kind", "free_gb", "slots"), [("cpu", 22.0, 8), ("cpu", 4.0, 4), ("mps", 64.0, 8)])
def test_on_a_cpu_there_is_one_instance(real: Checkpoint, host: Host, kind: str, free_gb: float, slots: int) -> None:
    host.has("Some CPU", free_gb)
    setting = plan(dataclasses.replace(real, device=torch.device(kind)), None, None, CONTEXT, None)

    assert chosen(setting) == (1, slots)
    assert setting.why == (
        f"1 instance x {slots} slots on {kind}, computed, not measured: {free_gb * 1e9 / 2**30:.1f} GiB free, "
        f"a slot takes 0.43 GiB, an instance 0.97 GiB more; 1 instance x 8 slots at most on any {kind}"
    )


def test_numbers_that_are_given_win(real: Checkpoint, host: Host, tmp_path: Path) -> None:
    host.has("NVIDIA A10G", 14.0)
    on_gpu = dataclasses.replace(real, device=CUDA)

    assert plan(real, 3, 5, CONTEXT, saved(tmp_path)) == Setting(3, 5, "3 instances x 5 slots on cpu, as set")
    assert chosen(plan(on_gpu, 1, None, CONTEXT, None)) == (1, 16)
    assert chosen(plan(on_gpu, None, 4, CONTEXT, None)) == (2, 4)
    assert chosen(plan(on_gpu, None, 99, CONTEXT, None)) == (1, 99)  # the engine will say that it does not fit


# What was measured


def test_what_was_measured_on_such_a_device_wins_over_arithmetic(real: Checkpoint, host: Host, tmp_path: Path) -> None:
    """For a model of this size and number format; and where the memory is there that it takes."""
    num_parameters = sum(parameter.numel() for parameter in real.model.parameters())
    folder = saved(tmp_path, num_parameters=num_parameters, best={"instances": 1, "slots": 12})
    host.has("NVIDIA A10G", 19.3)
    on_gpu = dataclasses.replace(real, device=CUDA)

    setting = plan(on_gpu, None, None, CONTEXT, folder)
    where = f"{folder.parent.name}/{folder.name}/nvidia-a10g.json"
    assert setting == Setting(1, 12, f"1 x 12 measured on NVIDIA A10G on 2026-11-24 ({where})")
    assert chosen(plan(on_gpu, 2, None, CONTEXT, folder)) == (2, 12)
    assert read_tuned(folder, dataclasses.replace(on_gpu, dtype=torch.float16)) is None
    assert chosen(plan(dataclasses.replace(on_gpu, dtype=torch.float16), None, None, CONTEXT, folder)) == (2, 16)
    host.has("NVIDIA A10G", 4.0)
    assert "computed" in plan(on_gpu, None, None, CONTEXT, folder).why


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"models": [{}]}', '{"device": "x", "models": [{"num_parameters": N, "dtype": "bfloat16"}]}']
    + [
        '{"device": "x", "models": [{"num_parameters": N, "dtype": "bfloat16", "measured_at": "", "best": B}]}'.replace(
            "B", best
        )
        for best in ("null", '{"instances": 0, "slots": 8}', '{"instances": 1, "slots": 9999}')
    ],
)
def test_a_file_that_is_no_result_is_ignored_with_a_word(
    real: Checkpoint, host: Host, tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str
) -> None:
    host.has("NVIDIA A10G", 19.3)
    assert read_tuned(tmp_path, real) is None and not caplog.records
    num_parameters = sum(parameter.numel() for parameter in real.model.parameters())
    (tmp_path / "nvidia-a10g.json").write_text(text.replace("N", str(num_parameters)), encoding="utf-8")

    assert read_tuned(tmp_path, real) is None
    (record,) = caplog.records
    assert "nvidia-a10g.json is no result of a benchmark" in record.getMessage()


def test_a_device_has_a_name_and_a_file(host: Host) -> None:
    assert device_name(torch.device("cpu")).endswith(f", {device.num_cores()} cores")
    host.has("NVIDIA RTX 6000 (Ada)", 1)
    assert device_slug(CUDA) == "nvidia-rtx-6000-ada"


# The engines


def test_each_of_several_devices_has_its_weights_and_its_instances(
    demo: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(instances, "all_devices", lambda name: ["cpu", "cpu"])
    loaded = load_on_all("demo", None, "auto", "float32")
    assert len({each.model.text.wte.data_ptr() for each in loaded}) == 2

    makers = engine_makers(loaded, [Setting(2, 2, ""), Setting(1, 3, "")], CONTEXT)
    made = [make() for make in makers]
    assert [(loaded.index(engine.checkpoint), engine.num_slots) for engine in made] == [(0, 2), (1, 3), (0, 2)]
    pool = Pool(makers)
    assert pool.num_slots == 7
    assert told(describe(pool, frames(12))) == alone_with_an_engine(demo, frames(12))
    pool.close()


def test_all_gpus_are_taken_unless_one_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)

    assert device.all_devices("auto") == ["cuda:0", "cuda:1", "cuda:2"]
    assert device.all_devices("cuda:1") == ["cuda:1"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert device.all_devices("auto") == ["auto"]


def test_instances_on_a_cpu_share_its_cores(demo: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each in its thread: they would wait for one another's."""
    before = torch.get_num_threads()
    monkeypatch.setattr(device, "NUM_THREADS", 8)
    seen: dict[int, int] = {}

    def look(num_instances: int) -> None:
        make, *_ = engine_makers([demo], [Setting(num_instances, 1, "")], CONTEXT)
        make()
        seen[num_instances] = torch.get_num_threads()

    for num_instances in (1, 3, 9):
        thread = threading.Thread(target=look, args=(num_instances,))
        thread.start()
        thread.join()
    torch.set_num_threads(before)

    assert seen == {1: 8, 3: 2, 9: 1}
