"""Score a checkpoint on new scenes: `python -m pipeline.demo.evaluate --scenes 500 --seed 2026`.

Every question goes through the engine that jobs use. Prints each skill's score and, as the last line, a JSON object;
exits 0 only if the scores that have a bar reach it.
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

import cv2
import numpy as np

from pipeline.demo import lessons
from pipeline.demo.scenes import SHAPES, Scene, Shape, compress, draw_scene, random_scene
from pipeline.moondream.answer import Answer, Box, Spot
from pipeline.moondream.checkpoint import Checkpoint, load_checkpoint
from pipeline.moondream.engine import Engine
from pipeline.moondream.hub import DEMO
from pipeline.moondream.prompts import Caption, CaptionLength, Detect, Point, Query, Task

HEIGHTS = (240, 360, 480, 720, 1080)
SHORT = ("count", "presence", "color", "place")
CAPTION_LENGTHS: tuple[CaptionLength, ...] = ("short", "normal", "long")
MIN_IOU = 0.5
BARS = {
    "describe": 0.85,
    "objects": 0.85,
    "short": 0.93,
    "detect_precision": 0.80,
    "detect_recall": 0.80,
    "point": 0.90,
}


@dataclass
class Tally:
    """Right answers of all, by skill."""

    right: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    total: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    def add(self, skill: str, right: int, total: int = 1) -> None:
        self.right[skill] += right
        self.total[skill] += total

    def scores(self) -> dict[str, float]:
        return {skill: self.right[skill] / total for skill, total in self.total.items() if total}


def questions_of(scene: Scene, rng: np.random.Generator) -> Iterator[tuple[str, Task, str]]:
    """Skill, task and true answer of everything asked in words."""
    for question in [
        *lessons.long_questions(scene, rng),
        *lessons.short_questions(scene, rng),
        lessons.other_question(scene, rng),
    ]:
        yield question.skill, Query(question.text), question.answer
    for length in CAPTION_LENGTHS:
        yield f"caption_{length}", Caption(length), lessons.caption(scene, length)
    count = lessons.short_questions(scene, rng)[0]
    yield "reasoning", Query(count.text, reasoning=True), count.answer


def evaluate(checkpoint: Checkpoint, num_scenes: int, seed: int) -> dict[str, float]:
    """The share of right answers of each skill, over scenes that follow from the seed alone."""
    rng, tally = np.random.default_rng(seed), Tally()
    engine = Engine(checkpoint, num_slots=16, context_len=checkpoint.config.text.max_context)
    scenes: list[tuple[Scene, list[tuple[str, Task, str]], list[str]]] = []
    for index in range(num_scenes):
        height_px = int(rng.choice(HEIGHTS))
        scene = random_scene(rng, (height_px, height_px))
        image = compress(draw_scene(scene, rng), int(rng.integers(70, 96)))
        asked = list(questions_of(scene, rng))
        targets = [lessons.random_target(scene, rng), str(rng.choice(SHAPES)), lessons.random_target(scene, rng)]
        scenes.append((scene, asked, targets))
        tasks = [task for _, task, _ in asked]
        engine.submit(index, image, [*tasks, Detect(targets[0]), Detect(targets[1]), Point(targets[2])], index)
        while engine.num_in_flight > (0 if index == num_scenes - 1 else 4):
            for done in engine.step():
                assert isinstance(done.key, int)
                _score(tally, *scenes[done.key], list(done.answers))
    return tally.scores()


def _score(
    tally: Tally, scene: Scene, asked: list[tuple[str, Task, str]], targets: list[str], answers: list[Answer]
) -> None:
    for (skill, _, truth), answer in zip(asked, answers, strict=False):
        tally.add(skill, answer.text == truth)
        if skill in SHORT:
            tally.add("short", answer.text == truth)
    for target, answer in zip(targets[:2], answers[-3:], strict=False):
        shapes = lessons.matching(scene, target)
        num_found = _num_found(scene, shapes, answer.boxes)
        tally.add("detect_precision", num_found, len(answer.boxes))
        tally.add("detect_recall", num_found, len(shapes))
    shapes = lessons.matching(scene, targets[2])
    num_hit = _num_hit(scene, shapes, answers[-1].points)
    tally.add("point", num_hit, max(len(shapes), len(answers[-1].points)))


def _num_found(scene: Scene, shapes: list[Shape], boxes: tuple[Box, ...]) -> int:
    """How many shapes have a box of their own that overlaps theirs by MIN_IOU."""
    left = [Box(*scene.box(shape)) for shape in shapes]
    found = 0
    for box in boxes:
        best = max(left, key=lambda truth: iou(box, truth), default=None)
        if best and iou(box, best) >= MIN_IOU:
            left.remove(best)
            found += 1
    return found


def _num_hit(scene: Scene, shapes: list[Shape], points: tuple[Spot, ...]) -> int:
    """How many shapes have a point of their own inside their outline."""
    left = list(shapes)
    for point in points:
        at = (point.x * scene.width_px, point.y * scene.height_px)
        hit = next((s for s in left if cv2.pointPolygonTest(s.outline.astype(np.float32), at, False) >= 0), None)
        if hit:
            left.remove(hit)
    return len(shapes) - len(left)


def iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes."""
    across = max(0.0, min(a.x_max, b.x_max) - max(a.x_min, b.x_min))
    down = max(0.0, min(a.y_max, b.y_max) - max(a.y_min, b.y_min))
    areas = (a.x_max - a.x_min) * (a.y_max - a.y_min) + (b.x_max - b.x_min) * (b.y_max - b.y_min)
    return across * down / (areas - across * down)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pipeline.demo.evaluate", description=__doc__)
    parser.add_argument("--scenes", type=int, default=500, help="how many scenes (default: 500)")
    parser.add_argument("--seed", type=int, default=2026, help="which scenes (default: 2026)")
    parser.add_argument("--model", default=DEMO, help="another checkpoint folder (default: demo)")
    args = parser.parse_args(arguments)
    scores = evaluate(load_checkpoint(args.model, device="cpu", dtype="float32"), args.scenes, args.seed)
    for skill, score in scores.items():
        bar = f"  (bar {BARS[skill]:.0%})" if skill in BARS else ""
        print(f"{skill:20} {score:6.1%}{bar}")
    is_ok = all(scores.get(skill, 0.0) >= bar for skill, bar in BARS.items())
    print(
        json.dumps(
            {"scenes": args.scenes, "seed": args.seed, **{k: round(v, 4) for k, v in scores.items()}, "ok": is_ok}
        )
    )
    return 0 if is_ok else 1


if __name__ == "__main__":
    sys.exit(main())
