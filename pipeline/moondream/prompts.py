"""What can be asked of one image, and the token ids that ask it.

Knows the templates of a config; what follows the prompt is decoding.py's business.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from pipeline.errors import InvalidOption
from pipeline.moondream.config import TokenizerConfig

DEFAULT_QUESTION = "Describe this scene."
DEFAULT_MAX_TOKENS = 256
DEFAULT_MAX_OBJECTS = 50
CaptionLength = Literal["short", "normal", "long"]


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Temperature 0 is greedy; else from the likeliest tokens whose cumulative
    probability before them is at most top_p, with a generator that depends only on the seed and the frame."""

    temperature: float = 0.0
    top_p: float = 0.3
    seed: int = 0


@dataclass(frozen=True)
class Query:
    """Answer a question; with `reasoning`, think aloud first. `max_tokens` counts for each of the two parts."""

    question: str = DEFAULT_QUESTION
    reasoning: bool = False
    max_tokens: int = DEFAULT_MAX_TOKENS
    sampling: Sampling = Sampling()


@dataclass(frozen=True)
class Caption:
    length: CaptionLength = "normal"
    max_tokens: int = DEFAULT_MAX_TOKENS
    sampling: Sampling = Sampling()


@dataclass(frozen=True)
class Detect:
    """The boxes of everything that `target` names."""

    target: str
    max_objects: int = DEFAULT_MAX_OBJECTS


@dataclass(frozen=True)
class Point:
    """The centre points of everything that `target` names."""

    target: str
    max_objects: int = DEFAULT_MAX_OBJECTS


Task = Query | Caption | Detect | Point
Encode = Callable[[str], list[int]]  # text -> token ids, no special ones added


def prompt_ids(task: Task, encode: Encode, config: TokenizerConfig) -> list[int]:
    """The token ids after the image, up to where the answer begins. Raises InvalidOption for options out of range."""
    check(task, config)
    templates = config.templates
    if isinstance(task, Query):
        opener = config.thinking_id if task.reasoning else config.answer_id
        return [*templates.query.prefix, *encode(task.question), *templates.query.suffix, opener]
    if isinstance(task, Caption):
        return list(templates.caption[task.length])
    template = templates.detect if isinstance(task, Detect) else templates.point
    return [*template.prefix, *encode(f" {task.target}"), *template.suffix]


def max_new_positions(task: Task, config: TokenizerConfig) -> int:
    """How many positions the longest possible answer takes after its prompt."""
    if isinstance(task, Detect):
        return 3 * task.max_objects
    if isinstance(task, Point):
        return 2 * task.max_objects
    if isinstance(task, Query) and task.reasoning:
        return 2 * task.max_tokens + len(config.templates.query.suffix)
    return task.max_tokens


def check(task: Task, config: TokenizerConfig) -> None:
    """Raises InvalidOption if an option of the task is out of range."""
    if isinstance(task, Detect | Point):
        if task.max_objects < 1:
            raise InvalidOption(f"max_objects must be at least 1, not {task.max_objects}.")
        if not task.target.strip():
            raise InvalidOption("Say what to look for: the object's name is empty.")
        return
    if task.max_tokens < 1:
        raise InvalidOption(f"max_tokens must be at least 1, not {task.max_tokens}.")
    if not 0 <= task.sampling.temperature <= 10:
        raise InvalidOption(f"temperature must be between 0 and 10, not {task.sampling.temperature}.")
    if not 0 < task.sampling.top_p <= 1:
        raise InvalidOption(f"top_p must be above 0 and at most 1, not {task.sampling.top_p}.")
    if task.sampling.seed < 0:
        raise InvalidOption(f"seed must not be negative, like {task.sampling.seed}.")
    if isinstance(task, Query) and not task.question.isprintable() and "\udc80" <= max(task.question) <= "\udcff":
        raise InvalidOption("The question is not UTF-8 text. Type it in a UTF-8 terminal.")
    if isinstance(task, Query) and not task.question.strip():
        raise InvalidOption("The question is empty. Ask something, for example: Describe this scene.")
    if isinstance(task, Caption) and task.length not in config.templates.caption:
        known = ", ".join(config.templates.caption)
        raise InvalidOption(f"caption length must be one of {known}, not {task.length!r}.")
