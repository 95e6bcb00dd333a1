"""What an answer holds. Run: pytest tests/test_answer.py"""

import numpy as np
import torch
from tasks import MIX

from pipeline.moondream.answer import Answer
from pipeline.moondream.checkpoint import Checkpoint
from pipeline.moondream.engine import Engine
from pipeline.moondream.prompts import Detect, Point, Query, Task

IMAGE = np.random.default_rng(0).integers(0, 256, (100, 100, 3), dtype=np.uint8)


def ask(checkpoint: Checkpoint, tasks: list[Task], has_trace: bool = False) -> tuple[Answer, ...]:
    engine = Engine(checkpoint, 2)
    engine.submit("only", IMAGE, tasks, has_trace=has_trace)
    while engine.num_in_flight:
        for done in engine.step():
            return done.answers
    raise AssertionError("nothing came back")


def test_answers_come_in_the_order_of_the_tasks(endless_checkpoint: Checkpoint) -> None:
    answers = ask(endless_checkpoint, [Query("?", max_tokens=num_tokens) for num_tokens in (9, 1, 4)])

    assert [answer.num_tokens for answer in answers] == [9, 1, 4]


def test_an_answer_counts_its_tokens_and_its_time(tiny_checkpoint: Checkpoint) -> None:
    for answer in ask(tiny_checkpoint, MIX):
        num_values = 3 * len(answer.boxes) + 2 * len(answer.points)
        assert answer.num_tokens == len(answer.reasoning_ids) + len(answer.answer_ids) + num_values
        assert answer.image_encode_ms > 0
        assert 0 < answer.llm_inference_ms <= answer.total_ms


def test_an_answer_says_how_it_ended(tiny_checkpoint: Checkpoint, endless_checkpoint: Checkpoint) -> None:
    question: list[Task] = [Query("What is it?", max_tokens=40)]

    ended, cut = ask(tiny_checkpoint, question)[0], ask(endless_checkpoint, question)[0]

    assert (ended.finish_reason, cut.finish_reason, cut.num_tokens) == ("eos", "length", 40)
    assert ended.answer_ids == cut.answer_ids[: ended.num_tokens]
    assert ended.num_tokens < 40


def test_the_text_is_the_ids_without_special_ones(endless_checkpoint: Checkpoint) -> None:
    answer = ask(endless_checkpoint, MIX)[2]

    assert answer.text == endless_checkpoint.decode(list(answer.answer_ids)) != ""
    assert answer.reasoning == endless_checkpoint.decode(list(answer.reasoning_ids)) != ""
    assert "<|" not in answer.text + answer.reasoning


def test_boxes_are_centres_and_sizes_turned_into_edges(endless_checkpoint: Checkpoint) -> None:
    boxes, points = ask(endless_checkpoint, [Detect("dog", 4), Point("dog", 4)])

    assert (len(boxes.boxes), len(points.points)) == (4, 4)
    assert boxes.points == points.boxes == ()
    for box in boxes.boxes:
        assert 1 / 1024 <= box.x_max - box.x_min <= 1 and 1 / 1024 <= box.y_max - box.y_min <= 1
        assert ((box.x_min + box.x_max) / 2 * 1024).is_integer()
    assert all(0 <= spot.x < 1 and (spot.y * 1024).is_integer() for spot in points.points)


def test_a_trace_comes_only_where_it_was_asked_for(tiny_checkpoint: Checkpoint) -> None:
    assert [answer.trace for answer in ask(tiny_checkpoint, MIX[:2])] == [None, None]
    for answer in ask(tiny_checkpoint, MIX[:2], has_trace=True):
        assert answer.trace
        assert (answer.trace.image_tokens.shape, answer.trace.image_tokens.dtype) == ((64, 64), torch.float32)
        assert answer.trace.first_logits.argmax() == answer.answer_ids[0]
