"""A small picture of a frame, for lists, and for players that cannot show the video itself."""

import cv2
import numpy as np
from numpy.typing import NDArray

LONG_SIDE = 480  # px; about 20 KB of JPEG
QUALITY = 80


def thumbnail(image: NDArray[np.uint8]) -> bytes:
    """The JPEG of an image, RGB uint8 (H, W, 3), its long side at most LONG_SIDE."""
    height, width = image.shape[:2]
    scale = min(1.0, LONG_SIDE / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA) if scale < 1 else image
    is_encoded, jpeg = cv2.imencode(".jpg", cv2.cvtColor(small, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, QUALITY])
    assert is_encoded
    return jpeg.tobytes()
