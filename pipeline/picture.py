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

BROADCASTS = ("mpegts", "mpeg")
NUM_THREADS = 2  # for each task of FFmpeg and OpenCV; their own choice is one a core, which costs address space
# swscale follows the frame's matrix and range by itself; transfer and primaries it maps only when told to.
HDR_TO_SDR = {"dst_color_trc": ColorTrc.BT709, "dst_color_primaries": ColorPrimaries.BT709}


def deinterlace(before: VideoFrame | None, frame: VideoFrame, after: VideoFrame | None) -> VideoFrame:
    """Deinterlace one frame with bwdif, which looks at its neighbours in time (None at the ends of the video).

    A graph for each sampled frame costs 4 ms in SD; sending every decoded frame through one graph costs more."""
    layout = _layout(frame)
    frames = [near for near in (before, frame, after) if near is not None and _layout(near) == layout]
    graph = Graph()
    graph.threads = NUM_THREADS
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
    width, height = max(1, round(frame.width * _pixel_aspect(stream))), frame.height
    return (height, width) if _quarter_turns(frame) % 2 else (width, height)


def _pixel_aspect(stream: VideoStream) -> Fraction | int:
    if stream.codec_context.name == "h263":
        return 1  # baseline H.263 cannot say "square": it claims 12:11 even where the track header shows square pixels
    if stream.container.format.name in BROADCASTS:  # they change between 4:3 and 16:9
        return stream.codec_context.sample_aspect_ratio or 1
    return stream.sample_aspect_ratio or 1


def is_mirrored(frame: VideoFrame) -> bool:
    """Whether the display matrix turns the picture over before it turns it round, by the rotation of its x axis.

    Ask this of one frame of a video only: PyAV 18.1 then keeps the frame until Python looks for cycles, 12 MB in 4K."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return False
    a, b, _, c, d, *_ = map(int, np.frombuffer(matrix, np.int32))
    return a * d - b * c < 0


def _quarter_turns(frame: VideoFrame) -> int:
    """Counterclockwise quarter turns that put the frame upright."""
    return round(frame.rotation / 90)


def to_rgb(
    frame: VideoFrame, stream: VideoStream, reformatter: VideoReformatter, *, mirrored: bool
) -> NDArray[np.uint8]:
    """Convert to RGB uint8 (H, W, 3), C-contiguous, at the shown size or reduced to MAX_LONG_SIDE.

    Share one reformatter between the frames of a video: each builds its own HDR table, which takes 1.3 s."""
    is_hdr = frame.color_trc in (ColorTrc.SMPTE2084, ColorTrc.ARIB_STD_B67)  # PQ, HLG
    rgb = reformatter.reformat(frame, format="rgb24", threads=NUM_THREADS, **(HDR_TO_SDR if is_hdr else {}))
    pixels = rgb.to_ndarray()  # (H, W, 3)
    upright = np.rot90(pixels[::-1] if mirrored else pixels, _quarter_turns(frame))  # (H, W, 3)
    return np.ascontiguousarray(_resized(upright, *shown_size(frame, stream)), dtype=np.uint8)


def _resized(image: NDArray, width: int, height: int) -> NDArray:
    scale = min(1, MAX_LONG_SIDE / max(width, height))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    if size == (image.shape[1], image.shape[0]):
        return image
    is_smaller = size[0] <= image.shape[1] and size[1] <= image.shape[0]
    try:
        return cv2.resize(image, size, interpolation=cv2.INTER_AREA if is_smaller else cv2.INTER_LINEAR)
    except (cv2.error, SystemError) as error:  # how OpenCV runs out of memory; for RGB it has no other reason
        raise MemoryError from error
