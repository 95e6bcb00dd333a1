"""What Prometheus is told under /metrics. Test: pytest tests/test_api_results.py"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, ProcessCollector, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from jobs.job_store import JobStore
from jobs.schema import JobStatusName
from pipeline.pool import Pool
from pipeline.results import FrameResult, Timings

disable_created_metrics()  # a time for each counter, which nobody asks for

STATUSES: tuple[JobStatusName, ...] = ("submitted", "processing", "completed", "failed", "canceled")


@dataclass(frozen=True)
class _Now(Collector):
    """What is read off the store and the pool when somebody asks."""

    store: JobStore
    pool: Callable[[], Pool | None]
    problems: Callable[[], list[str]]
    warnings: Callable[[], list[str]]

    def collect(self) -> Iterator[Metric]:
        counts, pool = self.store.index.counts(), self.pool()
        by_status = GaugeMetricFamily("moonreel_jobs", "Jobs that are kept, by status", labels=["status"])
        for status in STATUSES:
            by_status.add_metric([status], counts[status])
        yield by_status
        yield _gauge("moonreel_queue_length", "Jobs that wait", counts["submitted"])
        yield _gauge("moonreel_stored_bytes", "Bytes that jobs keep", self.store.kept_bytes)
        yield _gauge("moonreel_free_bytes", "Free bytes of the data directory's disk", self.store.files.free_bytes)
        yield _gauge("moonreel_webhooks_waiting", "Jobs with webhooks to deliver", len(self.store.index.with_webhooks))
        yield _gauge("moonreel_ready", "1 if /api/ready says so", not self.problems())
        yield _gauge("moonreel_warnings", "Number of the warnings of /api/ready", len(self.warnings()))
        yield _gauge("moonreel_instances_working", "Instances not failing", pool.num_working if pool else 0)
        yield _gauge("moonreel_slots", "Frames that the model takes at a time", pool.num_slots if pool else 0)
        yield _gauge("moonreel_slots_busy", "Frames in the model now", pool.num_busy_slots if pool else 0)
        yield _gauge("moonreel_frames_waiting", "Frames that wait for the model", pool.num_waiting if pool else 0)
        yield _gauge("moonreel_longest_step_seconds", "Age of the oldest batch", pool.longest_step_s() if pool else 0)
        instances = GaugeMetricFamily("moonreel_node_instances", "Of a cluster: instances that work", labels=["node"])
        gpus = GaugeMetricFamily("moonreel_node_gpus", "Of a cluster: GPUs of these instances", labels=["node"])
        frames = CounterMetricFamily("moonreel_node_frames", "Of a cluster: frames described", labels=["node"])
        for name, node in (pool.nodes() if pool else {}).items():
            instances.add_metric([name], node.num_instances)
            gpus.add_metric([name], node.num_gpus)
            frames.add_metric([name], node.num_frames)
        yield instances
        yield gpus
        yield frames


def _gauge(name: str, help_text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, help_text, value=float(value))


def _outcome(result: FrameResult) -> str:
    if result.status == "error":
        return "failed"
    if result.reused_from_frame_idx is not None:
        return "reused"
    return "cached" if result.is_cached else "described"


class Metrics:
    def __init__(
        self,
        store: JobStore,
        pool: Callable[[], Pool | None],
        problems: Callable[[], list[str]],
        warnings: Callable[[], list[str]],
    ) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)  # memory, CPU time, open files, start time (Linux)
        self._registry.register(_Now(store, pool, problems, warnings))
        self._frames = Counter(
            "moonreel_frames", "Frames with a result, by how they came to it", ["outcome"], registry=self._registry
        )
        self._tokens = Counter("moonreel_tokens", "Tokens of answers; their rate is tokens/s", registry=self._registry)
        self._seconds = Counter(
            "moonreel_stage_seconds", "Seconds of ended runs, by stage", ["stage"], registry=self._registry
        )
        for outcome in ("described", "reused", "cached", "failed"):
            self._frames.labels(outcome)

    def count_frames(self, results: list[FrameResult]) -> None:
        for result in results:
            self._frames.labels(_outcome(result)).inc()
            self._tokens.inc(result.num_tokens)

    def count_run(self, timings: Timings) -> None:
        for stage, seconds in vars(timings).items():
            self._seconds.labels(stage).inc(seconds)

    def text(self) -> bytes:
        return generate_latest(self._registry)
