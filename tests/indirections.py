"""Files that point to other files or to servers, in every format that a player would follow."""

import struct
from collections.abc import Callable, Iterator
from pathlib import Path

PLAYLISTS: dict[str, str] = {
    "m3u8 with a path": "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{path}\n#EXT-X-ENDLIST\n",
    "m3u8 with a name": "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{name}\n#EXT-X-ENDLIST\n",
    "m3u8 with a file URL": "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile://{path}\n#EXT-X-ENDLIST\n",
    "m3u8 with a URL": "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{url}\n#EXT-X-ENDLIST\n",
    "m3u8 with a key": '#EXTM3U\n#EXT-X-KEY:METHOD=AES-128,URI="{url}"\n#EXTINF:9,\n{path}\n#EXT-X-ENDLIST\n',
    "m3u8 with a map": '#EXTM3U\n#EXT-X-VERSION:7\n#EXT-X-MAP:URI="{url}"\n#EXTINF:9,\n{path}\n#EXT-X-ENDLIST\n',
    "m3u8 of m3u8": "#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=1\n{url}\n",
    "m3u8 after a byte order mark": "\ufeff#EXTM3U\n#EXTINF:9,\n{path}\n#EXT-X-ENDLIST\n",
    "m3u": "{path}\n{url}\n",
    "ffconcat with a path": "ffconcat version 1.0\nfile '{path}'\n",
    "ffconcat with a name": "ffconcat version 1.0\nfile {name}\n",
    "ffconcat with a URL": "ffconcat version 1.0\nfile '{url}'\n",
    "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video {port} RTP/AVP 96\n",
    "dash": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"><Period><AdaptationSet>'
    '<Representation id="1" bandwidth="1"><BaseURL>{url}</BaseURL></Representation></AdaptationSet></Period></MPD>',
    "smooth streaming": '<SmoothStreamingMedia MajorVersion="2" Duration="9"><StreamIndex Type="video" Url="{url}"/>'
    "</SmoothStreamingMedia>",
    "f4m": '<?xml version="1.0"?><manifest xmlns="http://ns.adobe.com/f4m/1.0"><media url="{url}"/></manifest>',
    "asx": '<asx version="3.0"><entry><ref href="{url}"/></entry></asx>',
    "smil": '<smil><body><video src="{url}"/></body></smil>',
    "xspf": '<playlist version="1"><trackList><track><location>{url}</location></track></trackList></playlist>',
    "pls": "[playlist]\nFile1={url}\nNumberOfEntries=1\n",
    "asf reference": "[Reference]\nRef1={url}\n",
    "rtsp text": "RTSPtext\nrtsp://127.0.0.1:{port}/x\n",
    "ram": "rtsp://127.0.0.1:{port}/x\n",
    "url shortcut": "[InternetShortcut]\nURL={url}\n",
    "avisynth": 'DirectShowSource("{path}")\n',
    "a page that refreshes": '<meta http-equiv="refresh" content="0;url={url}">',
}
HEADS = {  # what the first bytes may pretend
    "mp4": b"\0\0\0\x18ftypisom\0\0\2\0isomiso2",
    "mov": b"\0\0\0\x08wide\0\0\0\x08free",
    "webm": b"\x1a\x45\xdf\xa3\x9f\x42\x86\x81\x01\x42\xf7\x81\x01\x42\xf2\x81\x04\x42\xf3\x81\x08\x42\x82\x84webm",
    "avi": b"RIFF\0\0\0\0AVI ",
    "flv": b"FLV\x01\x05\0\0\0\x09\0\0\0\0",
    "asf": b"\x30\x26\xb2\x75\x8e\x66\xcf\x11\xa6\xd9\x00\xaa\x00\x62\xce\x6c",
    "ogg": b"OggS\0\x02" + bytes(20),
    "gif": b"GIF89a\x40\0\x30\0\0\0\0",
    "mpeg": b"\0\0\1\xba\x44" + bytes(9),
    "ivf": b"DKIF\0\0\x20\0VP80\x40\0\x30\0" + bytes(16),
    "mpegts": (b"G" + bytes(187)) * 5,
}
NAMES = [  # that FFmpeg, or a shell, would read more into
    "clip.mp4",
    "clip.m3u8",
    "clip.ffconcat",
    "clip.sdp",
    "clip.mpd",
    "s_%03d.jpg",
    "concat:a.mp4|b.mp4",
    "subfile,,start,0,end,0,,:clip.mp4",
    "-i.mp4",
    "file:clip.mp4",
]


def indirections(path: Path, url: str, video: Path) -> Iterator[tuple[str, bytes]]:
    """Name and content of each file; all of them point to path or url. `video` is a MOV with its index at the end."""
    port = url.rpartition(":")[2].partition("/")[0]
    for name, text in PLAYLISTS.items():
        yield name, text.format(path=path, name=path.name, url=url, port=port).encode()
    playlist = PLAYLISTS["m3u8 with a path"].format(path=path).encode()
    for container, head in HEADS.items():
        yield f"m3u8 behind the head of {container}", head + playlist * 30
    yield "mov that says where its samples are", with_external_samples(video.read_bytes(), path)
    reference = b"\0\0\0\0url " + struct.pack(">I", len(url) + 1) + url.encode() + b"\0"
    yield "mov that names another", box(b"moov", box(b"rmra", box(b"rmda", box(b"rdrf", reference))))


def box(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", 8 + len(content)) + kind + content


def with_external_samples(movie: bytes, path: Path) -> bytes:
    """Let a movie's data reference be an alias to path: QuickTime's way of keeping the samples in another file."""
    place = os_path = str(path).encode()
    alias = bytes(10) + bytes(28) + bytes(12) + bytes(64) + bytes(16) + struct.pack(">HH", 1, 1) + bytes(16)
    alias += struct.pack(">HH", 2, len(place)) + os_path + bytes(len(place) % 2) + struct.pack(">HH", 0xFFFF, 0)
    reference = bytes(4) + struct.pack(">I", 1) + box(b"alis", bytes(4) + alias)
    return rebuilt(movie, [b"moov", b"trak", b"mdia", b"minf", b"dinf", b"dref"], lambda _: reference)


def rebuilt(data: bytes, path: list[bytes], change: Callable[[bytes], bytes]) -> bytes:
    """Change the content of the boxes at this path, and the sizes of those around them."""
    parts, position = [], 0
    while position + 8 <= len(data):
        (size,) = struct.unpack_from(">I", data, position)
        kind, content = data[position + 4 : position + 8], data[position + 8 : position + size]
        if kind == path[0]:
            content = rebuilt(content, path[1:], change) if path[1:] else change(content)
        parts.append(box(kind, content))
        position += size
    return b"".join(parts)
