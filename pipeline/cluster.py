"""Instances of the model on a Ray cluster: an actor each, which a pool takes for an engine.

    cluster = Cluster(Wanted("demo"), gpus_per_instance=0)
    pool = Pool(cluster.make_engine, 4, num_needed=1, on_close=cluster.close)

An actor has a GPU, or a part of one, and one engine. One that dies, that its node takes along, or that does not answer
within the deadline raises EngineLost: the pool gives its frames to others, and asks for another actor. Actors end with
the process that asked for them, however it ends. Only Cluster() imports ray. Test: pytest tests/ray (own environment)
"""

import contextlib
import ctypes
import ipaddress
import logging
import os
import platform
import signal
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from pipeline.cluster_host import Encoded, EngineHost, Loaded, Report, Sent, Wanted, encode_jpeg, versions
from pipeline.errors import DeviceUnavailable, InvalidOption
from pipeline.moondream.answer import Completed
from pipeline.moondream.prompts import Task
from pipeline.nodes import Place

WAIT_S = 0.2  # between two looks at whether the pool is closed, while an actor waits for a place
ASK_S = 60.0  # for what takes no time
MAX_TOLD = 400  # characters of an error of Ray's
SIGACTION_BYTES = 256  # more than a struct sigaction has anywhere
INSTALL = "Install it, in the version of the cluster: pip install -r requirements-ray.txt"

logger = logging.getLogger(__name__)


class EngineLost(Exception):
    """An actor has died, or is cut off, or has hung."""


class Cluster:
    """A connection to the cluster at `address` (RAY_ADDRESS; "local" starts one on this machine).

    Raises InvalidOption if ray is missing, or would let strangers in, and DeviceUnavailable if the cluster cannot be
    reached, or is of another version."""

    def __init__(
        self,
        wanted: Wanted,
        address: str | None = None,
        *,
        gpus_per_instance: float = 1.0,
        deadline_s: float = 300.0,
        is_jpeg: bool = False,
        host: type[EngineHost] = EngineHost,
    ) -> None:
        """host: what an actor is."""
        self._ray = _connect(address or os.environ.get("RAY_ADDRESS", "local"))
        self.wanted, self._gpus, self._deadline_s, self._is_jpeg = wanted, gpus_per_instance, deadline_s, is_jpeg
        self._host, self._is_closed = host, threading.Event()
        self._actors: set[Any] = set()
        self.loaded: Loaded | None = None  # of the first actor

    @property
    def num_places(self) -> int:
        """How many instances the nodes of now have GPUs for, or cores where they need none; at least 1."""
        resources: dict[str, float] = self._ray.cluster_resources()
        if self._gpus:
            return max(1, int(resources.get("GPU", 0) / self._gpus))
        return max(1, sum(1 for node in self._ray.nodes() if node["Alive"] and node["Resources"].get("CPU")))

    def make_engine(self) -> "RemoteEngine":
        """Wait for a place, and for the model to be loaded there. Raises what loading raises, EngineLost, and
        DeviceUnavailable if other versions are installed there."""
        actor = (
            self._ray.remote(self._host)
            .options(
                num_gpus=self._gpus,
                num_cpus=0 if self._gpus else 1,
                max_restarts=0,
                max_task_retries=0,
                scheduling_strategy="SPREAD",
            )
            .remote()
        )
        self._actors.add(actor)
        name, found = self.ask(actor, actor.about.remote(), None)
        self._compare(actor, name, found, versions())
        loaded: Loaded = self.ask(actor, actor.load.remote(self.wanted), None)
        self.loaded = self.loaded or loaded
        self._compare(actor, name, f"revision {loaded.model.revision}", f"revision {self.loaded.model.revision}")
        node_id = self.ask(actor, actor.__ray_call__.remote(_node_id), ASK_S)
        place = Place(f"{name} {node_id[:6]}", self._gpus)
        prepare = encode_jpeg if self._is_jpeg else None
        return RemoteEngine(loaded, lambda sent, canceled: self._run(actor, sent, canceled), place, prepare)

    def positions_needed(self, task: Task) -> int:
        """The context that the longest answer takes. Raises EngineLost while no actor answers."""
        for actor in tuple(self._actors):
            with contextlib.suppress(EngineLost):
                return self.ask(actor, actor.positions_needed.remote(task), ASK_S)
        raise EngineLost("No instance of the cluster answers.")

    def close(self) -> None:
        """End all actors, also those that wait for a place."""
        self._is_closed.set()
        for actor in tuple(self._actors):
            self._end(actor)

    def ask(self, actor: Any, asked: Any, timeout_s: float | None) -> Any:
        """What an actor answers. Whatever goes wrong, it is ended: its GPU is free for another."""
        waited_s = 0.0
        try:
            while not self._ray.wait([asked], timeout=WAIT_S)[0]:
                waited_s += WAIT_S
                if self._is_closed.is_set():
                    raise EngineLost("The pool is closed.")
                if timeout_s is not None and waited_s > timeout_s:
                    raise EngineLost(f"It did not answer within {timeout_s:g} s (setting batch_deadline_s).")
            return self._ray.get(asked)
        except BaseException as error:
            self._end(actor)
            if isinstance(error, self._ray.exceptions.RayTaskError):
                raise getattr(error, "cause", error) from None  # without its traceback as text
            if isinstance(error, self._ray.exceptions.RayError):
                raise EngineLost(str(error).partition("\n")[0]) from None
            raise

    def _run(self, actor: Any, sent: Sequence[Sent], canceled: Sequence[int]) -> Report:
        return self.ask(actor, actor.run.remote(sent, canceled), self._deadline_s)

    def _compare(self, actor: Any, node: str, found: str, expected: str) -> None:
        """Answers must not depend on the node. Raises DeviceUnavailable, when the actor is ended."""
        if found != expected:
            self._end(actor)
            raise DeviceUnavailable(
                f"Node {node} has {found}, where {expected} is expected: install the same on all nodes and on this "
                "server, and start Ray on that node again."
            )

    def _end(self, actor: Any) -> None:
        self._actors.discard(actor)
        with contextlib.suppress(Exception):  # its node is gone
            self._ray.kill(actor)


class RemoteEngine:
    """An engine elsewhere, used like an Engine, by one thread. Raises EngineLost, and what the engine raises."""

    def __init__(
        self,
        loaded: Loaded,
        run: Callable[[Sequence[Sent], Sequence[int]], Report],
        place: Place,
        prepare: Callable[[np.ndarray], Encoded] | None = None,
    ) -> None:
        self.num_slots, self.place, self.prepare = loaded.num_slots, place, prepare
        self._run, self._num_wanted, self._is_for_urgent_only = run, 1, False
        self._keys: dict[int, Hashable] = {}
        self._sent: dict[int, Sent] = {}  # with the next step
        self._canceled: list[int] = []
        self._number = 0

    @property
    def num_in_flight(self) -> int:
        return len(self._keys)

    @property
    def num_wanted(self) -> int:
        return max(0, self._num_wanted - len(self._sent))

    @property
    def is_for_urgent_only(self) -> bool:
        return self._is_for_urgent_only and bool(self._keys)  # the urgent one may have been canceled since

    def submit(
        self, key: Hashable, image: Any, tasks: Sequence[Task], frame_idx: int = 0, *, is_urgent: bool = False
    ) -> None:
        """What an Engine refuses here, this one completes as refused."""
        self._number += 1
        self._keys[self._number] = key
        self._sent[self._number] = Sent(self._number, image, tasks, frame_idx, is_urgent)

    def cancel(self, key: Hashable) -> None:
        number = next((number for number, known in self._keys.items() if known == key), None)
        if number is not None:
            del self._keys[number]
            if self._sent.pop(number, None) is None:
                self._canceled.append(number)

    def step(self) -> list[Completed]:
        """Send what is new, and wait for what is done by then: possibly nothing."""
        sent, canceled = list(self._sent.values()), self._canceled
        self._sent, self._canceled = {}, []
        report = self._run(sent, canceled)
        self._num_wanted, self._is_for_urgent_only = report.num_wanted, report.is_for_urgent_only
        done = [(self._keys.pop(int(str(c.key)), None), c) for c in report.completed]
        return [replace(completed, key=key) for key, completed in done if key is not None]


def _node_id(host: EngineHost) -> str:
    """Runs in an actor: one machine may be several nodes, and a name may come twice."""
    import ray  # pyright: ignore[reportMissingImports]

    return ray.get_runtime_context().get_node_id()


def _connect(address: str) -> Any:
    """-> the module ray, connected"""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise InvalidOption(f"A pool on a Ray cluster needs the package ray. {INSTALL}") from error
    if not _is_here(address) and os.environ.get("RAY_AUTH_MODE") != "token":
        raise InvalidOption(
            f"The cluster at {address} would run anybody's code. Give all of its nodes and this server the same token: "
            "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to a file that holds it, on each of them."
        )
    try:
        if not ray.is_initialized():
            with _sigterm_kept():
                ray.init(
                    address,
                    log_to_driver=False,
                    configure_logging=False,
                    include_dashboard=False if address == "local" else None,
                )
    except Exception as error:  # ray raises all kinds
        raise DeviceUnavailable(
            f"No connection to the Ray cluster at {address}: {' '.join(str(error).split())[:MAX_TOLD]} This server has "
            f"ray {ray.__version__} and Python {platform.python_version()}; all nodes need them, and the same token."
        ) from error
    return ray


@contextlib.contextmanager
def _sigterm_kept() -> Iterator[None]:
    """Put back what the process does on SIGTERM. Ray has it print a stack first: where the signal comes in the middle
    of an allocation, that hangs, and the process is aborted instead of stopped."""
    try:
        sigaction = ctypes.CDLL(None).sigaction  # Python's own works in the main thread only
    except (OSError, AttributeError, TypeError):  # Windows
        yield
        return
    kept = ctypes.create_string_buffer(SIGACTION_BYTES)
    sigaction(signal.SIGTERM, None, kept)
    try:
        yield
    finally:
        sigaction(signal.SIGTERM, kept, None)


def _is_here(address: str) -> bool:
    """Whether only this machine can be meant."""
    host = address.removeprefix("ray://").rpartition(":")[0].strip("[]") or address
    if host in ("local", "localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
