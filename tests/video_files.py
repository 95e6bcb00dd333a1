"""Video files made for a test, with PyAV. Frame i is grey level 3 * i, so a test can say which frame arrived."""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.stream import VideoStream

from pipeline.sampling import Frame


def write_video(
    path: Path,
    size: tuple[int, int] = (64, 48),
    codec: str = "mjpeg",
    pix_fmt: str = "yuvj420p",
    *,
    fps: Fraction | int = 25,
    num_frames: int = 3,
    times_ms: Sequence[int] | None = None,
    options: dict[str, str] | None = None,
    tags: Mapping[str, object] | None = None,
) -> Path:
    """Write num_frames at a constant rate, or frames at times_ms. `tags` are attributes of the codec, as color_trc."""
    width, height = size
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps, options=options or {})
        assert isinstance(stream, VideoStream)
        stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
        for name, value in (tags or {}).items():
            setattr(stream.codec_context, name, value)
        if times_ms is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for index in range(num_frames if times_ms is None else len(times_ms)):
            picture = av.VideoFrame.from_ndarray(np.full((height, width, 3), 3 * index % 256, np.uint8))
            picture.pts = index if times_ms is None else times_ms[index]
            picture.time_base = 1 / Fraction(fps) if times_ms is None else Fraction(1, 1000)
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    return path


def write_with_sound(path: Path, num_frames: int, sound_s: float) -> Path:
    """Frames at 25 per second, as write_video's, and silence that may be longer."""
    with av.open(str(path), "w") as container:
        video, sound = container.add_stream("libx264", rate=25), container.add_stream("aac", rate=48000)
        assert isinstance(video, VideoStream)
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        for pts in range(max(num_frames, round(25 * sound_s))):
            if pts < num_frames:
                picture = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 3 * pts % 256, np.uint8))
                picture.pts = pts
                container.mux(video.encode(picture))
            if pts < 25 * sound_s:
                samples = av.AudioFrame.from_ndarray(np.zeros((1, 1920), np.float32), format="fltp", layout="mono")
                samples.pts, samples.sample_rate = 1920 * pts, 48000
                container.mux(sound.encode(samples))
        container.mux(video.encode(None))
        container.mux(sound.encode(None))
    return path


def index_of(frame: Frame) -> int:
    """Which frame of write_video this is."""
    return round(frame.image.mean() / 3)
