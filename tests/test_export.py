"""A job's results as files: what a reader of each format gets back, whatever the descriptions say."""

import csv
import html
import io
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, get_args

import av
import pytest
import webvtt
from av.subtitles.subtitle import AssSubtitle

from jobs.export import (
    CSV_COLUMNS,
    FORMATS,
    LAST_CUE_MS,
    NUM_PER_CHUNK,
    Cue,
    ExportFormat,
    content_disposition,
    cues,
    file_name,
)

JOB_ID = "job_8f14e45f-ceea-467f-9b1d-3a2c1f0e7d55"
STATUS = {"job_id": JOB_ID, "status": "completed", "results_payload": {"frame_results": [], "timings": [1]}, "x": []}
HOUR_MS = 3_600_000
NASTY = [
    "a --> b",
    "<img onerror=alert(1) src=x>",
    "a < b & c > d, <i>not italic</i>",
    "&amp; &lt;b&gt; &#60;",
    "\n\nfirst\n\n\nsecond\r\n \r\n",
    "1\n00:00:00,000 --> 00:00:01,000\nfake",
    "00:00:00.000 --> 00:00:01.000",
    "WEBVTT\n\nNOTE x\n\nSTYLE\n::cue{}",
    "2024",
    "١٢٣",
    "שלום עולם, مرحبا بالعالم",
    "👩‍👩‍👧‍👦 🏳️‍🌈 é",
    "=cmd|' /C calc'!A0",
    r"{\an8}top {\b1}bold {Y:i} {x} C:\New\home",
    'He said "hi", then; left\ttab',
    "nul\0 bell\x07 escape\x1b[31m next\x85line\u2028sep",
    "word " * 100,
    "無" * 100,
]


def frame(index: int, text: str | None, at_ms: int | None = None, reused: int | None = None) -> dict[str, Any]:
    """A frame result; without a text, a failed one."""
    result = {
        "job_id_for_frame": JOB_ID,
        "frame_idx": index,
        "timestamp_ms": index * 1000 if at_ms is None else at_ms,
        "description": text or "",
        "processing_times_ms": {"image_encode": 1.5, "llm_inference": 2.0, "total_worker_frame_time": 3.5},
        "status": "error" if text is None else "success",
    }
    result |= {"error_message": "It failed."} if text is None else {}
    return result if reused is None else {**result, "reused_from_frame_idx": reused}


def export(format: ExportFormat, frames: Iterable[Mapping[str, Any]], duration_ms: int | None = None) -> str:
    return b"".join(FORMATS[format].write(STATUS, frames, duration_ms)).decode()


def read_cues(format: ExportFormat, content: str) -> list[Cue]:
    """Read subtitles back, their lines joined."""
    buffer = io.StringIO(content, newline="")
    captions = webvtt.from_buffer(buffer, format=format, strict=True) if content else []
    return [
        Cue(caption.start_time.in_milliseconds(), caption.end_time.in_milliseconds(), " ".join(caption.lines))
        for caption in captions
    ]


def shown_by_ffmpeg(format: str, content: str) -> list[str]:
    """What FFmpeg's decoder hands to a renderer, a text per cue."""
    with av.open(io.BytesIO(content.encode()), "r", format=format) as container:
        packets = container.demux(container.streams.subtitles[0])
        subtitles = [subtitle for packet in packets for subtitle in packet.decode()]
    fields = [subtitle.ass.decode().split(",", 8) for subtitle in subtitles if isinstance(subtitle, AssSubtitle)]
    return [text.replace(r"\N", " ") for *_, text in fields]


def plain(text: str) -> str:
    """A text as a subtitle shows it: white space and control characters are one space each, in a row or not."""
    return " ".join(re.sub(r"[\x00-\x1f\x7f-\x9f]", " ", text).split())


def seen(text: str) -> str:
    """A text as the eye takes it, without spaces: a line may end within a long word."""
    return text.translate(str.maketrans("‹›()", "<>{}", "\u2060 "))


def test_every_format_of_the_api_is_there() -> None:
    assert tuple(FORMATS) == get_args(ExportFormat)
    assert [format.suffix for format in FORMATS.values()] == [f".{name}" for name in FORMATS]
    assert all("charset=utf-8" in format.media_type for name, format in FORMATS.items() if name != "json")


def test_subtitles_look_like_this() -> None:
    text = "A red circle at the top left on a white background, & more."
    frames = [frame(0, text), frame(1, text, reused=0), frame(2, "<Empty>")]

    assert export("vtt", frames, 3500) == (
        "WEBVTT\n\n"
        "00:00:00.000 --> 00:00:01.999\nA red circle at the top left on a white\nbackground, &amp; more.\n\n"
        "00:00:02.000 --> 00:00:03.500\n&lt;Empty&gt;\n\n"
    )
    assert export("srt", frames, 3500) == (
        "1\n00:00:00,000 --> 00:00:01,999\nA red circle at the top left on a white\nbackground, & more.\n\n"
        "2\n00:00:02,000 --> 00:00:03,500\n‹Empty›\n\n"
    )


def test_json_is_the_status_with_the_frames_one_a_line() -> None:
    frames = [frame(0, "é 🎬"), frame(1, None)]
    content = export("json", frames)

    assert json.loads(content) == {**STATUS, "results_payload": {"timings": [1], "frame_results": frames}}
    assert [json.loads(line.rstrip(",")) for line in content.split("\n") if '"frame_idx"' in line] == frames
    assert "é 🎬" in content


def test_json_of_a_running_job_has_the_frames_so_far() -> None:
    status = {"job_id": JOB_ID, "status": "processing", "results_payload": None, "warnings": []}
    content = b"".join(FORMATS["json"].write(status, [frame(0, "A.")]))

    assert json.loads(content) == {**status, "results_payload": {"frame_results": [frame(0, "A.")]}}


def test_json_lines_are_the_frames() -> None:
    frames = [frame(i, text) for i, text in enumerate(NASTY)]
    content = export("jsonl", frames)

    assert [json.loads(line) for line in content.removesuffix("\n").split("\n")] == frames
    assert "👩‍👩‍👧‍👦" in content


def test_a_table_has_the_columns_of_the_contract() -> None:
    content = export("csv", [frame(0, "A."), frame(1, "A.", reused=0), frame(2, None, at_ms=100 * HOUR_MS + 61_002)])

    assert content == (
        "frame_idx,timestamp_ms,timestamp,description,status,reused_from_frame_idx\r\n"
        "0,0,00:00:00.000,A.,success,\r\n"
        "1,1000,00:00:01.000,A.,success,0\r\n"
        "2,360061002,100:01:01.002,,error,\r\n"
    )


def test_a_table_gives_every_text_back() -> None:
    rows = list(csv.DictReader(io.StringIO(export("csv", [frame(i, t) for i, t in enumerate(NASTY)]), newline="")))

    assert [row["description"].removeprefix("'") for row in rows] == NASTY
    assert [int(row["frame_idx"]) for row in rows] == list(range(len(NASTY)))


@pytest.mark.parametrize(
    "text", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\rx", "\n=1", "  =1", "\u00a0@x", "＝1", "=cmd|' /C calc'!A0"]
)
def test_a_table_holds_no_formulas(text: str) -> None:
    row = list(csv.reader(io.StringIO(export("csv", [frame(0, text)]), newline="")))[1]

    assert row[3] == f"'{text}"


@pytest.mark.parametrize("text", ["a = b", "'quoted'", "A - b", "1+1", ""])
def test_a_table_leaves_other_texts_alone(text: str) -> None:
    assert list(csv.reader(io.StringIO(export("csv", [frame(0, text)]), newline="")))[1][3] == text


def test_vtt_gives_every_text_back() -> None:
    found = read_cues("vtt", export("vtt", [frame(i, text) for i, text in enumerate(NASTY)]))

    assert [seen(html.unescape(cue.text)) for cue in found] == [seen(plain(text)) for text in NASTY]
    assert not any(re.search(r"-->|[<>]|&(?!amp;|lt;|gt;)", cue.text) for cue in found)


def test_srt_gives_every_text_back() -> None:
    content = export("srt", [frame(i, text) for i, text in enumerate(NASTY)])

    assert [seen(cue.text) for cue in read_cues("srt", content)] == [seen(plain(text)) for text in NASTY]
    blocks = content.removesuffix("\n\n").split("\n\n")
    assert len(blocks) == len(NASTY)
    for number, block in enumerate(blocks, 1):
        index, times, *lines = block.split("\n")
        assert index == str(number) and times.count("-->") == 1 and lines
        assert not any(re.search(r"-->|[<>{}]|^\s*\d*\s*$|:\d+[.,]\d", line) for line in lines)


@pytest.mark.parametrize("format", ["srt", "vtt"])
def test_a_player_obeys_nothing_in_a_text(format: ExportFormat) -> None:
    content = export(format, [frame(i, text) for i, text in enumerate(NASTY)])
    shown = shown_by_ffmpeg({"vtt": "webvtt"}.get(format, format), content)

    # FFmpeg itself escapes what WebVTT leaves to a renderer: a brace is \{{} there
    assert [seen(text.replace(r"\{{}", "{")) for text in shown] == [seen(plain(text)) for text in NASTY]


@pytest.mark.parametrize("format", ["srt", "vtt"])
def test_lines_are_short_and_nothing_is_left_out(format: ExportFormat) -> None:
    text = "word " * 50 + "x" * 100
    *_, lines = export(format, [frame(0, text)]).rstrip("\n").split("\n", 3 if format == "vtt" else 2)

    assert max(map(len, lines.split("\n"))) <= 42
    assert seen(lines.replace("\n", "")) == seen(text)


def test_a_number_alone_on_a_line_does_not_begin_a_cue() -> None:
    content = export("srt", [frame(0, f"{'x' * 42} 2024 {'y' * 42}"), frame(1, "7")])

    assert [line for line in content.split("\n") if line.strip().isdigit()] == ["1", "2"]
    assert "\n\u20602024\n" in content and content.endswith("\n\u20607\n\n")


def test_a_cue_lasts_until_the_next_begins() -> None:
    frames = [frame(0, "A."), frame(1, "B."), frame(2, "C.")]

    assert list(cues(frames, 5000)) == [Cue(0, 999, "A."), Cue(1000, 1999, "B."), Cue(2000, 5000, "C.")]


@pytest.mark.parametrize("duration_ms", [None, 0, 1999, 2000])
def test_without_a_known_end_the_last_cue_lasts_two_seconds(duration_ms: int | None) -> None:
    assert list(cues([frame(2, "A.")], duration_ms)) == [Cue(2000, 2000 + LAST_CUE_MS, "A.")]


def test_equal_texts_in_a_row_are_one_cue() -> None:
    frames = [frame(0, "A  b."), frame(1, " A b.\n", reused=0), frame(2, "C."), frame(3, "A b.")]

    assert list(cues(frames, 4000)) == [Cue(0, 1999, "A b."), Cue(2000, 2999, "C."), Cue(3000, 4000, "A b.")]


@pytest.mark.parametrize("missing", [None, "", " \n\0"])
def test_a_failed_or_empty_frame_makes_no_cue_and_ends_the_one_before(missing: str | None) -> None:
    frames = [frame(0, missing), frame(1, "A."), frame(2, missing), frame(3, "A."), frame(4, missing)]

    assert list(cues(frames, 9000)) == [Cue(1000, 1999, "A."), Cue(3000, 3999, "A.")]


def test_frames_of_one_millisecond_share_a_cue() -> None:
    frames = [frame(0, "A."), frame(1, "B.", 500), frame(2, None, 500), frame(3, "C.", 500), frame(4, "B.", 500)]

    assert list(cues(frames, 900)) == [Cue(0, 499, "A."), Cue(500, 900, "B. C.")]


def test_a_cue_always_ends_after_its_start() -> None:
    assert list(cues([frame(0, "A.", 7), frame(1, "B.", 8)], 8)) == [Cue(7, 8, "A."), Cue(8, 8 + LAST_CUE_MS, "B.")]


@pytest.mark.parametrize("format", ["srt", "vtt"])
def test_times_go_beyond_99_hours(format: ExportFormat) -> None:
    found = read_cues(format, export(format, [frame(0, "A.", 99 * HOUR_MS), frame(1, "B.", 1234 * HOUR_MS)]))

    assert found == [
        Cue(99 * HOUR_MS, 1234 * HOUR_MS - 1, "A."),
        Cue(1234 * HOUR_MS, 1234 * HOUR_MS + LAST_CUE_MS, "B."),
    ]


def test_without_frames_every_file_is_valid() -> None:
    assert json.loads(export("json", []))["results_payload"]["frame_results"] == []
    assert export("jsonl", []) == ""
    assert export("csv", []) == ",".join(CSV_COLUMNS) + "\r\n"
    assert export("srt", []) == ""
    assert export("vtt", []) == "WEBVTT\n\n"
    assert read_cues("vtt", export("vtt", [])) == []


@pytest.mark.parametrize("format", get_args(ExportFormat))
def test_a_long_job_is_read_and_written_chunk_by_chunk(format: ExportFormat) -> None:
    num_read = 0

    def frames() -> Iterable[dict[str, Any]]:
        nonlocal num_read
        for num_read in range(1, 20_001):
            yield frame(num_read, f"Frame {num_read} of a long video.")

    chunks, most_ahead = [], 0
    for chunk in FORMATS[format].write(STATUS, frames()):
        chunks.append(len(chunk))
        most_ahead = max(most_ahead, num_read - (len(chunks) - 1) * NUM_PER_CHUNK)

    assert num_read == 20_000
    assert 20_000 // NUM_PER_CHUNK <= len(chunks) <= 20_000 // NUM_PER_CHUNK + 1
    assert most_ahead <= NUM_PER_CHUNK + 2
    assert max(chunks) < 400 * NUM_PER_CHUNK


def test_half_a_surrogate_pair_does_not_break_a_file_off() -> None:
    assert '"a ?"' in export("jsonl", [frame(0, "a \ud800")])


@pytest.mark.parametrize(
    ("video_url", "name"),
    [
        ("holiday.mp4", "holiday.srt"),
        ("upload:holiday.mp4", "holiday.srt"),
        ("upload:what? #1.MOV", "what #1.srt"),
        ("upload:C:\\Users\\me\\clip.mkv", "clip.srt"),
        ("https://example.com/a/b/holiday.mp4?key=secret/x.mp4#t=1", "holiday.srt"),
        ("https://example.com/videos%2Ftwo%20words.mp4", "two words.srt"),
        ("https://example.com/stream/", "stream.srt"),
        ("upload:Fußball, 日本 🎬.webm", "Fußball, 日本 🎬.srt"),
        ("upload:talk.2024", "talk.2024.srt"),
        ("upload:../../etc/passwd", "passwd.srt"),
        ("upload:a\r\nSet-Cookie: x\0\u202e'\"`<>|*.mp4", "a Set-Cookie x.srt"),
        ("upload:..hidden. .mp4", "hidden.srt"),
        ("upload:con.mp4", "video-con.srt"),
        ("upload:LPT1.x.mp4", "video-LPT1.x.srt"),
        ("upload:concert.mp4", "concert.srt"),
        ("https://example.com", "moonreel-8f14e45f.srt"),
        ("https://example.com/?v=1", "moonreel-8f14e45f.srt"),
        ("http://[", "moonreel-8f14e45f.srt"),
        ("upload:", "moonreel-8f14e45f.srt"),
        ("upload:.mp4", "moonreel-8f14e45f.srt"),
        ("upload:..", "moonreel-8f14e45f.srt"),
        ("", "moonreel-8f14e45f.srt"),
    ],
)
def test_a_file_is_named_after_its_video(video_url: str, name: str) -> None:
    assert file_name(video_url, "srt", JOB_ID) == name


@pytest.mark.parametrize("char", ["x", "é", "日", "🎬", ". "])
def test_a_long_name_is_cut_to_what_file_systems_take(char: str) -> None:
    name = file_name(f"upload:a{char * 300}z.mp4", "jsonl", JOB_ID)

    assert name.startswith("a") and name.endswith(".jsonl")
    assert len(name) <= 100 and len(name.encode()) <= 250


def test_a_name_stands_in_the_header_in_ascii_and_whole() -> None:
    header = content_disposition("Fußball 50%.srt")

    assert header == "attachment; filename=\"Fu_ball 50_.srt\"; filename*=UTF-8''Fu%C3%9Fball%2050%25.srt"


def test_a_name_cannot_leave_its_header() -> None:
    header = content_disposition('a"; x=\\\r\nSet-Cookie: b\ud800')

    assert header.isascii() and header.isprintable()
    assert header == (
        "attachment; filename=\"a_; x=___Set-Cookie: b_\"; filename*=UTF-8''a%22%3B%20x%3D%5C%0D%0ASet-Cookie%3A%20b%3F"
    )
