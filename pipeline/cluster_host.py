"""What runs in an actor's process on a node of a cluster: one engine, given frames and asked for answers in one call.

Knows no Ray, so that it is tested as it is. Test: pytest tests/test_cluster.py
"""

import hashlib
import platform
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import cv2
import numpy as np

from pipeline.errors import DescriberError
from pipeline.moondream.answer import Completed
from pipeline.moondream.prompts import Task
from pipeline.results import ModelName

TURN_S = 0.25  # of steps in one call, unless a frame is done before


@dataclass(frozen=True)
class Wanted:
    """What is to be loaded, on each node from its own disk or the hub."""

    model: str
    revision: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    slots: int | None = None
    instances_per_gpu: int = 1  # that share its memory


@dataclass(frozen=True)
class Loaded:
    """What was loaded."""

    model: ModelName
    num_slots: int
    max_context: int


@dataclass(frozen=True)
class Encoded:
    """A frame as JPEG."""

    jpeg: bytes


@dataclass(frozen=True)
class Sent:
    """A frame on its way. `image` is RGB uint8 (H, W, 3), or that as JPEG."""

    number: int
    image: np.ndarray | Encoded
    tasks: Sequence[Task]
    frame_idx: int
    is_urgent: bool = False


@dataclass(frozen=True)
class Report:
    """What came of a call; the keys are the numbers of frames."""

    completed: list[Completed]
    num_wanted: int
    is_for_urgent_only: bool


class EngineHost:
    """Loads in a method: what __init__ of an actor raises looks like the death of its node."""

    def about(self) -> tuple[str, str]:
        """-> the node's name, and its versions"""
        return socket.gethostname(), versions()

    def load(self, wanted: Wanted) -> Loaded:
        """Raises what load_checkpoint and Engine raise."""
        from pipeline.moondream.capacity import plan
        from pipeline.moondream.checkpoint import load_checkpoint
        from pipeline.moondream.engine import Engine

        checkpoint = load_checkpoint(wanted.model, wanted.revision, wanted.device, wanted.dtype)
        max_context = checkpoint.config.text.max_context
        slots = plan(checkpoint, wanted.instances_per_gpu, wanted.slots, max_context, None).slots
        self._checkpoint, self._engine = checkpoint, Engine(checkpoint, slots, max_context)
        name = ModelName(checkpoint.name, checkpoint.revision, str(checkpoint.device), checkpoint.dtype_name)
        return Loaded(name, slots, max_context)

    def positions_needed(self, task: Task) -> int:
        from pipeline.moondream.engine import positions_needed

        return positions_needed(task, self._checkpoint)

    def run(self, sent: Sequence[Sent], canceled: Sequence[int]) -> Report:
        """Take in frames, forget others, and step until any is done, or for TURN_S."""
        engine, completed, ends_s = self._engine, [], time.monotonic() + TURN_S
        for number in canceled:
            engine.cancel(number)
        for frame in sent:
            try:
                image = _image(frame.image)
                engine.submit(frame.number, image, frame.tasks, frame.frame_idx, is_urgent=frame.is_urgent)
            except DescriberError as error:
                completed.append(Completed(frame.number, (), error.with_traceback(None), is_refused=True))
        while engine.num_in_flight and not completed:
            completed += engine.step()
            if time.monotonic() > ends_s:
                break
        return Report(completed, engine.num_wanted, engine.is_for_urgent_only)


def versions() -> str:
    """Of all that answers depend on beside the model; Moonreel's is a digest of its code."""
    digest, root = hashlib.sha256(), Path(__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(path.read_bytes())
    torch = metadata.version("torch").partition("+")[0]  # the part after it is for which device
    return f"Python {platform.python_version()}, torch {torch}, Moonreel {digest.hexdigest()[:8]}"


def encode_jpeg(image: np.ndarray) -> Encoded:
    """A frame (RGB uint8) in a twentieth of its bytes; answers may differ from those about the frame itself."""
    is_encoded, data = cv2.imencode(".jpg", image[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95])
    assert is_encoded
    return Encoded(data.tobytes())


def _image(image: np.ndarray | Encoded) -> np.ndarray:
    if isinstance(image, np.ndarray):
        return image
    decoded = cv2.imdecode(np.frombuffer(image.jpeg, np.uint8), cv2.IMREAD_COLOR)
    assert decoded is not None
    return np.ascontiguousarray(decoded[:, :, ::-1])
