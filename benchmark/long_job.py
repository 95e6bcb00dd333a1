"""A completed job of many frames, written through the store's own classes as the worker leaves it, without a model.

Its video is small (160 x 90 px, 5 frames per second), as decoding is not what is measured with it; its pictures and
texts have the size of real ones. No two neighbours say the same, so the page has as many rows as there are frames, and
every second text holds SOUGHT. Test: pytest tests/test_benchmark_page.py
"""

import math
import random
from contextlib import closing
from pathlib import Path

import av
import cv2
import numpy as np
from av.video.stream import VideoStream
from numpy.typing import NDArray

from jobs.job_store import JobStore
from jobs.record import Upload
from jobs.schema import UPLOAD, JobRequest
from pipeline.results import FrameResult
from pipeline.thumbnail import thumbnail

FPS, WIDTH_PX, HEIGHT_PX = 5, 640, 360
VIDEO_WIDTH_PX, VIDEO_HEIGHT_PX = WIDTH_PX // 4, HEIGHT_PX // 4
TURN_S = 40  # in which the camera has panned once around
FRAMES_PER_BATCH = 8
OWNER = "local"  # of all jobs where no keys are set
SOUGHT = "umbrella"
PEOPLE = ("A woman in a red coat", "Two children", "An old man with a dog", "A cyclist", "A group of tourists")
DOING = ("crosses the street", "waits at the kerb", "looks at a shop window", "talks on the phone", "walks past a café")
CARRIED = (f"under a black {SOUGHT}", "with a paper bag in one hand")  # by turns
BESIDE = (
    "The pavement is wet, and the lights of the cars are reflected in it.",
    "In the background there is a row of parked cars, and a bus that is about to leave.",
    "A sign above the door reads “OPEN”.",
    "It is early evening; the windows of the houses on the other side are lit, and a tram comes from the left.",
)


def write_long_job(data_dir: Path, num_frames: int) -> str:
    """Fill a fresh data directory with one completed job. -> its id"""
    wall = painted_wall()
    with closing(JobStore(data_dir)) as store:
        upload = Upload(store.files.incoming / "long", "mp4")
        write_video(upload.path, wall, num_frames)
        request = JobRequest.model_validate({"video_url": f"{UPLOAD}street.mp4", "target_fps": FPS})
        job_id = store.add(request.model_dump(), OWNER, upload)
        assert store.claim(0)
        model = {"id": "demo", "revision": None, "device": "cpu", "dtype": "float32"}
        length = {"duration_s": num_frames / FPS, "average_fps": float(FPS), "num_frames_expected": num_frames}
        store.update(job_id, stage="describing", model=model, **length)
        with store.frames(job_id) as frames:
            for first in range(0, num_frames, FRAMES_PER_BATCH):
                batch = range(first, min(first + FRAMES_PER_BATCH, num_frames))
                for frame_idx in batch:
                    store.files.put_picture(job_id, frame_idx, thumbnail(picture(wall, frame_idx)))
                frames.append([described(frame_idx).to_json(job_id) for frame_idx in batch])
        store.end(job_id, "completed")
    return job_id


def described(frame_idx: int) -> FrameResult:
    """One to three sentences, 40 to 350 characters."""
    rng = random.Random(frame_idx)
    first = f"{rng.choice(PEOPLE)} {rng.choice(DOING)} {CARRIED[frame_idx % 2]}."
    text = " ".join([first, *rng.sample(BESIDE, rng.randrange(len(BESIDE)))])
    return FrameResult(frame_idx, 1000 * frame_idx // FPS, text, "success", None, 81.25, 412.5, 493.75, 48, "stop")


def painted_wall() -> NDArray[np.uint8]:
    """What the camera pans over: as much detail as makes a thumbnail of 20 KB."""
    rng, size_px = np.random.default_rng(0), (WIDTH_PX * 3 // 2, HEIGHT_PX * 3 // 2)
    layers = [rng.integers(0, 255 // 3, (9 * scale, 16 * scale, 3)).astype(np.float32) for scale in (2, 6, 14)]
    return np.sum([cv2.resize(layer, size_px) for layer in layers], axis=0).clip(0, 255).astype(np.uint8)


def picture(wall: NDArray[np.uint8], frame_idx: int) -> NDArray[np.uint8]:
    turn = 2 * math.pi * frame_idx / (TURN_S * FPS)
    x_px, y_px = round((1 + math.cos(turn)) * WIDTH_PX / 4), round((1 + math.sin(turn)) * HEIGHT_PX / 4)
    image = wall[y_px : y_px + HEIGHT_PX, x_px : x_px + WIDTH_PX].copy()
    center = round(WIDTH_PX * (0.5 + 0.4 * math.sin(3 * turn))), HEIGHT_PX // 2
    cv2.circle(image, center, HEIGHT_PX // 8, (220, 60, 60), -1)
    return image


def write_video(path: Path, wall: NDArray[np.uint8], num_frames: int) -> None:
    """H.264 in an MP4 that plays from its first bytes on."""
    with av.open(str(path), "w", format="mp4", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=FPS, options={"preset": "veryfast", "g": str(10 * FPS)})
        assert isinstance(stream, VideoStream)
        stream.width, stream.height, stream.pix_fmt = VIDEO_WIDTH_PX, VIDEO_HEIGHT_PX, "yuv420p"
        for frame_idx in range(num_frames):
            small = cv2.resize(picture(wall, frame_idx), (VIDEO_WIDTH_PX, VIDEO_HEIGHT_PX))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(small.astype(np.uint8))))
        container.mux(stream.encode(None))
