"""Fixtures that several test files share."""

from pathlib import Path

import cv2
import numpy as np
import pytest


@pytest.fixture(scope="session")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """75 frames at 25 fps; frame i is grey level 3 * i. MJPG keeps all levels apart, mp4v does not."""
    path = tmp_path_factory.mktemp("video") / "grey.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 25, (64, 48))
    for i in range(75):
        writer.write(np.full((48, 64, 3), 3 * i, np.uint8))
    writer.release()
    return path


@pytest.fixture(scope="session")
def odd() -> Path:
    """The folder of small odd videos and expected.json."""
    return Path(__file__).parent / "data" / "odd"
