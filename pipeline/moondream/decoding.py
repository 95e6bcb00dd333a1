"""How one answer unfolds: what is read from each hidden state, what is fed next, and when the answer ends.

A decoding knows token ids and numbers only: no torch, no batch, no cache. The engine drives it:

    while not decoding.finish_reason:
        if decoding.wants is None:           # something waits to be fed
            hidden = step(decoding.next_input())
        elif decoding.wants == "token":      # ... or "coord", "size": read from the last hidden state
            decoding.accept_token(argmax(logits(hidden) without decoding.suppressed))
"""

from collections import deque
from dataclasses import dataclass
from typing import Literal

from pipeline.moondream.config import TokenizerConfig
from pipeline.moondream.prompts import Caption, Detect, Query, Task

FinishReason = Literal["eos", "length"]
Wants = Literal["token", "coord", "size"]


@dataclass(frozen=True)
class Feed:
    """The next input of the text model: a token's embedding, or the encoding of one coordinate or of a size."""

    token: int | None = None
    values: tuple[float, ...] = ()  # (coordinate,) or (width, height)


def decoding_for(task: Task, config: TokenizerConfig) -> "TextDecoding | RegionDecoding":
    """The decoding of a task, where its prompt has just been fed."""
    if isinstance(task, Query | Caption):
        return TextDecoding(config, task.max_tokens, reasoning=isinstance(task, Query) and task.reasoning)
    return RegionDecoding(config, task.max_objects, has_size=isinstance(task, Detect))


class TextDecoding:
    """Words until eos: a caption or an answer, perhaps with reasoning before it."""

    def __init__(self, config: TokenizerConfig, max_tokens: int, reasoning: bool) -> None:
        self.config, self.max_tokens = config, max_tokens
        self.wants: Wants | None = "token"
        self.finish_reason: FinishReason | None = None
        self.reasoning_ids: list[int] = []
        self.answer_ids: list[int] = []
        self._is_reasoning = reasoning
        self._inputs: deque[Feed] = deque()

    @property
    def num_tokens(self) -> int:
        return len(self.reasoning_ids) + len(self.answer_ids)

    @property
    def suppressed(self) -> tuple[int, ...]:
        """Ids that must not come next. The first token of any generation is free."""
        if self._is_reasoning:
            return (self.config.eos_id, self.config.size_id) if self.reasoning_ids else ()
        return (self.config.answer_id,) if self.answer_ids else ()

    def next_input(self) -> Feed:
        feed = self._inputs.popleft()
        if not self._inputs:
            self.wants = "token"
        return feed

    def accept_token(self, token: int) -> None:
        if self._is_reasoning:
            self._accept_reasoning(token)
        elif token == self.config.eos_id:
            self._finish("eos")
        else:
            self.answer_ids.append(token)
            if len(self.answer_ids) == self.max_tokens:
                self._finish("length")
            else:
                self._feed(Feed(token))

    def accept_coord(self, coord: float) -> None:
        """A coordinate token is fed as the encoding of the coordinate, not of the token."""
        self._feed_reasoning(Feed(values=(coord,)))

    def accept_size(self, width: float, height: float) -> None:
        raise AssertionError("a text never asks for a size")

    def _accept_reasoning(self, token: int) -> None:
        if token == self.config.answer_id:  # it ends the reasoning and is not fed: the answer starts from the suffix
            self._feed(*self._begin_answer())
            return
        self.reasoning_ids.append(token)
        if token == self.config.coord_id:
            self.wants = "coord"
        else:
            self._feed_reasoning(Feed(token))

    def _feed_reasoning(self, feed: Feed) -> None:
        is_over = len(self.reasoning_ids) == self.max_tokens
        self._feed(feed, *(self._begin_answer() if is_over else ()))

    def _begin_answer(self) -> list[Feed]:
        self._is_reasoning = False
        return [Feed(token) for token in self.config.templates.query.suffix]

    def _feed(self, *feeds: Feed) -> None:
        self.wants = None
        self._inputs.extend(feeds)

    def _finish(self, reason: FinishReason) -> None:
        self.wants, self.finish_reason = None, reason


class RegionDecoding:
    """Points (x, y) or boxes (x, y, width, height) until eos."""

    def __init__(self, config: TokenizerConfig, max_objects: int, has_size: bool) -> None:
        self.config, self.max_objects, self.has_size = config, max_objects, has_size
        self.wants: Wants | None = "token"
        self.finish_reason: FinishReason | None = None
        self.suppressed: tuple[int, ...] = ()
        self.objects: list[tuple[float, ...]] = []  # (x, y) or (x, y, width, height): centre and size
        self._current: list[float] = []
        self._input: Feed | None = None
        self._wants_next: Wants = "token"

    @property
    def num_tokens(self) -> int:
        return len(self.objects) * (3 if self.has_size else 2)

    def next_input(self) -> Feed:
        feed, self._input, self.wants = self._input, None, self._wants_next
        assert feed is not None
        return feed

    def accept_token(self, token: int) -> None:
        if token == self.config.eos_id:
            self.wants, self.finish_reason = None, "eos"
        else:
            self.wants = "coord"  # x, from the same hidden state

    def accept_coord(self, coord: float) -> None:
        self._current.append(coord)
        if len(self._current) == 1:
            self._feed((coord,), wants_next="coord")
        elif self.has_size:
            self._feed((coord,), wants_next="size")
        else:
            self._complete((coord,))

    def accept_size(self, width: float, height: float) -> None:
        self._current += [width, height]
        self._complete((width, height))

    def _complete(self, values: tuple[float, ...]) -> None:
        self.objects.append(tuple(self._current))
        self._current = []
        if len(self.objects) == self.max_objects:
            self.wants, self.finish_reason = None, "length"
        else:
            self._feed(values, wants_next="token")

    def _feed(self, values: tuple[float, ...], wants_next: Wants) -> None:
        self.wants, self._input, self._wants_next = None, Feed(values=values), wants_next
