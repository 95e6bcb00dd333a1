"""Generated scenes are what they say they are."""

import numpy as np
import pytest

from pipeline.demo.lessons import describe, matching, other_question, short_questions
from pipeline.demo.scenes import BACKGROUNDS, COLORS, SHAPES, Scene, compress, draw_scene, random_scene, random_shape


def scenes(count: int) -> list[Scene]:
    rng = np.random.default_rng(1)
    return [random_scene(rng) for _ in range(count)]


def test_shapes_lie_inside_their_cells() -> None:
    for scene in scenes(300):
        for shape in scene.shapes:
            row, column = divmod(shape.cell, 3)
            x_min, y_min, x_max, y_max = scene.box(shape)
            assert column / 3 <= x_min < x_max <= (column + 1) / 3
            assert row / 3 <= y_min < y_max <= (row + 1) / 3


def test_no_side_is_under_12_percent_and_the_two_sizes_are_far_apart() -> None:
    sides = [
        (shape.is_small, shape.side_px / min(scene.width_px, scene.height_px))
        for scene in scenes(300)
        for shape in scene.shapes
    ]

    assert min(side for _, side in sides) >= 0.12
    assert min(s for is_small, s in sides if not is_small) > 1.4 * max(s for is_small, s in sides if is_small)


def test_everything_there_is_occurs() -> None:
    seen = {(s.kind, s.color, s.position) for scene in scenes(800) for s in scene.shapes}

    assert {kind for kind, _, _ in seen} == set(SHAPES)
    assert {color for _, color, _ in seen} == set(COLORS)
    assert len({position for _, _, position in seen}) == 9
    assert {scene.background for scene in scenes(300)} == set(BACKGROUNDS)
    assert {len(scene.shapes) for scene in scenes(300)} == {1, 2, 3, 4}


def test_aspect_ratios_go_from_portrait_to_cinema() -> None:
    ratios = [scene.width_px / scene.height_px for scene in scenes(300)]

    assert min(ratios) == pytest.approx(9 / 16, abs=0.01)
    assert min(r for r in ratios if r > 1) == pytest.approx(4 / 3, abs=0.05)
    assert max(ratios) == pytest.approx(21 / 9, abs=0.05)


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("color", COLORS)
def test_a_shape_is_painted_in_its_colour_at_its_place(kind: str, color: str) -> None:
    rng = np.random.default_rng(3)
    shape = random_shape(rng, 320, 240, cell=4)
    shape = type(shape)(kind, color, False, 4, 160.0, 120.0, 70.0)
    image = draw_scene(Scene(320, 240, "black", (shape,)), rng, max_noise=0)

    center = image[120, 160].astype(int)
    assert np.abs(center - COLORS[color]).max() <= 10
    assert image[5, 5].max() < 30


def test_the_same_seed_paints_the_same_picture() -> None:
    first, second = (
        compress(draw_scene(random_scene(rng), rng), 80) for rng in (np.random.default_rng(5), np.random.default_rng(5))
    )

    assert np.array_equal(first, second)


def test_a_description_names_every_shape_in_reading_order() -> None:
    for scene in scenes(50):
        text = describe(scene)
        places = [text.find(f"{shape.color} {shape.kind}") for shape in scene.shapes]
        assert -1 not in places
        assert text.endswith(f"{scene.background} background.")


def test_answers_to_short_questions_are_true() -> None:
    rng = np.random.default_rng(2)
    for scene in scenes(200):
        for question in short_questions(scene, rng):
            words = question.text.rstrip("?").split()
            if question.skill == "presence" and question.answer == "No.":
                assert not any(
                    s.kind in words and (s.color in words or not set(COLORS) & set(words)) for s in scene.shapes
                )
            if question.skill == "color":
                assert [f"{s.color}." for s in scene.shapes if s.kind in words] == [question.answer.lower()]


def test_a_target_finds_its_shapes_and_no_others() -> None:
    scene = next(s for s in scenes(100) if len(s.shapes) == 4)

    assert matching(scene, "shape") == list(scene.shapes)
    assert all(s.kind == "star" for s in matching(scene, "star"))
    assert scene.shapes[0] in matching(scene, f"{scene.shapes[0].color} {scene.shapes[0].kind}")


def test_an_unknown_question_is_answered_with_the_description() -> None:
    scene = scenes(1)[0]

    assert other_question(scene, np.random.default_rng(0)).answer == describe(scene)
