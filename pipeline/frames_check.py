"""Check the sampling of a folder of videos against its expected.json. Run: python -m pipeline.frames DIR

expected.json maps a file name to {"status": "error"}, meaning one of our own errors, or to {"status": "frames"} with
times_ms_1fps and times_ms_5fps (within 1 ms), size [width, height] and mean_rgb_first within tolerance_rgb of the
first frame. at_least_1fps stands for the times where damage leaves the exact frames open.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import InputError
from pipeline.frames import Frame, sample_frames


def check_folder(folder: Path) -> int:
    """Print a line per video and a JSON summary; return the exit code, 0 if every video comes out right."""
    expected = json.loads((folder / "expected.json").read_text())
    wrong = []
    for name, expectation in expected.items():
        finding = check_video(folder / name, expectation)
        print(f"{name}: {finding or 'ok'}", flush=True)
        if finding:
            wrong.append(name)
    print(json.dumps({"files": len(expected), "ok": len(expected) - len(wrong), "wrong": wrong}))
    return 1 if wrong else 0


def check_video(path: Path, expectation: dict[str, Any]) -> str | None:
    """Compare one video with its entry of expected.json; None if all is right, else what is wrong."""
    if not path.is_file():
        return "the file is missing"
    try:
        findings = [_check_rate(path, target_fps, expectation) for target_fps in (1, 5)]
    except InputError as error:
        return None if expectation["status"] == "error" else f"{type(error).__name__}: {error}"
    except Exception as error:  # a crash is a finding too, and the other videos still want checking
        return f"{type(error).__name__}: {error}"
    if expectation["status"] == "error":
        return "frames came out of what is no video"
    return next((finding for finding in findings if finding), None)


def _check_rate(path: Path, target_fps: int, expectation: dict[str, Any]) -> str | None:
    times_ms, first = [], None
    for frame in sample_frames(path, target_fps):
        first = first or frame
        times_ms.append(frame.timestamp_ms)
    expected_ms = expectation.get(f"times_ms_{target_fps}fps")
    if expected_ms is not None and (
        len(times_ms) != len(expected_ms) or any(abs(a - b) > 1 for a, b in zip(times_ms, expected_ms, strict=True))
    ):
        return f"at {target_fps} fps the times are {times_ms}, not {expected_ms}"
    if times_ms != sorted(set(times_ms)):
        return f"at {target_fps} fps the times do not increase: {times_ms}"
    if target_fps == 1 and len(times_ms) < expectation.get("at_least_1fps", 0):
        return f"only {len(times_ms)} frames at 1 fps"
    return _check_picture(first, expectation) if first else None


def _check_picture(first: Frame, expectation: dict[str, Any]) -> str | None:
    height, width, _ = first.image.shape
    if "size" in expectation and [width, height] != expectation["size"]:
        return f"the size is {[width, height]}, not {expectation['size']}"
    if "mean_rgb_first" in expectation:
        mean_rgb = first.image.mean(axis=(0, 1))  # (3,)
        if np.abs(mean_rgb - expectation["mean_rgb_first"]).max() > expectation["tolerance_rgb"]:
            return f"the mean colour is {mean_rgb.round(1).tolist()}, not {expectation['mean_rgb_first']}"
    return None
