"""Tell a video from everything else by its first bytes, without giving it to a decoder.

FFmpeg opens playlists, image sequences and network streams as readily as video files, so it may see a file only after
this module has named its container, and then only through that container's demuxer. Names of files and types claimed by
servers are not looked at.
"""

import re

from pipeline.errors import VideoUnreadable

HEAD_BYTES = 4096  # what sniff needs of a file

CONTAINERS = {  # FFmpeg's name of the demuxer: magic
    "mp4": rb".{4}(ftyp(?!heic|heix|mif1|avif)|moov|mdat|wide|free|skip)",  # and MOV, M4V, 3GP; the excluded are photos
    "webm": rb"\x1a\x45\xdf\xa3.{,60}webm",
    "matroska": rb"\x1a\x45\xdf\xa3",
    "avi": rb"RIFF.{4}AVI ",
    "mpegts": rb"G(.{187}G){2}|.{4}G(.{191}G){2}|.{,187}?G(.{187}G){4}",  # the last: cut from a running broadcast
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
    "an animated picture in WebP or PNG": (
        rb"RIFF.{4}WEBPVP8X.{,4000}ANIM|\x89PNG.{,4000}acTL",
        "Convert it to GIF or MP4.",
    ),
    "a still picture": (
        rb"\xff\xd8\xff|\x89PNG|RIFF.{4}WEBP|BM|II\*\0|MM\0\*|.{4}ftyp",
        "Send a video: MP4, WebM, MOV, MKV, AVI or GIF.",
    ),
    "audio only": (rb"ID3|\xff[\xe0-\xfd]|fLaC|RIFF.{4}WAVE", "Send a video with pictures."),
    "a playlist": (
        rb"(\xef\xbb\xbf)?\s*(#EXTM3U|ffconcat|v=0\r?\n|RTSPtext|(?i:\[(playlist|reference)\]|(rtsp|mms|https?)://"
        rb"|(<[?!][^>]*>\s*)*<(mpd|asx|smil|playlist|manifest|smoothstreamingmedia)\b))",
        "Send the video that it points to.",
    ),
    "a web page": (rb"(\xef\xbb\xbf)?\s*<", "A page may only show the video: use the address of the video itself."),
    "an archive": (rb"PK\x03\x04|\x1f\x8b|7z\xbc\xaf|Rar!|BZh|\xfd7zXZ", "Unpack it, and send the video in it."),
    "a PDF document": (rb"%PDF", "Send a video: MP4, WebM, MOV, MKV, AVI or GIF."),
    "text": (rb"[\s\x20-\x7e]{16}", "Send a video, or the address of the video itself."),
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
