"""Load the model and make the pool of its instances, as the settings say: here, or on a Ray cluster.

torch takes seconds to load, and ray is not there for most: neither is imported before it is needed.
Test: pytest tests/test_service.py
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jobs.log import adopt_loggers
from jobs.settings import Settings
from pipeline.moondream.hub import OnProgress
from pipeline.moondream.prompts import Task
from pipeline.pool import Pool
from pipeline.results import ModelName

GRACE_S = 5.0  # an engine that is elsewhere ends a batch that takes too long by itself

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedPool:
    """positions_needed: of a task, how many the longest answer needs, and how many there are."""

    pool: Pool
    model: ModelName
    positions_needed: Callable[[Task], tuple[int, int]]


def load_here(settings: Settings, results: Path | None, on_progress: OnProgress) -> LoadedPool:
    """results: a folder of what benchmarks have measured, by device. Raises what load_checkpoint and Engine raise."""
    from pipeline.moondream.capacity import plan
    from pipeline.moondream.engine import positions_needed
    from pipeline.moondream.instances import engine_makers, load_on_all

    adopt_loggers("huggingface_hub", "transformers")
    checkpoints = load_on_all(
        settings.model, settings.revision, settings.device, settings.dtype, on_progress=on_progress
    )
    checkpoint = checkpoints[0]
    max_context = checkpoint.config.text.max_context
    instances, slots = _number(settings.instances), _number(settings.slots)
    plans = [plan(each, instances, slots, max_context, results) for each in checkpoints]
    for each in plans:
        logger.info("%s", each.why)
    pool = Pool(engine_makers(checkpoints, plans, max_context), batch_deadline_s=settings.batch_deadline_s)
    device = ", ".join(str(each.device) for each in checkpoints)
    model = ModelName(checkpoint.name, checkpoint.revision, device, checkpoint.dtype_name)
    return LoadedPool(pool, model, lambda task: (positions_needed(task, checkpoint), max_context))


def load_on_cluster(settings: Settings, results: Path | None, on_progress: OnProgress) -> LoadedPool:
    """Ready with the first instance; the others join. Raises what Cluster() raises, and what the first one raises."""
    from pipeline.cluster import Cluster, EngineLost, Wanted

    gpus = settings.gpus_per_instance
    wanted = Wanted(
        settings.model,
        settings.revision,
        settings.device,
        settings.dtype,
        _number(settings.slots),
        instances_per_gpu=max(1, int(1 / gpus)) if gpus else 1,
    )
    cluster = Cluster(wanted, gpus_per_instance=gpus, deadline_s=settings.batch_deadline_s, is_jpeg=settings.ray_jpeg)
    num_instances = _number(settings.instances) or cluster.num_places
    logger.info("%d instances are asked of the Ray cluster, which has room for %d", num_instances, cluster.num_places)
    pool = Pool(
        cluster.make_engine,
        num_instances,
        batch_deadline_s=settings.batch_deadline_s + GRACE_S,
        num_needed=1,
        on_close=cluster.close,
    )
    first = cluster.loaded
    assert first

    def positions_needed(task: Task) -> tuple[int, int]:
        try:
            return cluster.positions_needed(task), first.max_context
        except EngineLost:  # nobody can tell now; the job fails with it then
            return 0, first.max_context

    return LoadedPool(pool, first.model, positions_needed)


def _number(setting: Literal["auto"] | int) -> int | None:
    return None if setting == "auto" else setting
