"""The engine: many images and questions in flight on one model, answered in batches.

    engine.submit("frame 0", image, [Query("Describe this scene.")])
    while engine.num_in_flight:
        for done in engine.step():
            print(done.key, done.answers[0].text)

Crops of waiting images go through the vision encoder together; the prefixes (bos and image) of admitted images are
prefilled together, then their prompts; every decode step covers all busy slots, whatever their skill and length, and a
finished sequence's slot is refilled before the next step. An answer never depends on what shares its batches, up to the
rounding of the number format. Out of memory, a batch is halved; an image that does not fit alone is Completed with that
error.

An Engine belongs to one thread, but for prepare(), and works in a CUDA stream of its own; where step() raises, its
state is undefined: make a new one. It knows nothing of videos, jobs or files (checkpoint.py loads what it runs on).
"""

import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import NotANumber, QuestionTooLong, WeightsMismatch
from pipeline.moondream.answer import Answer, Box, Completed, Spot, Trace
from pipeline.moondream.capacity import CROPS_PER_PASS, encode_bytes, prefill_bytes
from pipeline.moondream.checkpoint import Checkpoint
from pipeline.moondream.decoding import RegionDecoding, TextDecoding, decoding_for
from pipeline.moondream.device import explained_memory, free_bytes, halving, out_of_memory, own_stream, synchronize
from pipeline.moondream.image_crops import Crops, make_crops
from pipeline.moondream.prompts import DEFAULT_MAX_TOKENS, Caption, Query, Sampling, Task, max_new_positions, prompt_ids
from pipeline.moondream.runner import CROPS_PER_PART, ModelRunner, generator_for
from pipeline.moondream.scheduler import DEFAULT_SLOTS, Admission, Scheduler

PROMPT_ALLOWANCE = 64  # positions for the prompt where no context is asked for
STALL_S = 1.0  # what is in flight should not wait for longer while new images are encoded and prefilled
NOTICED_S = 0.25  # one such image that takes longer is noticed by who waits for an answer


@dataclass(eq=False)
class _Image:
    key: Hashable
    crops: Crops
    has_trace: bool
    is_urgent: bool
    submitted_s: float
    tokens: Tensor | None = None  # (num_patches, dim), once encoded
    encode_ms: float = 0.0
    sequences: list["_Sequence"] = field(default_factory=list)


@dataclass(eq=False)
class _Sequence:
    image: _Image
    task: Task
    prompt: list[int]
    decoding: TextDecoding | RegionDecoding
    generator: torch.Generator | None = None
    num_positions: int = 0  # filled in its slot
    started_s: float = 0.0
    first_logits: Tensor | None = None
    answer: Answer | None = None

    @property
    def sampling(self) -> Sampling:
        return self.task.sampling if isinstance(self.task, Query | Caption) else Sampling()


class Engine:
    """Runs a checkpoint over `num_slots` sequences of at most `context_len` positions each."""

    place: None = None  # it is in this process

    def __init__(self, checkpoint: Checkpoint, num_slots: int = DEFAULT_SLOTS, context_len: int | None = None) -> None:
        self.checkpoint, self.config, self.device = checkpoint, checkpoint.config, checkpoint.device
        self.num_slots = num_slots
        enough = self.config.prefix_len + PROMPT_ALLOWANCE + 2 * DEFAULT_MAX_TOKENS  # reasoning counts twice
        self.context_len = min(context_len or enough, self.config.text.max_context)
        cache_bytes = num_slots * self.context_len * checkpoint.kv_bytes_per_position
        what = f"The cache of {num_slots} slots"
        if cache_bytes > free_bytes(self.device):  # a CPU would first promise it and then end the process
            raise out_of_memory(what, self.device, cache_bytes)
        self._stream = own_stream(self.device)
        with explained_memory(what, self.device, cache_bytes), torch.cuda.stream(self._stream):
            self._runner = ModelRunner(checkpoint.model, num_slots, self.context_len)
        self._scheduler: Scheduler[_Sequence] = Scheduler(num_slots)
        self._num_together = 1  # images like the last one that a CPU encodes in one part; at first, one is tried
        self._admission_s = STALL_S  # that an image took, the last time; at first, one is tried
        self._images: dict[Hashable, _Image] = {}
        self._completed: list[Completed] = []
        # For any thread; it does not hold the engine, whose memory the next one needs.
        self.prepare: Callable[[np.ndarray], Crops] = partial(make_crops, config=self.config.vision)

    @property
    def num_in_flight(self) -> int:
        """Images submitted and not yet returned by step()."""
        return len(self._images) + len(self._completed)

    @property
    def num_wanted(self) -> int:
        """How many more images are well submitted before the next step, where the caller has a choice: what there is
        room for, but not so many that those in flight would wait for them beyond STALL_S."""
        return max(0, min(self.num_slots + self._num_ahead - self.num_in_flight, self._num_at_once))

    @property
    def is_for_urgent_only(self) -> bool:
        """Whether only urgent images begin now, as one is in flight that would wait noticeably for any other."""
        return self._admission_s > NOTICED_S and any(image.is_urgent for image in self._images.values())

    @property
    def _num_at_once(self) -> int:
        return max(self._num_together, int(STALL_S / max(self._admission_s, 1e-3)))  # some clocks tick slowly

    @property
    def _num_ahead(self) -> int:
        """How many images may wait for a slot, and be encoded meanwhile."""
        return self._num_together - 1 if self.device.type == "cpu" else self.num_slots

    @property
    def has_completed(self) -> bool:
        """Whether step() has images to return at once."""
        return bool(self._completed)

    def submit(
        self,
        key: Hashable,
        image: np.ndarray | Crops,
        tasks: Sequence[Task],
        frame_idx: int = 0,
        *,
        has_trace: bool = False,
        is_urgent: bool = False,
    ) -> None:
        """Queue the tasks of an image, RGB uint8 (H, W, 3), or of what prepare() made of it. `frame_idx` keys the
        generator where a task samples. An urgent image goes before the others that wait.

        Raises ImageUnreadable, InvalidOption, or QuestionTooLong if a prompt and its answer exceed the context.
        """
        assert tasks and key not in self._images
        crops = image if isinstance(image, Crops) else self.prepare(image)
        entry = _Image(key, crops, has_trace, is_urgent, time.monotonic())
        entry.sequences = [self._sequence(entry, task, frame_idx) for task in tasks]
        self._images[key] = entry
        self._scheduler.add(key, entry.sequences, is_urgent=is_urgent)

    @torch.inference_mode()
    def step(self) -> list[Completed]:
        """Admit what fits, advance every busy slot by one position, and return the images that are done."""
        with torch.cuda.stream(self._stream):
            admissions = self._scheduler.admit(only_urgent=self.is_for_urgent_only)
            if admissions:
                self._begin(admissions)
            if self._scheduler.busy:
                self._decode()
        completed, self._completed = self._completed, []
        return completed

    def cancel(self, key: Hashable) -> None:
        """Forget an image and free its slots."""
        if image := self._images.pop(key, None):
            self._scheduler.drop(key)  # its prefix too: another image may come under the same key
            image.sequences.clear()  # they refer to the image: without the cycle, crops and tokens are freed at once

    def _sequence(self, image: _Image, task: Task, frame_idx: int) -> _Sequence:
        ids = self.config.tokenizer
        prompt = prompt_ids(task, self.checkpoint.encode, ids)
        needed = self.config.prefix_len + len(prompt) + max_new_positions(task, ids)
        if needed > self.context_len:
            raise QuestionTooLong(
                f"Image, prompt and answer need {needed} positions, {self.context_len} are there "
                f"({self.config.prefix_len} of them for the image). Ask a shorter question or lower max_tokens."
            )
        if max(prompt) >= self.config.text.vocab_size:
            raise WeightsMismatch(
                f"The tokenizer gives the id {max(prompt)}, the model knows {self.config.text.vocab_size}: "
                "they do not belong together. Check the checkpoint's tokenizer.json."
            )
        sequence = _Sequence(image, task, prompt, decoding_for(task, ids))
        if sequence.sampling.temperature > 0:
            sequence.generator = generator_for(sequence.sampling.seed, frame_idx)
        return sequence

    def _begin(self, admissions: list[Admission[_Sequence]]) -> None:
        """Encode and prefill, and note how long an image takes for both."""
        admitted = list(dict.fromkeys(a.item.image for a in admissions))
        started_s = time.monotonic()
        num_encoded = self._encode(admitted)
        encoded_s = time.monotonic()
        self._prefill(admissions)
        if num_encoded:
            prefill_s = (time.monotonic() - encoded_s) / len(admitted)
            self._admission_s = (encoded_s - started_s) / num_encoded + prefill_s
            if self.device.type == "cpu":
                self._num_together = max(1, CROPS_PER_PART // len(admitted[-1].crops.pixels))

    def _encode(self, admitted: list[_Image]) -> int:
        """Encode the admitted images, and the next ones in line with them -> how many"""
        waiting = [image for image in admitted if image.tokens is None]
        waiting += self._ahead(waiting) if waiting else []
        for group in _passes(waiting):
            self._fail(halving(self._encode_pass, group, self.device))
        return len(waiting)

    def _ahead(self, images: list[_Image]) -> list[_Image]:
        """What is well encoded with these: on a GPU, so that a refilled slot need not wait; on a CPU, what fits into
        the same part, as that takes little longer, but nothing that an urgent image would wait for."""
        line = [self._images[key] for key in self._scheduler.next_images(min(self._num_ahead, self._num_at_once))]
        ahead = [image for image in line if image.tokens is None and image not in images]
        if self.device.type != "cpu":
            return ahead
        if any(image.is_urgent for image in images):
            return []
        num_crops = list(accumulate(len(image.crops.pixels) for image in [*images, *ahead]))[len(images) :]
        return [image for image, n in zip(ahead, num_crops, strict=True) if n <= CROPS_PER_PART]

    def _encode_pass(self, images: Sequence[_Image]) -> None:
        started_s = time.monotonic()
        tokens = self._runner.encode_images([image.crops for image in images])  # (num_images, num_patches, dim)
        synchronize(self.device)
        encode_ms = (time.monotonic() - started_s) * 1000 / len(images)
        for image, of_image in zip(images, tokens, strict=True):
            image.tokens, image.encode_ms = of_image, encode_ms

    def _prefill(self, admissions: list[Admission[_Sequence]]) -> None:
        admitted = [a for a in admissions if a.item.image.tokens is not None]
        for admission in admitted:
            admission.item.started_s = time.monotonic()
        new = [a for a in admitted if a.prefix == "new"]
        self._fail([a.item.image for a in halving(self._prefill_images, new, self.device)])
        admitted = [a for a in admitted if a.item.image.key in self._images]
        for admission in admitted:
            if admission.source_slot is not None:
                self._runner.cache.copy_prefix(admission.source_slot, admission.slot)
        sequences = {a.slot: a.item for a in admitted}

        def prefill_prompts(slots: Sequence[int]) -> Tensor:
            return self._runner.prefill_prompts(list(slots), [sequences[slot].prompt for slot in slots])

        hidden = self._hidden(prefill_prompts, list(sequences))
        for sequence in sequences.values():
            sequence.num_positions = self.config.prefix_len + len(sequence.prompt)
        self._read(sequences, hidden)

    def _prefill_images(self, admissions: Sequence[Admission[_Sequence]]) -> None:
        tokens = [a.item.image.tokens for a in admissions]
        self._runner.prefill_images([a.slot for a in admissions], [t for t in tokens if t is not None])

    def _decode(self) -> None:
        """Feed every busy slot its next input, and read what each wants from its new hidden state."""
        busy = dict(self._scheduler.busy)
        feeds = {slot: sequence.decoding.next_input() for slot, sequence in busy.items()}
        # An idle slot between busy ones writes just behind a prefix, which a prompt overwrites.
        idle_position = self.config.prefix_len
        num_slots = self._scheduler.num_active_slots
        positions = [busy[slot].num_positions if slot in busy else idle_position for slot in range(num_slots)]

        def decode(slots: Sequence[int]) -> Tensor:
            return self._runner.decode(slots[0], [feeds.get(s) for s in slots], [positions[s] for s in slots])

        hidden = self._hidden(decode, list(range(num_slots)))
        for sequence in busy.values():
            sequence.num_positions += 1
        self._read({slot: sequence for slot, sequence in busy.items() if sequence.decoding.wants}, hidden)

    def _hidden(self, run: Callable[[Sequence[int]], Tensor], slots: list[int]) -> dict[int, Tensor]:
        """Run slots together, or in halves where memory is short -> the hidden states (dim,) of those that fit."""
        hidden: dict[int, Tensor] = {}

        def run_part(part: Sequence[int]) -> None:
            hidden.update(zip(part, run(part), strict=True))

        failed = halving(run_part, slots, self.device)
        self._fail([self._scheduler.busy[slot].image for slot in failed if slot in self._scheduler.busy])
        return {slot: state for slot, state in hidden.items() if slot in self._scheduler.busy}  # not the failed images'

    def _read(self, sequences: dict[int, _Sequence], hidden: dict[int, Tensor]) -> None:
        """Read from each sequence's hidden state what it wants: a token, a coordinate (perhaps after that), a size."""
        sequences = {slot: sequence for slot, sequence in sequences.items() if slot in hidden}
        if asking := _wanting(sequences, "token"):
            states = torch.stack([hidden[slot] for slot in asking])  # (B, dim)
            self._read_tokens(list(asking.values()), states)
            sequences = {slot: s for slot, s in sequences.items() if s.image.key in self._images}
        if asking := _wanting(sequences, "coord"):
            states = torch.stack([hidden[slot] for slot in asking])
            coords = self.checkpoint.model.region.decode_coord(states).tolist()
            for sequence, coord in zip(asking.values(), coords, strict=True):
                sequence.decoding.accept_coord(coord)
        if asking := _wanting(sequences, "size"):
            states = torch.stack([hidden[slot] for slot in asking])
            sizes = self.checkpoint.model.region.decode_size(states).tolist()
            for sequence, (width, height) in zip(asking.values(), sizes, strict=True):
                sequence.decoding.accept_size(width, height)
        self._finish({slot: sequence for slot, sequence in sequences.items() if sequence.decoding.finish_reason})

    def _read_tokens(self, sequences: list[_Sequence], hidden: Tensor) -> None:
        logits = self._runner.logits(hidden)  # (B, vocab)
        is_nan = logits.isnan().any(-1).tolist()
        if any(is_nan):
            self._fail_nan([s for s, is_bad in zip(sequences, is_nan, strict=True) if is_bad])
            alive = [i for i, s in enumerate(sequences) if s.image.key in self._images]
            if not alive:
                return
            sequences, logits = [sequences[i] for i in alive], logits[alive]
        for sequence, row in zip(sequences, logits, strict=True):
            if sequence.image.has_trace and sequence.first_logits is None:
                sequence.first_logits = row.cpu().clone()
        tokens = self._runner.choose_tokens(
            logits,
            suppressed=[sequence.decoding.suppressed for sequence in sequences],
            samplings=[(sequence.sampling, sequence.generator) for sequence in sequences],
        )
        for sequence, token in zip(sequences, tokens, strict=True):
            sequence.decoding.accept_token(token)

    def _finish(self, finished: dict[int, _Sequence]) -> None:
        self._scheduler.finish(list(finished))
        for sequence in finished.values():
            sequence.answer = self._answer(sequence)
            image = sequence.image
            answers = tuple(s.answer for s in image.sequences if s.answer)
            if len(answers) == len(image.sequences):
                self.cancel(image.key)
                self._completed.append(Completed(image.key, answers))

    def _answer(self, sequence: _Sequence) -> Answer:
        image, decoding, now_s = sequence.image, sequence.decoding, time.monotonic()
        assert decoding.finish_reason
        answer_ids, reasoning_ids, boxes, points = [], [], (), ()
        if isinstance(decoding, TextDecoding):
            answer_ids, reasoning_ids = decoding.answer_ids, decoding.reasoning_ids
        elif decoding.has_size:
            boxes = tuple(Box(x - w / 2, y - h / 2, x + w / 2, y + h / 2) for x, y, w, h in decoding.objects)
        else:
            points = tuple(Spot(x, y) for x, y in decoding.objects)
        return Answer(
            text=self.checkpoint.decode(answer_ids),
            finish_reason=decoding.finish_reason,
            num_tokens=decoding.num_tokens,
            image_encode_ms=image.encode_ms,
            llm_inference_ms=(now_s - sequence.started_s) * 1000,
            total_ms=(now_s - image.submitted_s) * 1000,
            prompt_ids=tuple(sequence.prompt),
            answer_ids=tuple(answer_ids),
            reasoning=self.checkpoint.decode(reasoning_ids),
            reasoning_ids=tuple(reasoning_ids),
            boxes=boxes,
            points=points,
            trace=_trace(sequence),
        )

    def _fail_nan(self, sequences: Iterable[_Sequence]) -> None:
        """End images for which the model computes NaN, and clear their slots: masked, it would still spread."""
        for image in dict.fromkeys(sequence.image for sequence in sequences):
            for slot, sequence in self._scheduler.busy.items():
                if sequence.image is image:
                    self._runner.cache.clear(slot)
            self.cancel(image.key)
            message = f"The model computes NaN in {self.checkpoint.dtype}. Try --dtype float32 or bfloat16."
            self._completed.append(Completed(image.key, (), NotANumber(message)))

    def _fail(self, images: Iterable[_Image]) -> None:
        """End images that do not fit the memory even alone."""
        for image in dict.fromkeys(images):
            self.cancel(image.key)
            num_crops, dtype = len(image.crops.pixels), self.checkpoint.dtype
            needed_bytes = max(encode_bytes(self.config, num_crops, dtype), prefill_bytes(self.config, dtype))
            error = out_of_memory("One frame alone, besides weights and cache,", self.device, needed_bytes)
            self._completed.append(Completed(image.key, (), error))


def positions_needed(task: Task, checkpoint: Checkpoint) -> int:
    """The context that the longest possible answer to a task takes. Raises InvalidOption for a task out of range."""
    ids = checkpoint.config.tokenizer
    return checkpoint.config.prefix_len + len(prompt_ids(task, checkpoint.encode, ids)) + max_new_positions(task, ids)


def _trace(sequence: _Sequence) -> Trace | None:
    tokens, first_logits = sequence.image.tokens, sequence.first_logits
    return None if tokens is None or first_logits is None else Trace(tokens.float().cpu(), first_logits)


def _wanting(sequences: dict[int, _Sequence], what: str) -> dict[int, _Sequence]:
    return {slot: sequence for slot, sequence in sequences.items() if sequence.decoding.wants == what}


def _passes(images: Sequence[_Image]) -> Iterator[list[_Image]]:
    """Group images so that no group but a single image has more than CROPS_PER_PASS crops."""
    group: list[_Image] = []
    for image in images:
        if group and sum(len(i.crops.pixels) for i in [*group, image]) > CROPS_PER_PASS:
            yield group
            group = []
        group.append(image)
    if group:
        yield group
