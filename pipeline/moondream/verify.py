"""Compare the engine with reference outputs: `python -m pipeline.moondream.verify DIR [--slots N] [--dtype T]`.

DIR is a checkpoint folder that also holds images, `expected.json` and `expected.safetensors`: what the reference
implementation computed in float32, greedily. Everything in it runs through the engine that jobs use, with all images
in flight together when there is more than one slot. Prints a row per image and, as the last line, a JSON object; exits
0 only if all agree: in float32 every id, embeddings and logits to 1e-3, boxes and points to 1e-5; in bfloat16, on these
random weights full of near-ties, embeddings to 0.3 and logits to 0.15.
"""

import argparse
import hashlib
import json
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from pipeline.errors import DescriberError
from pipeline.moondream.answer import Answer, Box, Spot
from pipeline.moondream.checkpoint import load_checkpoint
from pipeline.moondream.engine import Engine
from pipeline.moondream.image_crops import make_crops
from pipeline.moondream.prompts import DEFAULT_MAX_OBJECTS, Caption, Detect, Point, Query, Task

END = -1  # stands for the end of an answer
FLOAT32_TOLERANCE, REGION_TOLERANCE = 1e-3, 1e-5
BFLOAT16_EMBEDDING_TOLERANCE, BFLOAT16_LOGIT_TOLERANCE = 0.3, 0.15


@dataclass
class Report:
    """Counts and maxima; the fields are those of the final JSON line. A maximum is null where counts of objects differ.
    `ids_compared` and `ids_equal` count token ids up to and with the first difference of each answer."""

    images: int = 0
    crops_equal: int = 0
    max_abs_embedding: float = 0.0
    max_abs_first_logits: float = 0.0
    queries: int = 0
    queries_equal: int = 0
    captions: int = 0
    captions_equal: int = 0
    reasoning: int = 0
    reasoning_equal: int = 0
    detect: int = 0
    points: int = 0
    max_abs_box: float | None = 0.0
    max_abs_point: float | None = 0.0
    prompts_equal: int = 0
    ids_compared: int = 0
    ids_equal: int = 0
    dtype: str = "float32"
    ok: bool = False

    def compare_ids(self, got: Sequence[int], expected: Sequence[int]) -> bool:
        with_ends = zip([*got, END], [*expected, END], strict=False)
        num_agreeing = next((i for i, (a, b) in enumerate(with_ends) if a != b), None)
        self.ids_equal += len(expected) if num_agreeing is None else num_agreeing
        self.ids_compared += len(expected) if num_agreeing is None else num_agreeing + 1
        return num_agreeing is None

    def judge(self) -> bool:
        """Whether all agrees as far as the number format allows."""
        same_inputs = self.images > 0 and self.crops_equal == self.images and self.prompts_equal == self.queries
        if self.dtype != "float32":
            return (
                same_inputs
                and self.max_abs_embedding <= BFLOAT16_EMBEDDING_TOLERANCE
                and self.max_abs_first_logits <= BFLOAT16_LOGIT_TOLERANCE
            )
        return (
            same_inputs
            and self.max_abs_embedding <= FLOAT32_TOLERANCE
            and self.max_abs_first_logits <= FLOAT32_TOLERANCE
            and (self.queries_equal, self.captions_equal) == (self.queries, self.captions)
            and self.reasoning_equal == self.reasoning
            and self.max_abs_box is not None
            and self.max_abs_box <= REGION_TOLERANCE
            and self.max_abs_point is not None
            and self.max_abs_point <= REGION_TOLERANCE
        )


class Verifier:
    """One golden folder and the engine that answers it."""

    def __init__(self, folder: Path, num_slots: int, device: str, dtype: str) -> None:
        self.folder = folder
        self.expected: dict[str, Any] = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
        for image in self.expected["images"]:
            for section in ("query", "reasoning", "detect", "point"):
                image[section] = image.get(section) or []
            image["caption"] = image.get("caption") or {}
        self.tensors = load_file(folder / "expected.safetensors")
        checkpoint = load_checkpoint(str(folder), device=device, dtype=dtype)
        self.engine = Engine(checkpoint, num_slots, context_len=checkpoint.config.text.max_context)
        self.report = Report(dtype=checkpoint.dtype_name)

    def run(self, print_row: Callable[[str], None]) -> Report:
        images, report = self.expected["images"], self.report
        tasks = [self._tasks(image) for image in images]
        pixels = [np.asarray(Image.open(self.folder / image["file"]).convert("RGB")) for image in images]
        for index, image_tasks in enumerate(tasks):
            self.engine.submit(index, pixels[index], image_tasks, has_trace=True)
        answers: dict[int, tuple[Answer, ...]] = {}
        while self.engine.num_in_flight:
            for done in self.engine.step():
                if done.error:
                    raise done.error
                assert isinstance(done.key, int)
                answers[done.key] = done.answers
        print_row(f"{'image':28} tiling crops  embedding  logits    query caption reasoning  box      point")
        for index, image in enumerate(images):
            print_row(self._compare(index, image, pixels[index], list(answers[index])))
        report.ok = report.judge()
        return report

    def _tasks(self, image: dict[str, Any]) -> list[Task]:
        """In the order in which _compare takes the answers."""
        max_tokens = dict.fromkeys(("query", "caption", "reasoning"), 1) | self.expected["max_tokens"]
        max_objects = self.expected.get("max_objects", DEFAULT_MAX_OBJECTS)
        tasks: list[Task] = [
            *(Query(q["question"], max_tokens=max_tokens["query"]) for q in image["query"]),
            *(Caption(length, max_tokens=max_tokens["caption"]) for length in image["caption"]),
            *(Query(r["question"], reasoning=True, max_tokens=max_tokens["reasoning"]) for r in image["reasoning"]),
            *(Detect(d["object"], max_objects) for d in image["detect"]),
            *(Point(p["object"], max_objects) for p in image["point"]),
        ]
        return tasks or [Query(max_tokens=1)]  # for the embedding

    def _compare(self, index: int, image: dict[str, Any], pixels: np.ndarray, answers: list[Answer]) -> str:
        report, rest = self.report, iter(answers)
        has_equal_crops = self._crops_equal(image, pixels)
        report.images, report.crops_equal = report.images + 1, report.crops_equal + has_equal_crops
        embedding = self._embedding_error(index, answers[0])
        logits, num_equal = 0.0, {"query": 0, "caption": 0, "reasoning": 0}
        for k, query in enumerate(image["query"]):
            answer = next(rest)
            assert answer.trace
            logits = max(logits, _max_abs(answer.trace.first_logits, self.tensors[f"{index}.query{k}.first_logits"]))
            report.prompts_equal += list(answer.prompt_ids) == query["prompt_ids"]
            num_equal["query"] += report.compare_ids(answer.answer_ids, query["answer_ids"])
        for caption in image["caption"].values():
            num_equal["caption"] += report.compare_ids(next(rest).answer_ids, caption["answer_ids"])
        for reasoned in image["reasoning"]:
            answer = next(rest)
            thoughts_equal = report.compare_ids(answer.reasoning_ids, reasoned["reasoning_ids"])
            num_equal["reasoning"] += report.compare_ids(answer.answer_ids, reasoned["answer_ids"]) and thoughts_equal
        box = _worst(_objects_error(next(rest).boxes, d["objects"]) for d in image["detect"])
        point = _worst(_objects_error(next(rest).points, p["points"]) for p in image["point"])

        report.max_abs_embedding = max(report.max_abs_embedding, embedding)
        report.max_abs_first_logits = max(report.max_abs_first_logits, logits)
        report.max_abs_box = _worst([report.max_abs_box, box])
        report.max_abs_point = _worst([report.max_abs_point, point])
        report.queries += len(image["query"])
        report.queries_equal += num_equal["query"]
        report.captions += len(image["caption"])
        report.captions_equal += num_equal["caption"]
        report.reasoning += len(image["reasoning"])
        report.reasoning_equal += num_equal["reasoning"]
        report.detect += len(image["detect"])
        report.points += len(image["point"])
        shares = [f"{num_equal[kind]}/{len(image[kind])}" for kind in ("query", "caption", "reasoning")]
        return (
            f"{image['file']:28} {image['tiling']!s:6} {'equal' if has_equal_crops else 'DIFFER':6} {embedding:.2e}  "
            f"{logits:.2e}  {shares[0]:5} {shares[1]:7} {shares[2]:9}  {_shown(box):8} {_shown(point)}"
        )

    def _crops_equal(self, image: dict[str, Any], pixels: np.ndarray) -> bool:
        crops = make_crops(pixels, self.engine.config.vision)
        # A (1, 1) tiling is one crop here and two equal ones in the reference.
        both = np.concatenate([crops.pixels, crops.pixels]) if crops.tiling == (1, 1) else crops.pixels
        digest = hashlib.sha256(np.ascontiguousarray(both).tobytes()).hexdigest()
        is_same_shape = list(crops.tiling) == image["tiling"] and len(both) == image["n_crops"]
        return is_same_shape and digest == image["crops_sha256_nhwc_uint8"]

    def _embedding_error(self, index: int, answer: Answer) -> float:
        assert answer.trace
        expected = self.tensors[f"{index}.image_embeddings"]
        return _max_abs(answer.trace.image_tokens[:: self.expected["embedding_stride"]], expected)


def _max_abs(got: Tensor, expected: Tensor) -> float:
    if got.shape != expected.shape or got.isnan().any():  # max() would lose a NaN
        return math.inf
    return (got - expected.float()).abs().max().item()


def _objects_error(got: Sequence[Box | Spot], expected: Sequence[dict[str, float]]) -> float | None:
    if len(got) != len(expected):
        return None
    pairs = [(value, b[name]) for a, b in zip(got, expected, strict=True) for name, value in asdict(a).items()]
    return max((abs(a - b) for a, b in pairs), default=0.0)


def _worst(errors: Iterable[float | None]) -> float | None:
    """The largest error; None, a mismatch of counts, is worse than any."""
    listed = list(errors)
    return None if None in listed else max((e for e in listed if e is not None), default=0.0)


def _shown(error: float | None) -> str:
    return "counts!" if error is None else f"{error:.1e}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pipeline.moondream.verify", description=__doc__)
    parser.add_argument("folder", type=Path, help="a checkpoint folder with expected.json and expected.safetensors")
    parser.add_argument("--slots", type=int, default=1, help="sequences in flight (default: 1)")
    parser.add_argument("--device", default="cpu", help="auto, cuda, mps or cpu (default: cpu)")
    parser.add_argument("--dtype", default="float32", help="float32 or bfloat16 (default: float32)")
    args = parser.parse_args(arguments)
    if args.slots < 1:
        parser.error("--slots must be at least 1")
    try:
        report = Verifier(args.folder, args.slots, args.device, args.dtype).run(print)
    except (DescriberError, SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
        print(f"verify: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    row = {name: None if value == math.inf else value for name, value in asdict(report).items()}  # JSON has no infinity
    print(json.dumps({**row, "slots": args.slots}))
    return 0 if report.ok else 1


if __name__ == "__main__":
    sys.exit(main())
