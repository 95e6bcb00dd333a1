"""Small pictures of frames."""

import cv2
import numpy as np
import pytest

from pipeline.thumbnail import LONG_SIDE, thumbnail


@pytest.mark.parametrize(
    ("size", "expected"),
    [((1080, 1920), (270, 480)), ((1920, 1080), (480, 270)), ((48, 64), (48, 64)), ((1, 4000), (1, 480))],
)
def test_a_large_frame_is_reduced_and_a_small_one_stays(size: tuple[int, int], expected: tuple[int, int]) -> None:
    image = np.zeros((*size, 3), np.uint8)
    image[..., 0] = 200  # red

    shown = cv2.imdecode(np.frombuffer(thumbnail(image), np.uint8), cv2.IMREAD_COLOR)

    assert shown is not None and shown.shape[:2] == expected and max(expected) <= LONG_SIDE
    assert abs(int(shown[0, 0, 2]) - 200) < 8 and shown[0, 0, 0] < 8  # still red: OpenCV's order is BGR
