"""The command line, with the demo model and real files."""

import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from local_server import MP4, LocalServer, http

from pipeline.__main__ import SAMPLE_VIDEO, line, main
from pipeline.frames import sample_frames
from pipeline.moondream.runner import ModelRunner
from pipeline.results import FrameResult

ROOT = Path(__file__).parent.parent
COMMAND = [sys.executable, "-m", "pipeline", "--model", "demo"]


def test_the_sample_video_is_described_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    truth = json.loads(SAMPLE_VIDEO.with_suffix(".json").read_text(encoding="utf-8"))

    assert main(["--model", "demo"]) == 0

    said = capsys.readouterr().out.splitlines()
    expected = [line(FrameResult(0, frame["timestamp_ms"], frame["description"])) for frame in truth["frames"]]
    assert said == expected


def test_the_results_file_holds_the_payload(tmp_path: Path, video: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"

    assert main([str(video), "--model", "demo", "--target_fps", "2", "--output-json-file", str(out)]) == 0

    payload = json.loads(out.read_text(encoding="utf-8"))
    assert payload["video_url"] == str(video)
    assert payload["actual_original_fps"] == 25
    assert payload["total_frames_submitted_to_workers"] == payload["total_frames_results_received"] == 6
    assert [(f["frame_idx"], f["timestamp_ms"]) for f in payload["frame_results"]] == [
        (frame.frame_idx, frame.timestamp_ms) for frame in sample_frames(video, 2)
    ]
    assert all(f["job_id_for_frame"] is None and f["status"] == "success" for f in payload["frame_results"])
    assert all(seconds >= 0 for seconds in payload["timings_seconds"].values())
    assert list(tmp_path.iterdir()) == [out]
    assert capsys.readouterr().out.count("\n") == 6


def test_a_window_and_a_cut_are_taken_over(tmp_path: Path, video: Path) -> None:
    out = tmp_path / "out.json"
    window = ["--start-s", "1", "--end_s", "3", "--max-frames", "1", "--caption", "short"]

    assert main([str(video), "--model", "demo", *window, "--output_json_file", str(out)]) == 0

    payload = json.loads(out.read_text(encoding="utf-8"))
    assert [f["timestamp_ms"] for f in payload["frame_results"]] == [1000]
    assert payload["truncated"] is True
    assert payload["warnings"]


@pytest.fixture
def server() -> Iterator[LocalServer]:
    server = LocalServer()
    yield server
    server.stop()


def test_a_url_is_downloaded_described_and_removed(
    tmp_path: Path,
    video: Path,
    server: LocalServer,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    server.replies["/grey.avi"] = [http(video.read_bytes())]
    url, out = f"http://127.0.0.1:{server.port}/grey.avi?key=1", tmp_path / "out.json"
    options = ["--allow-private-urls", "nas.local, 127.0.0.1", "--output-json-file", str(out), "--caption", "short"]

    assert main(["--video-url", url, "--model", "demo", *options]) == 0

    payload = json.loads(out.read_text(encoding="utf-8"))
    assert payload["video_url"] == url
    assert [f["timestamp_ms"] for f in payload["frame_results"]] == [0, 1000, 2000]
    seconds = payload["timings_seconds"]
    assert 0 < seconds["video_download"] <= seconds["overall_pipeline_internal"]
    assert "Downloading" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize(("signal_number", "exit_code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_an_interrupted_download_leaves_no_file(
    signal_number: signal.Signals, exit_code: int, tmp_path: Path, server: LocalServer
) -> None:
    has_begun = threading.Event()

    def reply(connection: socket.socket) -> None:
        connection.sendall(http(MP4, length=10 * len(MP4)))
        has_begun.set()
        connection.recv(1)  # until the client has gone

    server.replies["/x"] = [reply]
    url = f"http://127.0.0.1:{server.port}/x"
    process = subprocess.Popen(
        [*COMMAND, url, "--allow-private-urls", "127.0.0.1"],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert has_begun.wait(60)
    process.send_signal(signal_number)
    _, err = process.communicate(timeout=60)

    assert process.returncode == exit_code
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_two_videos_are_one_too_many(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["a.mp4", "--video-url", "https://example.com/b.mp4"])

    assert end.value.code == 2
    assert "give one of them" in capsys.readouterr().err


def test_minutes_run_past_59() -> None:
    assert line(FrameResult(0, 3_723_004, "A star.")) == "[62:03.004] A star."
    assert line(FrameResult(0, 999, "", "error", "It broke.")) == "[00:00.999] error: It broke."


def test_an_answer_of_several_paragraphs_stays_on_its_line() -> None:
    assert line(FrameResult(0, 0, "A star.\n\nA circle.")) == "[00:00.000] A star. A circle."


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["no-such-file.mp4"], "no file"),
        (["pyproject.toml"], "not a video"),
        (["ftp://example.com/a.mp4"], "Invalid video URL: only http"),
        (["http://127.0.0.1/a.mp4", "--allow_private_urls", "10.0.0.1"], "Invalid video URL: it leads to"),
        (["--video-url", "http://me:secret@example.com/a.mp4"], "Invalid video URL: it contains a user name"),
        (["http://127.0.0.1/a.mp4", "--target-fps", "0"], "target_fps"),
        (["http://example.com/a.mp4", "--proxy", "proxy.local:3128"], "proxy is no URL"),
        (["--target-fps", "0"], "target_fps"),
        (["--slots", "0"], "slots"),
        (["--max-tokens", "0"], "max_tokens"),
        (["--question", " "], "question is empty"),
        (["--question", "why? " * 600], "shorter question"),
        (["--start-s", "900"], "No frames"),
        (["--question", "caf\udce9?"], "UTF-8"),
        (["--slots", "1000000"], "slots"),
        ([""], "not a file"),
        (["--dtype", "int3"], "dtype"),
        (["--limit", "max_sheep=3"], "no limit 'max_sheep'"),
        (["--limit", "max_pixels=5_000"], "limit max_pixels"),
    ],
)
def test_bad_input_exits_with_2_and_says_what_to_do(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)

    assert main(["--model", "demo", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_no_model_exits_with_3_and_says_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", str(tmp_path)]) == 3
    assert "config.json" in capsys.readouterr().err


def test_ctrl_c_keeps_what_is_done(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    arguments = ["--target-fps", "24", "--slots", "1", "--reuse-similar", "0", "--output-json-file", str(out)]
    process = subprocess.Popen(
        [*COMMAND, *arguments], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout
    said = [process.stdout.readline() for _ in range(3)]
    process.send_signal(signal.SIGINT)
    rest, err = process.communicate(timeout=60)

    assert process.returncode == 130
    assert "Interrupted" in err
    payload = json.loads(out.read_text(encoding="utf-8"))
    assert len(payload["frame_results"]) == len(said) + len(rest.splitlines())
    assert payload["truncated"] is True


@pytest.mark.parametrize("place", ["", ".", "/", "folder", "video.avi", "no/folder/out.json"])
def test_a_bad_place_for_the_results_is_found_before_the_work(
    place: str, video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The results overwrote the video, and a folder was only found out after the last frame."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    shutil.copy(video, tmp_path / "video.avi")
    before = (tmp_path / "video.avi").read_bytes()

    assert main(["video.avi", "--model", "demo", "--output-json-file", place]) == 2

    assert capsys.readouterr().out == ""
    assert (tmp_path / "video.avi").read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"folder", "video.avi"}


def test_results_go_through_a_link_and_into_a_pipe(tmp_path: Path, video: Path) -> None:
    """Both were replaced by a file."""
    (tmp_path / "link.json").symlink_to(tmp_path / "real.json")
    os.mkfifo(tmp_path / "pipe")
    arguments = [str(video), "--model", "demo", "--max-frames", "1", "--output-json-file"]
    reader = subprocess.Popen(["cat", tmp_path / "pipe"], stdout=subprocess.PIPE)

    assert main([*arguments, str(tmp_path / "link.json")]) == 0
    assert main([*arguments, str(tmp_path / "pipe")]) == 0

    assert (tmp_path / "link.json").is_symlink()
    assert json.loads((tmp_path / "real.json").read_text(encoding="utf-8"))["frame_results"]
    assert json.loads(reader.communicate(timeout=20)[0])["frame_results"]


def test_a_file_name_that_is_not_utf_8_is_no_crash(tmp_path: Path, video: Path) -> None:
    """The results were lost to "surrogates not allowed"."""
    odd_name = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.avi")
    shutil.copy(video, odd_name)
    out = tmp_path / "out.json"

    assert main([odd_name, "--model", "demo", "--max-frames", "1", "--output-json-file", str(out)]) == 0

    assert json.loads(out.read_text(encoding="utf-8"))["video_url"].endswith("caf\N{REPLACEMENT CHARACTER}.avi")


def test_a_run_that_answers_nothing_leaves_older_results_alone(tmp_path: Path) -> None:
    """A question that is too long replaced the last run's results by an empty list."""
    out = tmp_path / "out.json"
    out.write_text("older")

    assert main(["--model", "demo", "--question", "why? " * 600, "--output-json-file", str(out)]) == 2

    assert out.read_text() == "older"


def test_an_error_in_the_middle_keeps_what_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, decode = tmp_path / "out.json", ModelRunner.decode
    num_steps = itertools.count()

    def decode_until_it_breaks(self: ModelRunner, *args: Any) -> Any:
        if next(num_steps) == 60:
            raise RuntimeError("device lost")
        return decode(self, *args)

    monkeypatch.setattr(ModelRunner, "decode", decode_until_it_breaks)
    with pytest.raises(RuntimeError, match="device lost"):
        main(["--model", "demo", "--slots", "2", "--reuse-similar", "0", "--output-json-file", str(out)])

    payload = json.loads(out.read_text(encoding="utf-8"))
    assert 0 < len(payload["frame_results"]) < 25
    assert "device lost" in payload["warnings"][-1]
    assert payload["truncated"] is True


def test_a_video_that_goes_beyond_a_limit_keeps_the_frames_before(
    tmp_path: Path, odd: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    arguments = [str(odd / "pipe_nodur.webm"), "--limit", "max-frames=2", "--output-json-file", str(out)]

    assert main(["--model", "demo", *arguments]) == 2

    payload = json.loads(out.read_text(encoding="utf-8"))
    assert [f["timestamp_ms"] for f in payload["frame_results"]] == [0, 1000]
    assert payload["truncated"] is True
    said = capsys.readouterr()
    assert said.out.count("\n") == 2
    assert (
        "length unknown of 320 x 240" in said.err and "That is an unknown number of frames at 1 per second" in said.err
    )
    assert "error: At 1 per second" in said.err and "limit max_frames" in said.err


def test_the_video_is_introduced_before_the_model_is_loaded(
    tmp_path: Path, odd: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(odd / "rot90.mp4"), "--target-fps", "5", "--model", str(tmp_path)]) == 3

    said = capsys.readouterr().err
    assert "0:10 of 240 x 320, 25 fps, h264 in mp4, silent. That is 50 frames at 5 per second." in said


def test_a_reader_that_goes_away_is_no_crash() -> None:
    with subprocess.Popen([*COMMAND], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stderr
        process.stdout.close()
        err = process.stderr.read()

    assert process.returncode == 1
    assert "Traceback" not in err and "Exception" not in err


def test_the_command_line_needs_no_gradio_and_help_needs_no_torch() -> None:
    code = "import sys, pipeline.__main__ as m; m.parse_arguments([]); print({'torch', 'gradio'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env={**os.environ})

    assert run.stdout.strip() == "set()"
