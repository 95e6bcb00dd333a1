"""The evaluation counts right answers right, and the demo checkpoint reaches its bars."""

import json

import pytest

from pipeline.demo import evaluate
from pipeline.demo.scenes import Scene, Shape
from pipeline.moondream.answer import Box, Spot

CIRCLE = Shape("circle", "red", False, 0, 60.0, 40.0, 60.0)
STAR = Shape("star", "blue", False, 4, 160.0, 120.0, 60.0)
SCENE = Scene(320, 240, "white", (CIRCLE, STAR))


def test_boxes_are_found_once_each() -> None:
    circle = Box(*SCENE.box(CIRCLE))

    assert evaluate._num_found(SCENE, [CIRCLE, STAR], (circle, circle)) == 1
    assert evaluate._num_found(SCENE, [CIRCLE, STAR], (Box(*SCENE.box(STAR)), circle)) == 2


def test_a_box_that_is_too_far_off_is_not_found() -> None:
    x_min, y_min, x_max, y_max = SCENE.box(CIRCLE)
    width = x_max - x_min

    assert evaluate._num_found(SCENE, [CIRCLE], (Box(x_min + width / 2, y_min, x_max + width / 2, y_max),)) == 0


def test_intersection_over_union() -> None:
    assert evaluate.iou(Box(0, 0, 2, 2), Box(1, 0, 3, 2)) == pytest.approx(1 / 3)
    assert evaluate.iou(Box(0, 0, 1, 1), Box(2, 2, 3, 3)) == 0


def test_a_point_counts_inside_the_outline_only() -> None:
    inside, in_box_only = Spot(60 / 320, 40 / 240), Spot(32 / 320, 12 / 240)

    assert evaluate._num_hit(SCENE, [CIRCLE, STAR], (inside, inside)) == 1
    assert evaluate._num_hit(SCENE, [CIRCLE, STAR], (in_box_only,)) == 0


def test_the_demo_checkpoint_answers_new_scenes(capsys: pytest.CaptureFixture[str]) -> None:
    """A smaller sample than the README's figures, so only the program's verdict on clear failures is asked for."""
    evaluate.main(["--scenes", "30", "--seed", "11"])

    scores = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {skill for skill, bar in evaluate.BARS.items() if scores[skill] < bar - 0.07} == set()
