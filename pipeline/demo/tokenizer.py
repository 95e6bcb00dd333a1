"""The demo model's tokenizer: byte-level BPE, so that any text encodes, learnt from what is said about scenes.

Whole phrases (" at the top left") are single tokens: an answer takes fewer steps than it has words.
"""

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from pipeline.demo import lessons
from pipeline.demo.scenes import BACKGROUNDS, random_scene

VOCAB_SIZE = 640
# Ids 0 to 9 are those of the real checkpoint (config.py); the words of its prompts follow.
SPECIAL_TOKENS = ["<|endoftext|>", *(f"<|reserved_{i}|>" for i in range(1, 10))]
PROMPT_WORDS = ["<|query|>", "<|caption|>", "<|short|>", "<|normal|>", "<|long|>", "<|detect|>", "<|point|>"]
PHRASES = "|".join(
    [
        r" (?:at|in) the (?:top|bottom)(?: left| right)?",
        r" (?:at|in) the (?:left|right|center)",
        rf" on an? (?:{'|'.join(sorted(BACKGROUNDS, key=len, reverse=True))}) background",
        r"(?:,| and| shows)? ?\b[Aa]n?(?: small)?\b",
    ]
)
WORDS = r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+"


def train_tokenizer(seed: int, num_scenes: int = 4000) -> Tokenizer:
    """Learn a tokenizer from the questions and answers of random scenes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [
            pre_tokenizers.Split(Regex(f"{PHRASES}|{WORDS}"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS + PROMPT_WORDS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(np.random.default_rng(seed), num_scenes), trainer)
    return tokenizer


def _corpus(rng: np.random.Generator, num_scenes: int):
    for _ in range(num_scenes):
        scene = random_scene(rng)
        questions = [*lessons.long_questions(scene, rng), *lessons.short_questions(scene, rng)]
        questions.append(lessons.other_question(scene, rng))
        for question in questions:
            yield question.text
            yield question.answer
        yield lessons.caption(scene, "long")
        yield f" {lessons.random_target(scene, rng)}"
