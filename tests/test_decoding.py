"""How answers unfold, driven by hand: no model, only ids and numbers. Run: pytest tests/test_decoding.py"""

from collections.abc import Iterable

import pytest

from pipeline.moondream.config import Template, Templates, TokenizerConfig
from pipeline.moondream.decoding import Feed, RegionDecoding, TextDecoding, decoding_for
from pipeline.moondream.prompts import Caption, Detect, Point, Query, Task, max_new_positions

EOS, ANSWER, COORD, SIZE = 0, 3, 5, 6
IDS = TokenizerConfig()
LONG_SUFFIX = TokenizerConfig(templates=Templates(query=Template((1,), (8, 9, 3))))


def text(max_tokens: int = 10, reasoning: bool = False, ids: TokenizerConfig = IDS) -> TextDecoding:
    return TextDecoding(ids, max_tokens, reasoning)


def region(max_objects: int = 10, has_size: bool = True) -> RegionDecoding:
    return RegionDecoding(IDS, max_objects, has_size)


def drive(decoding: TextDecoding | RegionDecoding, tokens: Iterable[int], coord: float = 0.5) -> list[Feed]:
    """Say these tokens, one whenever a token is wanted -> everything that was fed."""
    said, fed = iter(tokens), []
    while not decoding.finish_reason:
        if decoding.wants is None:
            fed.append(decoding.next_input())
        elif decoding.wants == "coord":
            decoding.accept_coord(coord)
        elif decoding.wants == "size":
            decoding.accept_size(0.25, 0.125)
        elif (token := next(said, None)) is not None:
            decoding.accept_token(token)
        else:
            break
    return fed


# --- text


def test_a_text_ends_at_eos_and_leaves_it_out() -> None:
    decoding = text()

    fed = drive(decoding, [70, 71, EOS])

    assert (decoding.answer_ids, decoding.finish_reason, decoding.num_tokens) == ([70, 71], "eos", 2)
    assert fed == [Feed(70), Feed(71)]


def test_a_first_token_of_eos_is_an_empty_answer() -> None:
    decoding = text()

    assert drive(decoding, [EOS]) == []
    assert (decoding.answer_ids, decoding.finish_reason, decoding.num_tokens) == ([], "eos", 0)


def test_a_text_ends_at_max_tokens_and_its_last_token_is_not_fed() -> None:
    decoding = text(max_tokens=2)

    fed = drive(decoding, [70, 71, 72])

    assert (decoding.answer_ids, decoding.finish_reason, decoding.wants) == ([70, 71], "length", None)
    assert fed == [Feed(70)]


def test_eos_after_the_last_allowed_token_is_never_asked_for() -> None:
    decoding = text(max_tokens=1)

    drive(decoding, [70, EOS])

    assert decoding.finish_reason == "length"


def test_the_answer_id_is_suppressed_from_the_second_token_on() -> None:
    decoding = text()

    first = decoding.suppressed
    drive(decoding, [70])

    assert (first, decoding.suppressed) == ((), (ANSWER,))


def test_a_coordinate_token_in_an_answer_is_a_token_like_others() -> None:
    decoding = text()

    fed = drive(decoding, [COORD, EOS])

    assert (decoding.answer_ids, fed) == ([COORD], [Feed(COORD)])


# --- reasoning


def test_reasoning_ends_at_the_answer_id_which_is_not_fed_and_the_suffix_opens_the_answer() -> None:
    decoding = text(reasoning=True)

    fed = drive(decoding, [70, 71, ANSWER, 80, EOS])

    assert (decoding.reasoning_ids, decoding.answer_ids, decoding.finish_reason) == ([70, 71], [80], "eos")
    assert fed == [Feed(70), Feed(71), Feed(3), Feed(80)]
    assert decoding.num_tokens == 3


def test_a_suffix_of_several_tokens_is_fed_one_by_one() -> None:
    decoding = text(reasoning=True, ids=LONG_SUFFIX)

    fed = drive(decoding, [70, ANSWER, 80, EOS])

    assert fed == [Feed(70), Feed(8), Feed(9), Feed(3), Feed(80)]


def test_reasoning_may_be_empty() -> None:
    decoding = text(reasoning=True)

    assert drive(decoding, [ANSWER, EOS]) == [Feed(3)]
    assert (decoding.reasoning_ids, decoding.answer_ids) == ([], [])


def test_reasoning_cut_by_max_tokens_feeds_its_last_token_and_then_the_suffix() -> None:
    decoding = text(max_tokens=2, reasoning=True, ids=LONG_SUFFIX)

    fed = drive(decoding, [70, 71, 80, 81])

    assert (decoding.reasoning_ids, decoding.answer_ids, decoding.finish_reason) == ([70, 71], [80, 81], "length")
    assert fed == [Feed(70), Feed(71), Feed(8), Feed(9), Feed(3), Feed(80)]


def test_eos_and_size_are_suppressed_from_the_second_thought_on() -> None:
    decoding = text(reasoning=True)

    first = decoding.suppressed
    drive(decoding, [70])

    assert (first, decoding.suppressed) == ((), (EOS, SIZE))


def test_a_first_thought_of_eos_does_not_end_the_reasoning() -> None:
    decoding = text(reasoning=True)

    fed = drive(decoding, [EOS, 70])

    assert (decoding.reasoning_ids, fed) == ([EOS, 70], [Feed(EOS), Feed(70)])


def test_after_reasoning_the_answers_first_token_is_free_again() -> None:
    decoding = text(reasoning=True)

    drive(decoding, [70, 71, ANSWER])
    first = decoding.suppressed
    drive(decoding, [ANSWER])

    assert (first, decoding.answer_ids, decoding.suppressed) == ((), [ANSWER], (ANSWER,))


def test_a_coordinate_among_thoughts_is_fed_as_its_value() -> None:
    decoding = text(reasoning=True)

    fed = drive(decoding, [70, COORD, 71], coord=0.75)

    assert (decoding.reasoning_ids, fed) == ([70, COORD, 71], [Feed(70), Feed(values=(0.75,)), Feed(71)])


def test_a_coordinate_is_read_from_the_hidden_state_of_its_token() -> None:
    decoding = text(reasoning=True)

    decoding.accept_token(COORD)

    assert decoding.wants == "coord"  # before anything is fed


def test_reasoning_cut_at_a_coordinate_feeds_its_value_and_then_the_suffix() -> None:
    decoding = text(max_tokens=1, reasoning=True)

    fed = drive(decoding, [COORD, 80], coord=0.75)

    assert fed == [Feed(values=(0.75,)), Feed(3)]
    assert (decoding.answer_ids, decoding.finish_reason) == ([80], "length")


# --- regions


def test_a_box_is_x_then_y_then_size_each_fed_back() -> None:
    decoding = region()
    phases = []

    decoding.accept_token(70)
    for accept in (lambda: decoding.accept_coord(0.25), lambda: decoding.accept_coord(0.75)):
        phases.append(decoding.wants)
        accept()
        assert decoding.wants is None
        phases.append(decoding.next_input())
    phases.append(decoding.wants)
    decoding.accept_size(0.5, 0.125)
    phases.append(decoding.next_input())

    assert phases == ["coord", Feed(values=(0.25,)), "coord", Feed(values=(0.75,)), "size", Feed(values=(0.5, 0.125))]
    assert (decoding.wants, decoding.objects) == ("token", [(0.25, 0.75, 0.5, 0.125)])


def test_a_point_has_no_size() -> None:
    decoding = region(has_size=False)

    fed = drive(decoding, [70, EOS])

    assert (decoding.objects, decoding.num_tokens) == ([(0.5, 0.5)], 2)
    assert fed == [Feed(values=(0.5,)), Feed(values=(0.5,))]


@pytest.mark.parametrize("has_size", [True, False])
def test_objects_follow_until_eos(has_size: bool) -> None:
    decoding = region(has_size=has_size)

    drive(decoding, [70, 71, 72, EOS])

    assert (len(decoding.objects), decoding.finish_reason) == (3, "eos")
    assert decoding.num_tokens == 3 * (3 if has_size else 2)


@pytest.mark.parametrize("has_size", [True, False])
def test_a_first_token_of_eos_means_no_objects(has_size: bool) -> None:
    decoding = region(has_size=has_size)

    assert drive(decoding, [EOS]) == []
    assert (decoding.objects, decoding.finish_reason, decoding.num_tokens) == ([], "eos", 0)


@pytest.mark.parametrize(("has_size", "num_fed"), [(True, 2 * 3 - 1), (False, 2 * 2 - 1)])
def test_max_objects_ends_it_and_the_last_value_is_not_fed(has_size: bool, num_fed: int) -> None:
    decoding = region(max_objects=2, has_size=has_size)

    fed = drive(decoding, [70, 71, 72])

    assert (len(decoding.objects), decoding.finish_reason, decoding.wants) == (2, "length", None)
    assert len(fed) == num_fed


def test_any_token_but_eos_begins_an_object_and_none_is_suppressed() -> None:
    decoding = region(has_size=False)

    drive(decoding, [ANSWER, SIZE, COORD, EOS])

    assert (len(decoding.objects), decoding.suppressed) == (3, ())


def test_each_task_gets_its_decoding() -> None:
    query, caption = decoding_for(Query(reasoning=True, max_tokens=4), IDS), decoding_for(Caption(max_tokens=5), IDS)
    boxes, points = decoding_for(Detect("x", 6), IDS), decoding_for(Point("x", 7), IDS)

    assert isinstance(query, TextDecoding) and isinstance(caption, TextDecoding)
    assert (query.max_tokens, caption.max_tokens) == (4, 5)
    drive(query, [70])
    drive(caption, [70])
    assert (query.reasoning_ids, caption.answer_ids) == ([70], [70])
    assert isinstance(boxes, RegionDecoding) and isinstance(points, RegionDecoding)
    assert (boxes.has_size, boxes.max_objects, points.has_size, points.max_objects) == (True, 6, False, 7)


@pytest.mark.parametrize(
    "task", [Query(max_tokens=6), Query(reasoning=True, max_tokens=6), Detect("x", 4), Point("x", 4)], ids=str
)
def test_the_longest_answer_feeds_no_more_than_it_reserved(task: Task) -> None:
    fed = drive(decoding_for(task, LONG_SUFFIX), [70] * 100)

    assert max_new_positions(task, LONG_SUFFIX) - 1 == len(fed)  # all but the last token or value
