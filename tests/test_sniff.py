"""What files are, by their first bytes."""

import re

import pytest

from pipeline.errors import VideoUnreadable
from pipeline.sniff import CONTAINERS, HEAD_BYTES, sniff

HEADS = {
    "mp4": [
        b"\0\0\0\x18ftypisom",
        b"\0\0\0\x14ftypqt  ",
        b"\0\0\0\x08wide\0\0\0\0mdat",
        b"\0\0\1\0moov",
        b"\0\0\0\1mdat",
        b"\0\0\0\x08free",
    ],
    "webm": [b"\x1a\x45\xdf\xa3\x9f\x42\x86\x81\x01\x42\x82\x84webm"],
    "matroska": [b"\x1a\x45\xdf\xa3\xa3\x42\x82\x88matroska"],
    "avi": [b"RIFF\0\0\0\0AVI LIST"],
    "mpegts": [
        (b"G" + bytes(187)) * 3,
        bytes(4) + (b"G" + bytes(191)) * 3,
        b"\xff" * 77 + (b"G" + bytes(187)) * 5,
    ],
    "flv": [b"FLV\x01\x05"],
    "asf": [b"\x30\x26\xb2\x75\x8e\x66\xcf\x11"],
    "ogg": [b"OggS\0\x02"],
    "mpeg": [b"\0\0\1\xba\x44"],
    "gif": [b"GIF89a", b"GIF87a"],
    "ivf": [b"DKIF\0\0"],
}
NOT_VIDEOS = [
    (b"", "empty"),
    (b"<!DOCTYPE html><title>Watch</title>", "a web page"),
    (b"\n <html>", "a web page"),
    (b"\xef\xbb\xbf<html>", "a web page"),
    (b'{"error": "not found"}', "text"),
    (b"\xff\xd8\xff\xe0", "a still picture"),
    (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "a still picture"),
    (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + bytes(17) + b"\0\0\0\x08acTL", "an animated picture in WebP or PNG"),
    (b"RIFF\0\0\0\0WEBPVP8X" + bytes(40) + b"ALPH", "a still picture"),
    (b"RIFF\0\0\0\0WEBPVP8X\x0a\0\0\0\x02" + bytes(9) + b"ANIM", "an animated picture in WebP or PNG"),
    (b"\0\0\0\x18ftypheic", "a still picture"),
    (b"\0\0\0\x18ftypavif", "a still picture"),
    (b"ID3\x04", "audio only"),
    (b"\xff\xfb\x90\x64", "audio only"),
    (b"fLaC\0\0", "audio only"),
    (b"RIFF\0\0\0\0WAVEfmt ", "audio only"),
    (b"#EXTM3U\nhttp://127.0.0.1/a.ts", "a playlist"),
    (b"\xef\xbb\xbf#EXTM3U\n", "a playlist"),
    (b"ffconcat version 1.0\nfile /etc/passwd", "a playlist"),
    (b"v=0\r\no=- 0 0 IN IP4 127.0.0.1", "a playlist"),
    (b"[playlist]\nFile1=a.mp4", "a playlist"),
    (b"[Reference]\nRef1=http://127.0.0.1/", "a playlist"),
    (b"rtsp://127.0.0.1/stream\n", "a playlist"),
    (b'<?xml version="1.0"?>\n<!-- made by x -->\n<MPD xmlns="urn:mpeg:dash">', "a playlist"),
    (b'<ASX version="3.0">', "a playlist"),
    (b"<?xml version='1.0'?><playlist version='1'>", "a playlist"),
    (b"PK\x03\x04\x14\0", "an archive"),
    (b"\x1f\x8b\x08\0", "an archive"),
    (b"%PDF-1.7", "a PDF document"),
    (b"\0\0\0\x01\x67\x64", "a raw stream without timestamps"),
    (b"\0\0\x01\xb3\x14", "a raw stream without timestamps"),
    (b"\x1f\x07\0\x3f", "a raw stream without timestamps"),
]


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_video_is_called_by_its_container(container: str) -> None:
    assert [sniff(head.ljust(HEAD_BYTES, b"\0")) for head in HEADS[container]] == [container] * len(HEADS[container])


@pytest.mark.parametrize(("content", "what"), NOT_VIDEOS)
def test_a_file_that_is_no_video_is_called_by_its_name(content: bytes, what: str) -> None:
    with pytest.raises(VideoUnreadable, match=f"^This file is {re.escape(what)}, not a video. [A-Z]"):
        sniff(content)


def test_unknown_bytes_are_no_video() -> None:
    with pytest.raises(VideoUnreadable, match="no video we know"):
        sniff(bytes(range(128, 192)))
