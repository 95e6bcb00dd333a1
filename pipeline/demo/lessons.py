"""What there is to say about a scene: the questions the demo model learns, and their true answers.

Knows nothing of token ids or of training.
"""

from dataclasses import dataclass

import numpy as np

from pipeline.demo.scenes import COLORS, SHAPES, Scene, Shape

NUMBERS = ("None", "One", "Two", "Three", "Four")
DESCRIBE = ("Describe this scene.", "Describe the scene.", "Describe this image.", "What do you see?")
OBJECTS = ("What objects are visible?", "What objects are there?", "Which objects can you see?", "List the objects.")
COUNT = (
    "How many objects are there?",
    "How many shapes are there?",
    "How many objects are visible?",
    "How many shapes do you see?",
)
COLOR = ("What color is the {}?", "What colour is the {}?", "Which color is the {}?")
PRESENCE = ("Is there {}?", "Do you see {}?", "Can you see {}?", "Is {} visible?")
PLACE = ("Where is the {}?", "Where can you see the {}?", "Where do you see the {}?")
# Whatever else is asked is answered with the description; these stand for all such questions.
OTHER_STARTS = (
    "What",
    "Who",
    "Why",
    "When",
    "How",
    "Which",
    "Are there",
    "Is this",
    "Does",
    "Tell me",
    "Please",
    "Write",
)
OTHER_WORDS = (
    "people", "person", "text", "on screen", "happening", "a dog", "a car", "the weather", "doing", "in the picture",
    "the mood", "a story", "about", "this", "the video", "it", "wearing", "today", "the camera", "outside", "one",
    "reading", "say", "sign", "is", "are", "the", "a", "of", "any", "does", "look like", "main", "subject", "here",
)  # fmt: skip


@dataclass(frozen=True)
class Question:
    """A question about a scene with its true answer; `skill` groups it in the evaluation."""

    skill: str
    text: str
    answer: str


def with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def name(shape: Shape) -> str:
    return with_article(f"{'small ' if shape.is_small else ''}{shape.color} {shape.kind}")


def place(shape: Shape) -> str:
    return f"in the {shape.position}" if shape.position == "center" else f"at the {shape.position}"


def join(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def objects(scene: Scene) -> str:
    return sentence(join([name(shape) for shape in scene.shapes]))


def describe(scene: Scene) -> str:
    placed = join([f"{name(shape)} {place(shape)}" for shape in scene.shapes])
    return sentence(f"{placed} on {with_article(scene.background)} background")


def caption(scene: Scene, length: str) -> str:
    """The caption of a scene: short names the objects, normal is the description, long counts them first."""
    if length == "short":
        return objects(scene)
    if length == "normal":
        return describe(scene)
    count = len(scene.shapes)
    opening = f"The image shows {NUMBERS[count].lower()} {'shape' if count == 1 else 'shapes'}: "
    return opening + describe(scene)[0].lower() + describe(scene)[1:]


def kinds_once(scene: Scene) -> list[Shape]:
    """The shapes whose kind occurs once: those that a question can name without doubt."""
    kinds = [shape.kind for shape in scene.shapes]
    return [shape for shape in scene.shapes if kinds.count(shape.kind) == 1]


def matching(scene: Scene, target: str) -> list[Shape]:
    """The shapes that a target such as "circle", "red circle" or "shape" means, in reading order."""
    return [s for s in scene.shapes if target in (s.kind, s.color, f"{s.color} {s.kind}", "shape", "object")]


def random_target(scene: Scene, rng: np.random.Generator) -> str:
    """Something to look for: most often there, at times not."""
    shape = scene.shapes[rng.integers(len(scene.shapes))]
    kind = shape.kind if rng.random() < 0.65 else str(rng.choice(SHAPES))
    color = shape.color if rng.random() < 0.65 else str(rng.choice(list(COLORS)))
    return kind if rng.random() < 0.5 else f"{color} {kind}"


def long_questions(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """The questions with long answers: the description and the objects."""
    return [
        Question("describe", str(rng.choice(DESCRIBE)), describe(scene)),
        Question("objects", str(rng.choice(OBJECTS)), objects(scene)),
    ]


def short_questions(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """How many, is there (twice), and what colour and where for one shape that occurs once, where there is one."""
    questions = [Question("count", str(rng.choice(COUNT)), f"{NUMBERS[len(scene.shapes)]}.")]
    for _ in range(2):
        target = random_target(scene, rng)
        text = str(rng.choice(PRESENCE)).format(with_article(target))
        questions.append(Question("presence", text, "Yes." if matching(scene, target) else "No."))
    if unique := kinds_once(scene):
        shape = unique[rng.integers(len(unique))]
        questions.append(Question("color", str(rng.choice(COLOR)).format(shape.kind), sentence(shape.color)))
        shape = unique[rng.integers(len(unique))]
        questions.append(Question("place", str(rng.choice(PLACE)).format(shape.kind), sentence(place(shape))))
    return questions


def other_question(scene: Scene, rng: np.random.Generator) -> Question:
    """A question that the model is not taught to answer: it gets the description."""
    words = rng.choice(OTHER_WORDS, size=rng.integers(1, 5), replace=False)
    return Question(
        "other", f"{rng.choice(OTHER_STARTS)} {' '.join(words)}{rng.choice(['?', '.', ''])}", describe(scene)
    )
