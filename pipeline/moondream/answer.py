"""What the engine answers."""

from collections.abc import Hashable
from dataclasses import dataclass

from torch import Tensor

from pipeline.errors import DescriberError
from pipeline.moondream.decoding import FinishReason


@dataclass(frozen=True)
class Box:
    """A detected object, in fractions of the frame; it may reach past the edges."""

    x_min: float
    y_min: float
    x_max: float
    y_max: float


@dataclass(frozen=True)
class Spot:
    """A point, in fractions of the frame."""

    x: float
    y: float


@dataclass(frozen=True)
class Trace:
    """What the engine saw on the way, for comparison with reference outputs; float32 on the CPU."""

    image_tokens: Tensor  # (num_patches, dim)
    first_logits: Tensor  # (vocab_size,)


@dataclass(frozen=True)
class Answer:
    """The answer to one task. Times are wall-clock: `image_encode_ms` is this image's share of the pass that encoded
    it, `llm_inference_ms` runs from its prefill to its last token, `total_ms` from its submission, waiting included."""

    text: str
    finish_reason: FinishReason
    num_tokens: int
    image_encode_ms: float
    llm_inference_ms: float
    total_ms: float
    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...] = ()
    reasoning: str = ""
    reasoning_ids: tuple[int, ...] = ()
    boxes: tuple[Box, ...] = ()
    points: tuple[Spot, ...] = ()
    trace: Trace | None = None


@dataclass(frozen=True)
class Completed:
    """An image whose tasks are all done: its answers in the order of the tasks, or the error that ended it. One that
    `is_refused` was not taken in: submit() raises that, but an engine that is elsewhere can only tell it later."""

    key: Hashable
    answers: tuple[Answer, ...]
    error: DescriberError | None = None
    is_refused: bool = False
