"""The saved results of a device: one file, `<device>.json`, with an entry for each model and number format.

The app reads them for its own setting (pipeline/moondream/capacity.py), by the model's size: a run with random weights
of the real size counts for the real model.
"""

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmark.grid import AnyRow, Row
from pipeline.atomic import write_atomically

DIGITS = 4  # significant


def save(path: Path, device: str, entry: dict[str, Any]) -> None:
    """Put an entry into the file, in place of an older one of the same size and format."""
    key = ("num_parameters", "dtype")
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))["models"] if path.exists() else []
        others = [other for other in saved if any(other[name] != entry[name] for name in key)]
    except (ValueError, KeyError, TypeError) as error:  # hours of measuring shall not end with this
        print(f"{path} was no result of ours ({type(error).__name__}): begun anew", file=sys.stderr)
        others = []
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"device": device, "models": [*others, rounded(entry)]}
    write_atomically(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def slug(name: str) -> str:
    """A model's name as part of a file's."""
    return re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")


def rows_to_json(rows: Sequence[AnyRow]) -> list[dict[str, Any]]:
    return [asdict(row) if isinstance(row, Row) else {**asdict(row), "error": "out of memory"} for row in rows]


def rounded(value: Any) -> Any:
    """Figures with as many digits as mean something."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value
