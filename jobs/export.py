"""A job's frame results as a file: JSON, JSON lines, a CSV table, SRT or WebVTT subtitles.

Files come in chunks of a few hundred frames, so that a long video never makes one huge string. Descriptions are text
from a stranger's video: each format writes them so that its readers take them for text and nothing else.
Subtitles are written by hand: pysubs2 1.8.1 drops {braces} and backslashes and stops at 100 hours, webvtt-py 0.6.0
drops <tags> in SRT, neither escapes, and both build the whole file. The tests read ours with webvtt-py and FFmpeg.
Knows nothing of stores and HTTP. Test: pytest tests/test_export.py
"""

import csv
import html
import json
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any
from urllib.parse import quote, unquote

from jobs.schema import UPLOAD, ExportFormat

NUM_PER_CHUNK = 250  # frames or cues
LINE_LENGTH = 42  # of subtitles, in characters
LAST_CUE_MS = 2000  # where the end of the video is not known
NAME_LENGTH = 100  # of files, in characters
NAME_BYTES = 250  # file systems take 255

Frame = Mapping[str, Any]  # a frame result of the API
Parts = Callable[[Mapping[str, Any], Iterable[Frame], int | None], Iterator[str]]

CSV_COLUMNS = ("frame_idx", "timestamp_ms", "timestamp", "description", "status", "reused_from_frame_idx")
# What a spreadsheet may take for a formula: https://owasp.org/www-community/attacks/CSV_Injection
FORMULA = re.compile(r"[\t\r\n]|\s*[=+\-@＝＋－＠]")

CONTROLS = dict.fromkeys([*range(0x20), *range(0x7F, 0xA0)], " ")
WORD_JOINER = "\u2060"  # shows nothing; FFmpeg, too, writes it behind a backslash to make it one
SRT_LOOKALIKES = str.maketrans("<>{}", "‹›()")
SRT_JOINTS = re.compile(
    r"^(?=\d+$)"  # a number alone looks like a cue's
    r"|(?:(?<=:\d)|(?<=:\d\d))(?=[.,]\d)"  # two clocks in a line begin a cue for pysubs2, whatever stands between
    r"|(?<=\\)"  # \N is a new line for FFmpeg
    r"|(?<=&)(?=#?\w+;)"  # an HTML entity
)

URL_PATH = re.compile(r"[^/?#]*://[^/?#]*([^?#]*)")
NOT_IN_NAMES = re.compile(r"""[<>:"'`/\\|?*]""")
EXTENSION = re.compile(r"\.(?!\d+$)[A-Za-z0-9]{1,5}$")
RESERVED = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9¹²³]) *(\.|$)", re.IGNORECASE)  # on Windows


@dataclass(frozen=True)
class Format:
    """One kind of file."""

    media_type: str
    suffix: str
    parts: Parts  # the file's text, a piece per frame or cue

    def write(
        self, status: Mapping[str, Any], frames: Iterable[Frame], duration_ms: int | None = None
    ) -> Iterator[bytes]:
        """Write the file, UTF-8, chunk by chunk.

        status: the job as /api/status shows it; only json takes it. frames: in order of frame_idx and of time.
        duration_ms: when the last subtitle ends; None if it is not known.
        """
        parts = self.parts(status, frames, duration_ms)
        while chunk := "".join(islice(parts, NUM_PER_CHUNK)):
            yield chunk.encode("utf-8", "replace")  # half a surrogate pair is not text


def _json(status: Mapping[str, Any], frames: Iterable[Frame], duration_ms: int | None) -> Iterator[str]:
    """The status with results_payload and in it frame_results last, a frame per line. A job that is not completed has
    no payload yet: then frame_results stands there alone."""
    payload = {**_without("frame_results", status.get("results_payload") or {}), "frame_results": []}
    head, tail = _dump({**_without("results_payload", status), "results_payload": payload}, indent=1).rsplit("[]", 1)
    yield f"{head}["
    for index, frame in enumerate(frames):
        yield ("," if index else "") + f"\n{_dump(frame)}"
    yield f"\n]{tail}\n"


def _jsonl(status: Mapping[str, Any], frames: Iterable[Frame], duration_ms: int | None) -> Iterator[str]:
    for frame in frames:
        yield f"{_dump(frame)}\n"


def _csv(status: Mapping[str, Any], frames: Iterable[Frame], duration_ms: int | None) -> Iterator[str]:
    """Text that a spreadsheet may take for a formula begins with a '. An error has no description."""
    row = csv.writer(_Line()).writerow
    yield row(CSV_COLUMNS)
    for frame in frames:
        at_ms, text = frame["timestamp_ms"], _description(frame)
        yield row(
            [
                frame["frame_idx"],
                at_ms,
                _clock(at_ms),
                f"'{text}" if FORMULA.match(text) else text,
                frame["status"],
                frame.get("reused_from_frame_idx"),
            ]
        )


def _srt(status: Mapping[str, Any], frames: Iterable[Frame], duration_ms: int | None) -> Iterator[str]:
    for number, cue in enumerate(cues(frames, duration_ms), 1):
        yield f"{number}\n{_subtitle(cue, ',', _escape_srt)}"


def _vtt(status: Mapping[str, Any], frames: Iterable[Frame], duration_ms: int | None) -> Iterator[str]:
    yield "WEBVTT\n\n"
    for cue in cues(frames, duration_ms):
        yield _subtitle(cue, ".", lambda line: html.escape(line, quote=False))


FORMATS: dict[ExportFormat, Format] = {
    "json": Format("application/json", ".json", _json),
    "jsonl": Format("application/x-ndjson; charset=utf-8", ".jsonl", _jsonl),
    "csv": Format("text/csv; charset=utf-8", ".csv", _csv),
    "srt": Format("application/x-subrip; charset=utf-8", ".srt", _srt),
    "vtt": Format("text/vtt; charset=utf-8", ".vtt", _vtt),
}


@dataclass(frozen=True)
class Cue:
    """A subtitle: one line of text, not empty, shown from start_ms until end_ms, which is later."""

    start_ms: int
    end_ms: int
    text: str


def cues(frames: Iterable[Frame], duration_ms: int | None) -> Iterator[Cue]:
    """Turn frames into cues, each of which lasts until 1 ms before the next frame that shows something else.

    Frames in a row with the same text are one cue. A frame that failed, or has no text, makes no cue and ends the one
    before: nobody knows whether its text still holds. Frames of the same millisecond are one cue with all their texts.
    The last cue lasts until duration_ms, or for LAST_CUE_MS if that is unknown or no later than its start.
    """
    start_ms, text = 0, ""
    for at_ms, moment in groupby(frames, key=lambda frame: frame["timestamp_ms"]):
        texts = (" ".join(_description(frame).translate(CONTROLS).split()) for frame in moment)
        next_text = " ".join(dict.fromkeys(filter(None, texts)))
        if next_text != text:
            if text:
                yield Cue(start_ms, max(at_ms - 1, start_ms + 1), text)
            start_ms, text = at_ms, next_text
    if text:
        end_ms = duration_ms or 0
        yield Cue(start_ms, end_ms if end_ms > start_ms else start_ms + LAST_CUE_MS, text)


def file_name(video_url: str, format: ExportFormat, job_id: str) -> str:
    """Name a job's file after its video (a URL, "upload:" and a name, or a name), or else after its job_id. The name
    is safe to save under everywhere, and at most NAME_LENGTH characters long."""
    suffix = FORMATS[format].suffix
    stem = _clean(EXTENSION.sub("", _last_part(video_url)))
    stem = stem.encode()[: NAME_BYTES - len(suffix)].decode(errors="ignore")[: NAME_LENGTH - len(suffix)].strip(" .-_")
    return (stem or f"moonreel-{job_id.removeprefix('job_')[:8]}") + suffix


def content_disposition(name: str) -> str:
    """The header that has a browser save a file under this name (RFC 6266); for old ones, in ASCII."""
    fallback = re.sub(r'[^ -~]|["\\%]', "_", name)
    return f"attachment; filename=\"{fallback}\"; filename*=UTF-8''{quote(name, safe='', errors='replace')}"


class _Line:
    """The file that a csv.writer wants: its writerow returns the line."""

    def write(self, line: str) -> str:
        return line


def _description(frame: Frame) -> str:
    return frame["description"] if frame["status"] == "success" else ""


def _dump(value: Mapping[str, Any], indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent, default=dict)  # dict: of a Mapping that is none


def _without(key: str, mapping: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in mapping.items() if name != key}


def _clock(time_ms: int, mark: str = ".") -> str:
    seconds, ms = divmod(time_ms, 1000)
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02}:{minutes:02}:{seconds:02}{mark}{ms:03}"


def _subtitle(cue: Cue, mark: str, escape: Callable[[str], str]) -> str:
    lines = map(escape, textwrap.wrap(cue.text, LINE_LENGTH, break_on_hyphens=False))
    return f"{_clock(cue.start_ms, mark)} --> {_clock(cue.end_ms, mark)}\n" + "\n".join(lines) + "\n\n"


def _escape_srt(line: str) -> str:
    """SRT has no escapes, and readers differ in what they obey. So what may be <tags> becomes ‹tags›, what may be
    {orders} becomes (orders), and a word joiner, which shows nothing, parts the rest."""
    return SRT_JOINTS.sub(WORD_JOINER, line.translate(SRT_LOOKALIKES))


def _last_part(video_url: str) -> str:
    if video_url.startswith(UPLOAD):
        path = video_url.removeprefix(UPLOAD)
    elif match := URL_PATH.match(video_url):
        path = unquote(match[1])
    else:
        path = video_url
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]


def _clean(stem: str) -> str:
    printable = "".join(char if char.isprintable() else " " for char in NOT_IN_NAMES.sub(" ", stem))
    stem = " ".join(printable.split()).strip(" .-_")
    return f"video-{stem}" if RESERVED.match(stem) else stem
