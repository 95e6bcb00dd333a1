"""Tell a video from everything else by its first bytes, without giving it to a decoder.

FFmpeg opens playlists, image sequences and network streams as readily as video files, so it may see a file only after
this module has named its container, and then only through FORMAT_WHITELIST. Names of files and types claimed by servers
are not looked at.
"""

import re

from pipeline.errors import VideoUnreadable

HEAD_BYTES = 4096  # what sniff needs of a file
FORMAT_WHITELIST = "mov,mp4,matroska,webm,avi,mpegts,flv,asf,ogg,gif,mpeg,ivf"  # FFmpeg's names for CONTAINERS

CONTAINERS = {
    "mp4": rb".{4}(ftyp(?!heic|heix|mif1|avif)|moov|mdat|wide|free|skip)",  # and MOV, M4V, 3GP; the excluded are photos
    "webm": rb"\x1a\x45\xdf\xa3.{,60}webm",
    "matroska": rb"\x1a\x45\xdf\xa3",
    "avi": rb"RIFF.{4}AVI ",
    "mpegts": rb"G(.{187}G){2}|.{4}G(.{191}G){2}",
    "flv": rb"FLV",
    "asf": rb"\x30\x26\xb2\x75",  # and WMV
    "ogg": rb"OggS",
    "mpeg": rb"\x00\x00\x01\xba",
    "gif": rb"GIF8",
    "ivf": rb"DKIF",
}
# Read after CONTAINERS: a large MOV begins like a raw stream.
NOT_VIDEOS = {  # what it is: (magic, what to try)
    "empty": (rb"\Z", "Download or export it again."),
    "a still picture": (
        rb"\xff\xd8\xff|\x89PNG|RIFF.{4}WEBP|BM|II\*\0|MM\0\*|.{4}ftyp",
        "Send a video: MP4, WebM, MOV, MKV, AVI or GIF.",
    ),
    "audio only": (rb"ID3|\xff[\xe0-\xfd]|fLaC|RIFF.{4}WAVE", "Send a video with pictures."),
    "a playlist": (rb"#EXTM3U|ffconcat|v=0\r?\n", "Send the video it points to."),
    "a web page": (rb"(\xef\xbb\xbf)?\s*<", "A page may only show the video: use the address of the video itself."),
    "text": (rb"[\s\x20-\x7e]{16}", "Use the address of the video itself."),
    "a raw stream without timestamps": (
        rb"\x00{2,3}\x01|\x1f\x07\x00",  # H.264, HEVC, MPEG; DV
        "Put it into a container: ffmpeg -i FILE -c copy video.mp4",
    ),
}


def sniff(head: bytes) -> str:
    """Name the container, a key of CONTAINERS, by the first HEAD_BYTES of a file.

    Raises VideoUnreadable saying what the file is and what to try."""
    for container, magic in CONTAINERS.items():
        if re.match(magic, head, re.DOTALL):
            return container
    for what, (magic, advice) in NOT_VIDEOS.items():
        if re.match(magic, head, re.DOTALL):
            raise VideoUnreadable(f"This file is {what}, not a video. {advice}")
    raise VideoUnreadable("This file is no video we know. Convert it to MP4, WebM, MOV, MKV, AVI or GIF.")
