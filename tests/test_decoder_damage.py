"""What comes of damaged files, and of those that are no videos, all through the real process.

Run: pytest tests/test_decoder_damage.py
"""

from typing import cast

import av
import av.logging as av_logging
import numpy as np
import pytest
from av.container import InputContainer
from av.stream import Disposition
from video_files import write_video, write_with_sound

from pipeline import frames
from pipeline.decoder import _decode, decode_video
from pipeline.errors import VideoNotFound, VideoTooLarge, VideoUnreadable
from pipeline.frames import SamplingNotes, probe, sample_frames
from pipeline.sampling import DecodeLimits


@pytest.mark.parametrize("name", ["corrupt_mid.mp4", "zeros_mid.mp4", "interlaced.mp4", "cut.avi"])
def test_frames_are_never_uninitialised_memory(odd, tmp_path, monkeypatch, name):
    """The C library fills new memory with another byte each time: the pictures, damaged or not, stay the same."""
    path = odd / name
    if name == "cut.avi":
        path = write_video(tmp_path / name, (640, 480), fps=5)
        path.write_bytes(path.read_bytes()[: path.stat().st_size * 19 // 20])  # in the last picture
    pictures = []
    for filling in ("17", "170"):
        monkeypatch.setitem(frames.FEW_THREADS, "MALLOC_PERTURB_", filling)
        pictures.append([frame.image for frame in sample_frames(path, 5)])

    assert len(pictures[0]) == len(pictures[1]) > 0
    assert all(np.array_equal(*pair) for pair in zip(*pictures, strict=True))


def test_the_gap_of_a_damaged_packet_is_noted(odd):
    notes = SamplingNotes()
    list(sample_frames(odd / "corrupt_mid.mp4", 1, notes=notes))

    assert notes.warnings == ["Damaged: nothing decodes between 2.960 s and 3.200 s."]


def test_an_early_end_is_noted(odd):
    notes = SamplingNotes()
    list(sample_frames(odd / "trunc_faststart.mp4", 1, notes=notes))

    assert notes.warnings == ["The last frame is at 5.240 s of 10.000 s: the end may be missing."]


@pytest.mark.parametrize("name", ["gap.mp4", "lowfps.mp4", "delay2s.mp4", "pipe_nodur.webm", "elst_trim.mp4"])
def test_whole_files_give_no_warning(odd, name):
    notes = SamplingNotes()
    list(sample_frames(odd / name, 1, notes=notes))

    assert (notes.warnings, notes.is_truncated) == ([], False)


def test_too_many_bad_packets_in_a_row_end_the_video(odd):
    sampled = sample_frames(odd / "zeros_mid.mp4", 1, limits=DecodeLimits(max_bad_packets=3))

    assert [next(sampled).timestamp_ms for _ in range(3)] == [0, 1000, 2000]
    with pytest.raises(VideoUnreadable, match=r"After 2\.\d+ s, 4 packets in a row .* 3 are .*limit max_bad_packets\)"):
        next(sampled)


def test_bad_packets_that_come_singly_do_not_end_the_video(odd):
    assert len(list(sample_frames(odd / "corrupt_mid.mp4", 1, limits=DecodeLimits(max_bad_packets=6)))) == 10


def test_a_stream_that_turns_up_in_mid_file_changes_nothing(tmp_path):
    """A broadcast whose sound begins later: PyAV's demux looked for the new stream in its old list."""
    silent = write_video(tmp_path / "silent.ts", codec="libx264", pix_fmt="yuv420p", num_frames=25).read_bytes()
    path = write_with_sound(tmp_path / "joined.ts", num_frames=25, sound_s=1)
    path.write_bytes(silent + path.read_bytes())

    assert len(list(sample_frames(path, 25))) == 50


def test_the_last_frame_before_an_error_is_not_lost(tmp_path):
    """A frame is held back until the next one is known, and was forgotten when there was an error instead."""
    path = write_video(tmp_path / "damaged.mov", codec="png", pix_fmt="rgb24", num_frames=40)
    first, *others = path.read_bytes().split(b"\x89PNG")
    assert len(others) == 40
    path.write_bytes(first + b"".join((b"\x89PNG" if i < 10 else b"\0\0\0\0") + part for i, part in enumerate(others)))

    sampled, times_ms = sample_frames(path, 25, limits=DecodeLimits(max_bad_packets=20)), []
    with pytest.raises(VideoUnreadable, match=r"After 0\.360 s, 21 packets"):
        times_ms.extend(frame.timestamp_ms for frame in sampled)
    assert times_ms == list(range(0, 400, 40))


def test_frames_that_grow_too_large_are_the_end(tmp_path):
    small = write_video(tmp_path / "a.ts", (64, 48), "libx264", "yuv420p", num_frames=25).read_bytes()
    large = write_video(tmp_path / "b.ts", (640, 480), "libx264", "yuv420p", num_frames=25).read_bytes()
    path = tmp_path / "joined.ts"
    path.write_bytes(small + large)

    sampled, times_ms = sample_frames(path, 25, limits=DecodeLimits(max_pixels=10_000)), []
    with pytest.raises(VideoTooLarge, match="have 640 x 480 pixels; 10,000 in all") as failure:
        times_ms.extend(frame.timestamp_ms for frame in sampled)
    assert times_ms == list(range(0, times_ms[-1] + 1, 40)) and times_ms[-1] >= 840
    assert f"The frames after {times_ms[-1] / 1000:.3f} s" in str(failure.value)


def test_what_follows_under_another_name_is_said_to_be_left_out(tmp_path):
    """Two broadcasts joined, the second with streams of its own."""
    part = write_video(tmp_path / "part.ts", codec="libx264", pix_fmt="yuv420p", num_frames=100).read_bytes()
    renamed = bytearray(part)
    for start in range(0, len(part), 188):
        pid = int.from_bytes(part[start + 1 : start + 3], "big")
        if pid & 0x1FFF == 0x100:
            renamed[start + 1 : start + 3] = (pid & 0xE000 | 0x200).to_bytes(2, "big")
    path, notes = tmp_path / "joined.ts", SamplingNotes()
    path.write_bytes(part + bytes(renamed))

    assert len(list(sample_frames(path, 25, notes=notes))) == 100
    assert any("hold no more of this video" in warning for warning in notes.warnings)


def test_sound_that_goes_on_is_no_missing_end(tmp_path):
    path, notes = write_with_sound(tmp_path / "longer.mp4", num_frames=75, sound_s=12), SamplingNotes()

    assert len(list(sample_frames(path, 1, notes=notes))) == 3
    assert notes.warnings == []


def test_a_demuxer_that_trips_behind_the_last_packet_loses_nothing(odd):
    """PyAV 18.1 reads past the end of a list there, so that it only sometimes trips."""

    class Tripping:
        def __init__(self, container):
            self.container = container

        def __getattr__(self, name):
            return getattr(self.container, name)

        def demux(self, stream):
            yield from self.container.demux(stream)
            raise IndexError("list index out of range")

    with av.open(str(odd / "rot90.mp4")) as container:
        tripping = cast(InputContainer, Tripping(container))
        assert len(list(_decode(tripping, container.streams.video[0]))) == 250


# What is no video


def test_audio_in_a_video_container_is_no_video(odd):
    with pytest.raises(VideoUnreadable, match="audio only"):
        probe(odd / "audio.m4a")


def test_audio_with_a_cover_picture_is_no_video(odd, tmp_path):
    path = tmp_path / "song.mp4"
    with av.open(str(odd / "audio.m4a")) as source, av.open(str(path), "w") as song:
        cover = song.add_stream("mjpeg", rate=25)
        cover.width, cover.height, cover.pix_fmt = 64, 48, "yuvj420p"
        cover.disposition = Disposition.attached_pic
        audio = song.add_stream_from_template(source.streams.audio[0])
        song.mux(cover.encode(av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8))))
        song.mux(cover.encode(None))
        for packet in source.demux(audio=0):
            if packet.dts is not None:
                packet.stream = audio
                song.mux(packet)

    with pytest.raises(VideoUnreadable, match="audio with a cover picture"):
        probe(path)


def test_a_video_cut_before_its_index_is_called_incomplete(odd, tmp_path):
    path = tmp_path / "cut.mp4"
    path.write_bytes((odd / "rot90.mp4").read_bytes()[:50_000])

    with pytest.raises(VideoUnreadable, match=r"^This mp4 file cannot be decoded .* incomplete"):
        probe(path)


def test_an_unknown_codec_is_said(odd, tmp_path):
    path = tmp_path / "unknown.mp4"
    path.write_bytes((odd / "oneframe.mp4").read_bytes().replace(b"avc1", b"zzzz"))

    with pytest.raises(VideoUnreadable, match="cannot decode the video's codec"):
        probe(path)


def test_an_unsafe_codec_is_not_even_tried(tmp_path):
    """FFmpeg would decode a frame of each stream, so as to know them, before we see which codec that is."""
    path = tmp_path / "flic.mov"
    path.write_bytes(write_video(tmp_path / "whole.mov").read_bytes().replace(b"jpeg", b"flic"))

    level = av_logging.get_level()
    av_logging.set_level(av_logging.ERROR)
    try:
        with av_logging.Capture() as logs, pytest.raises(VideoUnreadable, match="cannot decode the video's codec"):
            list(decode_video(str(path), None, DecodeLimits()))
    finally:
        av_logging.set_level(level)
    assert logs and all(name == "flic" and "not on whitelist" in text for _, name, text in logs)


def test_a_video_of_damage_only_is_unreadable(odd, tmp_path):
    data = (odd / "oneframe.mp4").read_bytes()
    start = data.index(b"mdat") + 4
    path = tmp_path / "damaged.mp4"
    path.write_bytes(data[:start] + b"\xff" * 1200 + data[start + 1200 :])

    with pytest.raises(VideoUnreadable, match="No frame of this video decodes"):
        list(sample_frames(path, 1))


def test_a_missing_file_is_not_found(tmp_path):
    with pytest.raises(VideoNotFound, match=r"no file .*gone\.mp4"):
        probe(tmp_path / "gone.mp4")


def test_a_folder_is_no_video(tmp_path):
    with pytest.raises(VideoUnreadable, match="is not a file"):
        next(sample_frames(tmp_path, 1))
