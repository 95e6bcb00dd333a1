"""Turn a decoded frame into the picture a player shows: progressive, upright, with square pixels, in SDR colours.

Knows nothing of files and times. Test: pytest tests/test_decoder.py
"""

from fractions import Fraction

import cv2
import numpy as np
from av.filter import Graph
from av.video.frame import VideoFrame
from av.video.reformatter import ColorPrimaries, ColorTrc, VideoReformatter
from av.video.stream import VideoStream
from numpy.typing import NDArray

from pipeline.sampling import MAX_LONG_SIDE

NUM_THREADS = 2  # of FFmpeg, for each of its tasks; its own choice is one a core, which costs address space
# swscale follows the frame's matrix and range by itself; transfer and primaries it maps only when told to.
HDR_TO_SDR = {"dst_color_trc": ColorTrc.BT709, "dst_color_primaries": ColorPrimaries.BT709}


def deinterlace(before: VideoFrame | None, frame: VideoFrame, after: VideoFrame | None) -> VideoFrame:
    """Deinterlace one frame with bwdif, which looks at its neighbours in time (None at the ends of the video).

    A graph for each sampled frame costs 4 ms in SD; sending every decoded frame through one graph costs more."""
    layout = _layout(frame)
    frames = [near for near in (before, frame, after) if near is not None and _layout(near) == layout]
    graph = Graph()
    source = graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=Fraction(1, 1000))
    bwdif = graph.add("bwdif", "mode=send_frame")  # one frame out for each frame in
    graph.link_nodes(source, bwdif, graph.add("buffersink")).configure()
    for near in frames:
        graph.vpush(near)
    graph.vpush(None)
    deinterlaced = [graph.vpull() for _ in frames]
    return deinterlaced[frames.index(frame)]


def _layout(frame: VideoFrame) -> tuple[int, int, str]:
    return frame.width, frame.height, frame.format.name


def shown_size(frame: VideoFrame, stream: VideoStream) -> tuple[int, int]:
    """The (width, height) in px at which a player shows the frame, before any reduction to MAX_LONG_SIDE."""
    # Baseline H.263 cannot say "square": it claims 12:11 even where the file's track header shows square pixels.
    pixel_aspect = 1 if stream.codec_context.name == "h263" else stream.sample_aspect_ratio or 1
    width, height = max(1, round(frame.width * pixel_aspect)), frame.height
    return (height, width) if _quarter_turns(frame) % 2 else (width, height)


def _quarter_turns(frame: VideoFrame) -> int:
    """Counterclockwise quarter turns that put the frame upright."""
    return round(frame.rotation / 90)


def to_rgb(frame: VideoFrame, stream: VideoStream, reformatter: VideoReformatter) -> NDArray[np.uint8]:
    """Convert to RGB uint8 (H, W, 3), C-contiguous, at the shown size or reduced to MAX_LONG_SIDE.

    Share one reformatter between the frames of a video: each builds its own HDR table, which takes 1.3 s."""
    is_hdr = frame.color_trc in (ColorTrc.SMPTE2084, ColorTrc.ARIB_STD_B67)  # PQ, HLG
    rgb = reformatter.reformat(frame, format="rgb24", threads=NUM_THREADS, **(HDR_TO_SDR if is_hdr else {}))
    pixels = rgb.to_ndarray()  # (H, W, 3)
    upright = np.rot90(pixels, _quarter_turns(frame))  # (H, W, 3)
    return np.ascontiguousarray(_resized(upright, *shown_size(frame, stream)), dtype=np.uint8)


def _resized(image: NDArray, width: int, height: int) -> NDArray:
    scale = min(1, MAX_LONG_SIDE / max(width, height))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    if size == (image.shape[1], image.shape[0]):
        return image
    is_smaller = size[0] <= image.shape[1] and size[1] <= image.shape[0]
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA if is_smaller else cv2.INTER_LINEAR)
