"""Sampling by time, and what comes of files that are odd, damaged or no videos, all through the real process.

Run: pytest tests/test_decoder.py
"""

import json
import struct
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.video.reformatter import ColorPrimaries, Colorspace, ColorTrc
from video_files import index_of, write_video

from pipeline.errors import InvalidOption, NoFrames
from pipeline.frames import SamplingNotes, probe, sample_frames
from pipeline.frames_check import check_folder, check_video
from pipeline.sampling import Window

LOSSLESS = {"qp": "0", "x265-params": "lossless=1"}
ODD = json.loads((Path(__file__).parent / "data" / "odd" / "expected.json").read_text())


# Sampling


def test_samples_the_frame_at_each_second(video):
    sampled = list(sample_frames(video, target_fps=1))

    assert [frame.timestamp_ms for frame in sampled] == [0, 1000, 2000]
    assert [frame.frame_idx for frame in sampled] == [0, 25, 50]
    assert [index_of(frame) for frame in sampled] == [0, 25, 50]


def test_images_are_contiguous_rgb(video):
    image = next(sample_frames(video, target_fps=1)).image

    assert (image.shape, image.dtype, image.flags.c_contiguous) == ((48, 64, 3), np.uint8, True)


@pytest.mark.parametrize("target_fps", [25, 26, 60, 1e9, 1e300])
def test_a_target_above_the_source_gives_every_frame_once(video, target_fps):
    assert [index_of(frame) for frame in sample_frames(video, target_fps)] == list(range(75))


@pytest.mark.parametrize(
    ("window", "times_ms"),
    [
        ({"start_s": 1}, [1000, 2000]),
        ({"start_s": 0.5}, [520, 1520, 2520]),  # buckets count from start_s: the frames nearest after .5 s
        ({"end_s": 2}, [0, 1000]),
        ({"start_s": 1.04, "end_s": 2.08}, [1040, 2040]),
        ({"start_s": 2.96}, [2960]),
        ({"start_s": 1.02, "end_s": 1.05}, [1040]),
    ],
)
def test_the_window_includes_its_start_and_excludes_its_end(video, window, times_ms):
    assert [frame.timestamp_ms for frame in sample_frames(video, 1, **window)] == times_ms


def test_jitter_does_not_open_a_bucket_at_the_end_of_the_window(odd):
    """jitter.mp4 has a frame at 4.997 s: within reach of the bucket at 5 s, which is outside."""
    assert [frame.timestamp_ms for frame in sample_frames(odd / "jitter.mp4", 1, start_s=3, end_s=5)] == [3005, 4001]


def test_max_frames_takes_the_first_and_says_what_it_cut(video):
    notes = SamplingNotes()

    assert len(list(sample_frames(video, 1, max_frames=2, notes=notes))) == 2
    assert notes.is_truncated
    assert notes.warnings == ["Stopped after 2 frames: the next one, at 2.000 s, is left out."]


def test_max_frames_that_suffices_cuts_nothing(video):
    notes = SamplingNotes()

    assert len(list(sample_frames(video, 1, max_frames=3, notes=notes))) == 3
    assert (notes.warnings, notes.is_truncated) == ([], False)


def test_a_window_past_the_end_has_no_frames(video):
    with pytest.raises(NoFrames, match=r"^No frames extracted from video: .* 20\.000 s and the end.* at 2\.960 s"):
        list(sample_frames(video, 1, start_s=20))


def test_any_number_is_a_rate(video):
    numbers: list[Any] = [1, Fraction(1), np.float32(1), np.int64(1)]
    for one in numbers:
        assert len(list(sample_frames(video, one))) == 3


def test_bad_options_are_refused_at_the_call(video):
    with pytest.raises(InvalidOption, match="target_fps"):
        sample_frames(video, 0)


@pytest.mark.parametrize("name", ["fast.mov", "fast.mkv", "fast.avi"])
def test_240_frames_per_second(tmp_path, name):
    path = write_video(tmp_path / name, fps=240, num_frames=80)
    sampled = list(sample_frames(path, 24))

    assert [frame.timestamp_ms for frame in sampled] == [round(i / 24 * 1000) for i in range(8)]
    assert [index_of(frame) for frame in sampled] == [0, 10, 20, 30, 40, 50, 60, 70]
    assert len(list(sample_frames(path, 240))) == 80


def test_thousands_of_frames_per_second(tmp_path):
    """Several share a millisecond."""
    path = write_video(tmp_path / "bullet.mov", fps=4000, num_frames=40)
    sampled = list(sample_frames(path, 4000))

    assert [index_of(frame) for frame in sampled] == list(range(40))
    assert sampled[-1].timestamp_ms == 10


def test_a_frame_every_five_seconds(tmp_path):
    path = write_video(tmp_path / "slow.mp4", codec="libx264", pix_fmt="yuv420p", fps=Fraction(1, 5), num_frames=6)

    assert [frame.timestamp_ms for frame in sample_frames(path, 1)] == [0, 5000, 10000, 15000, 20000, 25000]
    assert probe(path).estimate_samples(Window(1)) == 6


@pytest.mark.parametrize("name", ["b.mp4", "b.mkv", "b.ts"])
def test_b_frames_come_in_the_order_of_presentation(tmp_path, name):
    options = {"bf": "3", "b_strategy": "0", "g": "20", **LOSSLESS}
    path = write_video(tmp_path / name, codec="libx264", pix_fmt="yuv420p", num_frames=50, options=options)
    sampled = list(sample_frames(path, 5))

    assert [index_of(frame) for frame in sampled] == list(range(0, 50, 5))
    assert [frame.frame_idx for frame in sampled] == list(range(0, 50, 5))


@pytest.mark.parametrize("name", ["vfr.mp4", "vfr.mkv"])
def test_a_variable_frame_rate_keeps_true_times(tmp_path, name):
    times_ms = [0, 40, 90, 1010, 1500, 1520, 4000, 4040, 9000]
    path = write_video(tmp_path / name, codec="libx264", pix_fmt="yuv420p", times_ms=times_ms, options=LOSSLESS)
    sampled = list(sample_frames(path, 1))

    assert [frame.timestamp_ms for frame in sampled] == [0, 1010, 4000, 9000]
    assert [index_of(frame) for frame in sampled] == [0, 3, 6, 8]


def test_a_header_that_lies_about_the_rate_is_not_believed(tmp_path):
    """The frames stand at 25 per second; Matroska's header claims 1000."""
    path = write_video(tmp_path / "lie.mkv", codec="libx264", pix_fmt="yuv420p", times_ms=range(0, 2000, 40))
    default_duration = bytes.fromhex("23e383") + b"\x84" + (40_000_000).to_bytes(4, "big")
    data = path.read_bytes()
    assert data.count(default_duration) == 1
    path.write_bytes(data.replace(default_duration, default_duration[:4] + (1_000_000).to_bytes(4, "big")))

    assert [frame.timestamp_ms for frame in sample_frames(path, 1)] == [0, 1000]


# What a player shows


@pytest.mark.parametrize("name", ODD)
def test_odd_file(odd, name):
    assert check_video(odd / name, ODD[name]) is None


def test_rotation_turns_the_picture_upright(odd):
    """rot90.mp4 and elst_trim.mp4 hold the same pictures; the second begins 83 frames later and is not turned."""
    upright = next(sample_frames(odd / "rot90.mp4", 1, start_s=3.32)).image
    lying = next(sample_frames(odd / "elst_trim.mp4", 1)).image

    assert np.array_equal(upright, np.rot90(lying))


@pytest.mark.parametrize("quarter_turns", [1, 2, 3])
def test_all_turns_put_the_picture_upright(odd, tmp_path, quarter_turns):
    """rot90.mp4 is turned by the matrix in its track header; so are these."""
    cos, sin = {1: (0, 1), 2: (-1, 0), 3: (0, -1)}[quarter_turns]

    def matrix(cos: int, sin: int) -> bytes:
        return struct.pack(">9i", cos << 16, sin << 16, 0, -sin << 16, cos << 16, 0, 0, 0, 1 << 30)

    data = (odd / "elst_trim.mp4").read_bytes()
    assert data.count(matrix(1, 0)) >= 1
    path = tmp_path / "turned.mp4"
    place = data.index(matrix(1, 0), data.index(b"tkhd"))
    path.write_bytes(data[:place] + matrix(cos, sin) + data[place + 36 :])
    lying = next(sample_frames(odd / "elst_trim.mp4", 1)).image

    assert np.array_equal(next(sample_frames(path, 1)).image, np.rot90(lying, -quarter_turns))


@pytest.mark.parametrize(
    ("matrix", "turned"),
    [
        ((-1, 0, 0, 1), lambda image: image[:, ::-1]),
        ((1, 0, 0, -1), lambda image: image[::-1]),
        ((0, 1, 1, 0), lambda image: image.transpose(1, 0, 2)),
        ((0, -1, -1, 0), lambda image: image.transpose(1, 0, 2)[::-1, ::-1]),
    ],
)
def test_a_mirrored_picture_is_mirrored(odd, tmp_path, matrix, turned):
    """It was turned by half a circle, or not at all."""
    a, b, c, d = (number << 16 for number in matrix)
    data = (odd / "elst_trim.mp4").read_bytes()
    unity = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    place = data.index(unity, data.index(b"tkhd"))
    path = tmp_path / "mirrored.mp4"
    path.write_bytes(data[:place] + struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30) + data[place + 36 :])
    plain = next(sample_frames(odd / "elst_trim.mp4", 1)).image

    assert np.array_equal(next(sample_frames(path, 1)).image, turned(plain))


def test_a_broadcast_changes_its_shape(tmp_path):
    """The shape of its pixels was that of the first part to the end."""
    parts = []
    for name, aspect in (("narrow.ts", Fraction(1)), ("wide.ts", Fraction(4, 3))):
        tags = {"sample_aspect_ratio": aspect}
        parts.append(
            write_video(tmp_path / name, (96, 72), "mpeg2video", "yuv420p", num_frames=50, tags=tags).read_bytes()
        )
    path = tmp_path / "joined.ts"
    path.write_bytes(b"".join(parts))

    widths = [frame.image.shape[1] for frame in sample_frames(path, 1)]
    assert (widths[0], widths[-1]) == (96, 128)


@pytest.mark.parametrize(("codec", "pix_fmt"), [("libx265", "yuv420p10le"), ("libx264", "yuv422p10le")])
def test_ten_bits_show_the_same_grey_as_eight(tmp_path, codec, pix_fmt):
    path = write_video(tmp_path / "deep.mp4", codec=codec, pix_fmt=pix_fmt, num_frames=76, options=LOSSLESS)
    greys = [frame.image.mean() for frame in sample_frames(path, 5)]

    assert np.abs(np.array(greys) - 3 * np.arange(0, 76, 5)).max() <= 2


@pytest.mark.parametrize(("trc", "code"), [(ColorTrc.SMPTE2084, 0.58), (ColorTrc.ARIB_STD_B67, 0.75)])
def test_hdr_white_is_white(tmp_path, trc, code):
    """White is 58% of PQ's code values and 75% of HLG's (BT.2408): shown as they are, they would be grey."""
    tags = {"color_trc": trc, "color_primaries": ColorPrimaries.BT2020, "colorspace": Colorspace.BT2020}
    num_frames = 1 + round(code * 255 / 3)  # the last of which has this grey
    path = write_video(tmp_path / "hdr.mkv", codec="libx265", pix_fmt="yuv420p10le", num_frames=num_frames, tags=tags)
    *_, last = sample_frames(path, 25)

    assert last.image.mean() > 240


def test_interlaced_frames_lose_their_combs(odd):
    def combing(image: np.ndarray) -> float:
        rows = image.astype(float)
        return float(np.abs(rows[1:-1] - (rows[:-2] + rows[2:]) / 2).mean())

    with av.open(str(odd / "interlaced.mp4")) as container:
        combed = next(container.decode(video=0)).to_ndarray(format="rgb24")

    assert combing(next(sample_frames(odd / "interlaced.mp4", 1)).image) < 0.5 * combing(combed)


def test_large_frames_are_reduced_to_1920(tmp_path):
    path = write_video(tmp_path / "wide.avi", (2400, 160))

    assert next(sample_frames(path, 1)).image.shape == (128, 1920, 3)
    assert (probe(path).width, probe(path).height) == (2400, 160)


def test_h263_has_square_pixels(tmp_path):
    """H.263 claims 12:11 in every file, since its baseline has no word for square."""
    path = write_video(tmp_path / "phone.3gp", (352, 288), codec="h263", pix_fmt="yuv420p")

    assert next(sample_frames(path, 1)).image.shape == (288, 352, 3)


def test_a_clock_that_starts_again_goes_on_counting(tmp_path):
    path = write_video(tmp_path / "joined.ts", (64, 48), codec="mpeg2video", pix_fmt="yuv420p")
    path.write_bytes(path.read_bytes() * 2)

    assert [frame.timestamp_ms for frame in sample_frames(path, 25)] == [0, 40, 80, 120, 160, 200]


# Probe


def test_probe_reads_what_the_file_says(video):
    info = probe(video)

    assert (info.container, info.codec, info.width, info.height) == ("avi", "mjpeg", 64, 48)
    assert (info.duration_s, info.average_fps, info.nominal_fps, info.num_frames_estimate) == (3.0, 25, 25, 75)
    assert (info.start_s, info.has_audio) == (0, False)


def test_probe_sees_the_video_as_shown(odd):
    assert (probe(odd / "rot90.mp4").width, probe(odd / "rot90.mp4").height) == (240, 320)
    assert (probe(odd / "sar.mp4").width, probe(odd / "sar.mp4").height) == (512, 288)
    assert (probe(odd / "delay2s.mp4").start_s, probe(odd / "delay2s.mp4").has_audio) == (2, True)
    assert probe(odd / "av1.mp4").codec == "av1"


def test_probe_knows_no_end_where_nobody_wrote_it(odd):
    info = probe(odd / "pipe_nodur.webm")

    assert (info.duration_s, info.num_frames_estimate, info.estimate_samples(Window(1))) == (None, None, None)
    assert info.estimate_samples(Window(1, end_s=5)) == 5


@pytest.mark.parametrize(
    ("target_fps", "options"),
    [
        (1, {}),
        (5, {"start_s": 0.5}),
        (5, {"start_s": 0.5, "end_s": 1.7}),
        (7, {"max_frames": 4}),
        (100, {}),
        (100, {"start_s": 1, "end_s": 2}),
        (1, {"start_s": 2.96}),
    ],
)
def test_the_estimate_is_exact_for_a_constant_rate(video, target_fps, options):
    expected = len(list(sample_frames(video, target_fps, **options)))

    assert probe(video).estimate_samples(Window(target_fps, **options)) == expected


def test_the_estimate_knows_a_late_start(odd):
    assert probe(odd / "delay2s.mp4").estimate_samples(Window(1)) == 10
    assert probe(odd / "delay2s.mp4").estimate_samples(Window(1, end_s=1)) == 0


def test_a_title_in_another_encoding_is_no_obstacle(odd, tmp_path):
    path = tmp_path / "titled.mp4"
    data = (odd / "oneframe.mp4").read_bytes()
    assert b"Lavf" in data
    path.write_bytes(data.replace(b"Lavf", b"\xe9\xe8av"))

    assert len(list(sample_frames(path, 1))) == 1


# The check of a folder


def test_the_folder_check_names_what_is_wrong(video, tmp_path, capsys):
    (tmp_path / "good.avi").write_bytes(video.read_bytes())
    (tmp_path / "bad.avi").write_bytes(video.read_bytes())
    good = {"status": "frames", "times_ms_1fps": [0, 1000, 2000], "size": [64, 48]}
    expected = {"good.avi": good, "bad.avi": {**good, "size": [48, 64]}, "gone.avi": {"status": "error"}}
    (tmp_path / "expected.json").write_text(json.dumps(expected))

    assert check_folder(tmp_path) == 1
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {
        "files": 3,
        "ok": 1,
        "wrong": ["bad.avi", "gone.avi"],
    }
