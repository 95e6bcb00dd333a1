"""The engines of a pool: a set of weights on each device, and as many engines on each as it takes.

    checkpoints = load_on_all("demo", device="auto")
    settings = [plan(checkpoint, None, None, context_len, None) for checkpoint in checkpoints]
    pool = Pool(engine_makers(checkpoints, settings, context_len))

Engines of one device share its weights. Decides nothing: capacity.py does. Test: pytest tests/test_capacity.py
"""

import logging
from collections.abc import Callable, Sequence
from functools import partial

from pipeline.errors import OutOfMemory
from pipeline.moondream.capacity import Setting
from pipeline.moondream.checkpoint import Checkpoint, load_checkpoint
from pipeline.moondream.device import all_devices, share_threads
from pipeline.moondream.engine import Engine
from pipeline.moondream.hub import OnProgress

logger = logging.getLogger(__name__)


def load_on_all(
    model: str, revision: str | None, device: str, dtype: str, on_progress: OnProgress | None = None
) -> list[Checkpoint]:
    """The checkpoint on each device that `device` means: on every GPU, if it is auto and there are several, but for
    those that cannot take it.

    Raises what load_checkpoint raises."""
    checkpoints: list[Checkpoint] = []
    names = all_devices(device)
    for name in names:
        try:
            checkpoints.append(load_checkpoint(model, revision, name, dtype, on_progress=on_progress))
        except (OutOfMemory, RuntimeError) as error:
            if name == names[-1] and not checkpoints:
                raise
            logger.warning("%s is left out: %s", name, error)
    return checkpoints


def engine_makers(
    checkpoints: Sequence[Checkpoint], settings: Sequence[Setting], context_len: int
) -> list[Callable[[], Engine]]:
    """What makes the engine of each instance, in the thread that it is to belong to: setting by setting, the instances
    of its checkpoint. Neighbours are on different devices."""
    num_here = sum(s.instances for c, s in zip(checkpoints, settings, strict=True) if c.device.type == "cpu")
    places = [
        (number, partial(_make_engine, checkpoint, setting.slots, context_len, num_here))
        for checkpoint, setting in zip(checkpoints, settings, strict=True)
        for number in range(setting.instances)
    ]
    return [make for _, make in sorted(places, key=lambda place: place[0])]


def _make_engine(checkpoint: Checkpoint, num_slots: int, context_len: int, num_on_cpu: int) -> Engine:
    if checkpoint.device.type == "cpu":
        share_threads(num_on_cpu)
    return Engine(checkpoint, num_slots, context_len)
