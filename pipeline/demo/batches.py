"""Training batches: each scene is one image followed by many independent question-and-answer branches.

All branches of a scene attend to its one image prefix and not to each other, each counting its positions from the end
of the prefix: exactly what the model sees when each is asked alone, at a fraction of the cost. Rendering and packing
are NumPy only and run in a worker process.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import IterableDataset

from pipeline.demo import lessons
from pipeline.demo.scenes import BACKGROUNDS, COLORS, SHAPES, Scene, compress, draw_scene, random_scene
from pipeline.moondream.config import MoondreamConfig, Template, VisionConfig
from pipeline.moondream.image_crops import make_crops
from pipeline.moondream.region import MAX_SIZE_BIN, SIZE_OCTAVES

IGNORED = -100
TOKEN, COORD, SIZE, PAD = range(4)
SKILLS = ("describe", "objects", "other", "short", "caption", "reasoning", "detect", "point")
MIN_PATCH_OVERLAP = 0.15
VISION_BATCH = 64
ROW_LEN = 63  # 128 with the demo's prefix of 65


@dataclass
class Packed:
    """One scene's branches end to end. Lists of equal length T, but for `branches`."""

    inputs: list[int] = field(default_factory=list)  # TOKEN: the token id
    kinds: list[int] = field(default_factory=list)
    values: list[tuple[float, float]] = field(default_factory=list)  # COORD, SIZE: what is fed
    positions: list[int] = field(default_factory=list)
    branch: list[int] = field(default_factory=list)
    next_token: list[int] = field(default_factory=list)
    next_coord: list[int] = field(default_factory=list)
    next_size: list[tuple[int, int]] = field(default_factory=list)
    skills: list[int] = field(default_factory=list)  # of each branch

    def start(self, skill: str) -> None:
        self.skills.append(SKILLS.index(skill))

    def add(self, token: int = 0, kind: int = TOKEN, value: tuple[float, float] = (0.0, 0.0)) -> None:
        branch = len(self.skills) - 1
        self.positions.append(self.positions[-1] + 1 if self.branch and self.branch[-1] == branch else 0)
        self.branch.append(branch)
        self.inputs.append(token)
        self.kinds.append(kind)
        self.values.append(value)
        self.next_token.append(IGNORED)
        self.next_coord.append(IGNORED)
        self.next_size.append((IGNORED, IGNORED))


class Packer:
    """Turns scenes into Packed branches with one tokenizer and config."""

    def __init__(self, tokenizer: Tokenizer, config: MoondreamConfig) -> None:
        self.tokenizer, self.config, self.ids = tokenizer, config, config.tokenizer

    def pack(self, scene: Scene, rng: np.random.Generator) -> Packed:
        """One long answer of the many that say the same, one list of objects, and everything short."""
        packed, templates = Packed(), self.ids.templates
        describe, objects = lessons.long_questions(scene, rng)
        short = lessons.short_questions(scene, rng)
        choice = rng.random()
        if choice < 0.35:
            length = str(rng.choice(["short", "normal", "long"]))
            self._answer(packed, "caption", list(templates.caption[length]), lessons.caption(scene, length))
        else:
            self._ask(packed, describe if choice < 0.8 else lessons.other_question(scene, rng))
        if rng.random() < 0.6:
            self._ask(packed, objects)
        else:
            self._reason(packed, short[rng.integers(len(short))], scene)
        for question in short:
            self._ask(packed, question)
        for target in (lessons.random_target(scene, rng), str(rng.choice([*SHAPES, "shape", "object"]))):
            self._locate(packed, "detect", templates.detect, scene, target)
        self._locate(packed, "point", templates.point, scene, lessons.random_target(scene, rng))
        return packed

    def _ask(self, packed: Packed, question: lessons.Question) -> None:
        skill = question.skill if question.skill in SKILLS else "short"
        self._answer(packed, skill, [*self._query(question.text), self.ids.answer_id], question.answer)

    def _query(self, text: str) -> list[int]:
        template = self.ids.templates.query
        return [*template.prefix, *self.tokenizer.encode(text).ids, *template.suffix]

    def _answer(self, packed: Packed, skill: str, prompt: list[int], answer: str) -> None:
        packed.start(skill)
        for token in prompt:
            packed.add(token)
        self._say(packed, [*self.tokenizer.encode(answer).ids, self.ids.eos_id])

    def _reason(self, packed: Packed, question: lessons.Question, scene: Scene) -> None:
        prompt = [*self._query(question.text), self.ids.thinking_id]
        packed.start("reasoning")
        for token in prompt:
            packed.add(token)
        self._say(packed, [*self.tokenizer.encode(lessons.objects(scene)).ids, self.ids.answer_id])
        for token in self.ids.templates.query.suffix:
            packed.add(token)
        self._say(packed, [*self.tokenizer.encode(question.answer).ids, self.ids.eos_id])

    def _say(self, packed: Packed, tokens: list[int]) -> None:
        """Predict tokens from here on; all but the last are fed back."""
        for i, token in enumerate(tokens):
            packed.next_token[-1] = token
            if i < len(tokens) - 1:
                packed.add(token)

    def _locate(self, packed: Packed, skill: str, template: Template, scene: Scene, target: str) -> None:
        """Predict each matching object's x, y (and for detect its size), then that there is no more."""
        packed.start(skill)
        for token in [*template.prefix, *self.tokenizer.encode(f" {target}").ids, *template.suffix]:
            packed.add(token)
        num_bins = self.config.region.coord_out_dim
        for shape in lessons.matching(scene, target):
            x_min, y_min, x_max, y_max = scene.box(shape)
            packed.next_token[-1] = self.ids.coord_id
            for center in ((x_min + x_max) / 2, (y_min + y_max) / 2):
                bin = min(round(center * num_bins), num_bins - 1)
                packed.next_coord[-1] = bin
                packed.add(kind=COORD, value=(bin / num_bins, 0.0))
            if skill == "detect":
                bins = size_bin(x_max - x_min), size_bin(y_max - y_min)
                packed.next_size[-1] = bins
                packed.add(kind=SIZE, value=(size_of(bins[0]), size_of(bins[1])))
        packed.next_token[-1] = self.ids.eos_id


def size_bin(size: float) -> int:
    """The bin whose size, 2^(bin / 1023 * 10 - 10), is nearest to a fraction of the frame."""
    return min(max(round((np.log2(size) + SIZE_OCTAVES) / SIZE_OCTAVES * MAX_SIZE_BIN), 0), MAX_SIZE_BIN)


def size_of(bin: int) -> float:
    return float(2 ** (bin / MAX_SIZE_BIN * SIZE_OCTAVES - SIZE_OCTAVES))


@dataclass(frozen=True)
class Picture:
    """An image as the vision encoder gets it, what each of its patches shows, nothing (0) or a shape, and its
    background, which is to be known from every patch."""

    pixels: np.ndarray  # uint8 (S, S, 3)
    classes: np.ndarray  # int64 (grid^2, 3): kind, colour, and 1 for normal or 2 for small
    boxes: np.ndarray  # float32 (grid^2, 4): centre x, y, width, height of the shape, fractions of the frame
    background: int


def picture_of(scene: Scene, pixels: np.ndarray, grid_size: int) -> Picture:
    classes, boxes = np.zeros((grid_size, grid_size, 3), np.int64), np.zeros((grid_size, grid_size, 4), np.float32)
    edges = np.arange(grid_size + 1) / grid_size
    for shape in scene.shapes:
        x_min, y_min, x_max, y_max = scene.box(shape)
        across = np.clip(np.minimum(edges[1:], x_max) - np.maximum(edges[:-1], x_min), 0, None) * grid_size
        down = np.clip(np.minimum(edges[1:], y_max) - np.maximum(edges[:-1], y_min), 0, None) * grid_size
        covered = down[:, None] * across[None] >= MIN_PATCH_OVERLAP
        classes[covered] = (SHAPES.index(shape.kind) + 1, list(COLORS).index(shape.color) + 1, 1 + shape.is_small)
        boxes[covered] = ((x_min + x_max) / 2, (y_min + y_max) / 2, x_max - x_min, y_max - y_min)
    background = list(BACKGROUNDS).index(scene.background)
    return Picture(pixels, classes.reshape(-1, 3), boxes.reshape(-1, 4), background)


def random_example(packer: Packer, rng: np.random.Generator) -> tuple[Picture, Packed]:
    """One scene as jobs would see it, with its branches."""
    scene = random_scene(rng, (480, 720) if rng.random() < 0.03 else (240, 360))
    image = draw_scene(scene, rng)
    if rng.random() < 0.6:
        image = compress(image, int(rng.integers(60, 96)))
    vision = packer.config.vision
    return picture_of(scene, make_crops(image, vision).pixels[0], vision.grid_size), packer.pack(scene, rng)


def quick_picture(config: VisionConfig, rng: np.random.Generator) -> Picture:
    """A scene painted straight at the crop's size, 30 times as fast: only the patch head learns from it."""
    scene = random_scene(rng)
    pixels = draw_scene(scene, rng, max_noise=4, size_px=(config.crop_size, config.crop_size))
    return picture_of(scene, pixels, config.grid_size)


def stack(pictures: list[Picture]) -> dict[str, Tensor]:
    return {
        "pixels": torch.from_numpy(np.stack([picture.pixels for picture in pictures])),
        "patch_classes": torch.from_numpy(np.stack([picture.classes for picture in pictures])),
        "patch_boxes": torch.from_numpy(np.stack([picture.boxes for picture in pictures])),
        "background": torch.tensor([picture.background for picture in pictures]),
    }


def collate(pictures: list[Picture], branches: list[Packed]) -> dict[str, Tensor]:
    """Stack pictures, and lay the branches of the first ones into rows of at most ROW_LEN positions -> tensors of P
    pictures and R rows of T positions; `image_index` (R,) says whose rows they are."""
    rows = [(image, row) for image, packed in enumerate(branches) for row in _rows(packed)]
    longest = max(len(row) for _, row in rows)

    def padded(name: str, fill: object) -> Tensor:
        values = [getattr(branches[image], name) for image, _ in rows]
        return torch.tensor(
            [[of[i] for i in row] + [fill] * (longest - len(row)) for of, (_, row) in zip(values, rows, strict=True)]
        )

    most = max(len(packed.skills) for packed in branches)
    return {
        **stack(pictures),
        "image_index": torch.tensor([image for image, _ in rows]),
        "inputs": padded("inputs", 0),
        "kinds": padded("kinds", PAD),
        "values": padded("values", (0.0, 0.0)),
        "positions": padded("positions", 0),
        "branch": padded("branch", -1),
        "next_token": padded("next_token", IGNORED),
        "next_coord": padded("next_coord", IGNORED),
        "next_size": padded("next_size", (IGNORED, IGNORED)),
        "skills": torch.tensor([p.skills + [IGNORED] * (most - len(p.skills)) for p in branches]),
    }


def _rows(packed: Packed) -> list[list[int]]:
    """The positions of each row: whole branches, longest first, each in the first row where it fits."""
    branches = [[i for i, b in enumerate(packed.branch) if b == branch] for branch in range(len(packed.skills))]
    rows: list[list[int]] = []
    for branch in sorted(branches, key=len, reverse=True):
        row = next((row for row in rows if len(row) + len(branch) <= ROW_LEN), None)
        if row is None:
            rows.append(row := [])
        row += branch
    return rows


class SceneBatches(IterableDataset[dict[str, Tensor]]):
    """Endless batches from `first_step` on. Each follows from (seed, step) alone, so that a resumed run goes on as if
    it had never stopped."""

    def __init__(
        self,
        packer: Packer,
        seed: tuple[int, ...],
        batch_size: int,
        num_quick: int,
        vision_steps: int = 0,
        first_step: int = 0,
    ) -> None:
        self.packer, self.seed, self.first_step = packer, seed, first_step
        self.batch_size, self.num_quick, self.vision_steps = batch_size, num_quick, vision_steps

    def batch(self, step: int) -> dict[str, Tensor]:
        """`batch_size` full examples, and after them `num_quick` pictures without branches; in the first `vision_steps`
        only such pictures, VISION_BATCH of them."""
        rng, config = np.random.default_rng((*self.seed, step)), self.packer.config.vision
        if step < self.vision_steps:
            return stack([quick_picture(config, rng) for _ in range(VISION_BATCH)])
        examples = [random_example(self.packer, rng) for _ in range(self.batch_size)]
        quick = [quick_picture(config, rng) for _ in range(self.num_quick)]
        return collate([picture for picture, _ in examples] + quick, [packed for _, packed in examples])

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        step = self.first_step
        while True:
            yield self.batch(step)
            step += 1
