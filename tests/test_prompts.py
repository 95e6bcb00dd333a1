"""The token ids that ask, and which options are refused. Run: pytest tests/test_prompts.py"""

import pytest

from pipeline.errors import InvalidOption
from pipeline.moondream.config import Template, Templates, TokenizerConfig
from pipeline.moondream.prompts import (
    Caption,
    Detect,
    Point,
    Query,
    Sampling,
    Task,
    check,
    max_new_positions,
    prompt_ids,
)

IDS = TokenizerConfig()
LONG_SUFFIX = TokenizerConfig(templates=Templates(query=Template((1,), (8, 9, 3))))


def encode(text: str) -> list[int]:
    """One id per character, beyond the special ones."""
    return [1000 + ord(character) for character in text]


def test_a_question_stands_between_its_template_and_the_answer_id() -> None:
    assert prompt_ids(Query("hi"), encode, IDS) == [1, 15381, 2, *encode("hi"), 3, 3]


def test_a_question_to_reason_about_opens_with_the_thinking_id() -> None:
    assert prompt_ids(Query("hi", reasoning=True), encode, IDS) == [1, 15381, 2, *encode("hi"), 3, 4]


@pytest.mark.parametrize(("length", "word"), [("short", 12492), ("normal", 6382), ("long", 4059)])
def test_a_caption_is_its_lengths_template(length: str, word: int) -> None:
    assert prompt_ids(Caption(length), encode, IDS) == [1, 32708, 2, word, 3]  # type: ignore[arg-type]


def test_what_is_looked_for_gets_a_space_in_front() -> None:
    assert prompt_ids(Detect("dog"), encode, IDS) == [1, 7235, 476, 2, *encode(" dog"), 3]
    assert prompt_ids(Point("dog"), encode, IDS) == [1, 2581, 2, *encode(" dog"), 3]


def test_ids_come_from_the_config() -> None:
    ids = TokenizerConfig(answer_id=33, thinking_id=44, templates=Templates(query=Template((7,), (8, 9))))

    assert prompt_ids(Query("a"), encode, ids) == [7, *encode("a"), 8, 9, 33]
    assert prompt_ids(Query("a", reasoning=True), encode, ids) == [7, *encode("a"), 8, 9, 44]


@pytest.mark.parametrize(
    ("task", "positions"),
    [
        (Query(max_tokens=7), 7),
        (Caption(max_tokens=7), 7),
        (Query(reasoning=True, max_tokens=7), 7 + 3 + 7),  # thoughts, the suffix, the answer
        (Detect("x", max_objects=5), 3 * 5),  # x, y, size
        (Point("x", max_objects=5), 2 * 5),
    ],
)
def test_the_longest_answers_positions(task: Task, positions: int) -> None:
    assert max_new_positions(task, LONG_SUFFIX) == positions


@pytest.mark.parametrize(
    ("task", "said"),
    [
        (Query(""), "question is empty"),
        (Query(" \n"), "question is empty"),
        (Query(max_tokens=0), "max_tokens"),
        (Caption(max_tokens=-1), "max_tokens"),
        (Caption("endless"), "short, normal, long"),  # type: ignore[arg-type]
        (Query(sampling=Sampling(temperature=-0.1)), "temperature"),
        (Query(sampling=Sampling(temperature=10.1)), "temperature"),
        (Query(sampling=Sampling(temperature=float("nan"))), "temperature"),
        (Query(sampling=Sampling(top_p=0)), "top_p"),
        (Query(sampling=Sampling(top_p=1.1)), "top_p"),
        (Caption(sampling=Sampling(top_p=float("nan"))), "top_p"),
        (Detect(""), "name is empty"),
        (Point(" "), "name is empty"),
        (Detect("x", max_objects=0), "max_objects"),
        (Point("x", max_objects=-3), "max_objects"),
    ],
    ids=str,
)
def test_an_option_out_of_range_is_refused_by_name(task: Task, said: str) -> None:
    with pytest.raises(InvalidOption, match=said):
        prompt_ids(task, encode, IDS)


def test_a_negative_seed_is_refused() -> None:
    """It was a ValueError of NumPy, out of Engine.submit."""
    with pytest.raises(InvalidOption, match="seed"):
        check(Query(sampling=Sampling(temperature=1, seed=-1)), IDS)


@pytest.mark.parametrize("sampling", [Sampling(0, 1), Sampling(10, 1e-9), Sampling(1e-40)])
def test_the_ends_of_the_ranges_are_accepted(sampling: Sampling) -> None:
    check(Query("?", max_tokens=1, sampling=sampling), IDS)
