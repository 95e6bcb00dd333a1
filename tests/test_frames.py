"""The decoder's process: what it may do, how it ends, and what the caller hears of that."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from video_files import write_video

from pipeline import frames
from pipeline.demo import SAMPLE_VIDEO
from pipeline.errors import Canceled, DecoderStopped, VideoTooLarge
from pipeline.frames import probe, sample_frames, seek_frame
from pipeline.sampling import DecodeLimits

ROOT = Path(__file__).parent.parent


def children() -> set[int]:
    found: set[int] = set()
    for path in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):  # a thread that has just ended
            found |= set(map(int, path.read_text().split()))
    return found


def is_alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


@pytest.fixture
def decoder(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Run this Python code in the place of the decoder."""

    def run(code: str) -> None:
        monkeypatch.setattr(frames, "COMMAND", [sys.executable, "-c", code])

    return run


# How it ends


def test_the_process_ends_with_the_video(video: Path) -> None:
    before = children()
    list(sample_frames(video, 1))

    assert children() == before


def test_the_process_lets_others_go_before_and_is_not_reached_by_ctrl_c(video: Path) -> None:
    """In a session of its own, its priority would count for nothing on a Linux with autogroups."""
    before = children()
    sampled = sample_frames(video, 1)
    next(sampled)
    (pid,) = children() - before

    assert os.getpriority(os.PRIO_PROCESS, pid) == frames.NICE
    assert os.getsid(pid) == os.getsid(0) and os.getpgid(pid) == pid != os.getpgid(0)
    sampled.close()


def test_closing_the_generator_ends_the_process(video: Path) -> None:
    before = children()
    sampled = sample_frames(video, 1)
    assert children() == before  # nothing starts before the first frame is asked for
    next(sampled)
    (pid,) = children() - before
    sampled.close()

    assert not is_alive(pid)


def test_an_error_of_the_caller_ends_the_process(video: Path) -> None:
    before = children()
    with pytest.raises(KeyboardInterrupt), contextlib.closing(sample_frames(video, 1)) as sampled:
        next(sampled)
        raise KeyboardInterrupt

    assert children() == before


def test_progress_is_told_and_may_end_the_sampling(video: Path) -> None:
    before = children()
    times_s: list[float] = []

    def note_until_the_third(time_s: float) -> None:
        times_s.append(time_s)
        if len(set(times_s)) == 3:
            raise Canceled("The job was canceled.")

    sampled = sample_frames(video, 1, on_progress=note_until_the_third)
    with pytest.raises(Canceled):
        list(sampled)

    assert sorted(set(times_s))[:2] == [0.0, 1.0]
    assert children() == before


def test_progress_is_told_between_frames_that_lie_far_apart(video: Path, decoder: Callable[[str], None]) -> None:
    decoder("from pipeline import decoder\ndecoder.PROGRESS_S = 0\nfrom pipeline import decoder_process as p; p.main()")
    times_s: list[float] = []

    (frame,) = sample_frames(video, 0.1, on_progress=times_s.append)

    assert frame.timestamp_ms == 0
    assert len(set(times_s)) > 10


def test_the_process_ends_when_its_parent_is_killed(video: Path) -> None:
    code = (
        "import sys, time; from pipeline.frames import sample_frames; from test_frames import children\n"
        "sampled = sample_frames(sys.argv[1], 25); next(sampled); print(*children(), flush=True); time.sleep(60)"
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(video)], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout
    (pid,) = map(int, parent.stdout.readline().split())
    assert is_alive(pid)
    parent.kill()
    parent.communicate()

    ends_s = time.monotonic() + 20
    while is_alive(pid) and time.monotonic() < ends_s:
        time.sleep(0.01)
    assert not is_alive(pid)


@pytest.mark.parametrize(
    ("signal_number", "words"),
    [
        (signal.SIGSEGV, r"it crashed \(SIGSEGV\)"),
        (signal.SIGABRT, r"it crashed \(SIGABRT\)"),
        (signal.SIGKILL, "it was killed from outside, perhaps since this host ran out of memory"),
    ],
)
def test_a_dead_process_is_an_error_that_says_when(odd: Path, signal_number: signal.Signals, words: str) -> None:
    before = children()
    sampled = sample_frames(odd / "delay2s.mp4", 25)  # more frames than the pipe holds
    times_ms = [next(sampled).timestamp_ms for _ in range(3)]
    (pid,) = children() - before
    os.kill(pid, signal_number)

    with pytest.raises(DecoderStopped, match=rf"^The decoder stopped at 2\.\d+ s of the video: {words}") as failure:
        times_ms.extend(frame.timestamp_ms for frame in sampled)
    assert times_ms == list(range(2000, times_ms[-1] + 1, 40))
    assert f"stopped at {times_ms[-1] / 1000:.3f} s" in str(failure.value)
    assert "Re-encode" in str(failure.value)
    assert children() == before


def test_a_process_that_hangs_is_ended() -> None:
    before = children()
    sampled = sample_frames(SAMPLE_VIDEO, 25, limits=DecodeLimits(idle_s=1.5))  # more frames than the pipe holds
    next(sampled)
    (pid,) = children() - before
    os.kill(pid, signal.SIGSTOP)

    with pytest.raises(DecoderStopped, match=r"it did nothing for 1\.5 s \(limit idle_s\)"):
        list(sampled)
    assert not is_alive(pid)


def test_a_caller_that_takes_its_time_is_no_reason_to_end_the_process(video: Path) -> None:
    sampled = sample_frames(video, 1, limits=DecodeLimits(idle_s=1))
    next(sampled)
    time.sleep(1.2)

    assert len(list(sampled)) == 2


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("print('Hello')", "it sent what is no event"),
        ("pass", r"it ended without a word \(exit code 0\)"),
        ("import sys; sys.exit(3)", r"it ended without a word \(exit code 3\)"),
        ("import sys; sys.stdout.write('{\"event\": ')", r"it ended without a word \(exit code 0\)"),
        ("import os; os.kill(os.getpid(), 40)", r"it crashed \(signal 40\)"),
        ("import no_such_module", r"it ended without a word \(exit code 1\)"),
    ],
)
def test_a_process_that_makes_no_sense_is_an_error_of_ours(
    video: Path, decoder: Callable[[str], None], code: str, words: str
) -> None:
    decoder(code)

    with pytest.raises(DecoderStopped, match=rf"stopped before it had read anything of the video: {words}"):
        probe(video)


def test_a_process_that_cannot_start_is_an_error_of_ours(video: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames, "COMMAND", ["/no/such/python"])

    with pytest.raises(DecoderStopped, match="could not be started: No such file"):
        probe(video)


def test_an_error_in_the_decoder_is_reported_with_its_place_in_the_log(
    video: Path, decoder: Callable[[str], None], caplog: pytest.LogCaptureFixture
) -> None:
    decoder(
        "from pipeline import decoder_process\n"
        "def decode_video(*args, **more): raise ZeroDivisionError('ha')\n"
        "decoder_process.decode_video = decode_video; decoder_process.main()"
    )

    with pytest.raises(DecoderStopped, match=r"an error of its own: ZeroDivisionError: ha\. Please report it"):
        probe(video)
    assert "in decode_video" in caplog.text


# What it may take

CONFINED = "from pipeline.decoder_process import confine; from pipeline.sampling import DecodeLimits\n"


def test_cpu_time_is_limited(video: Path, decoder: Callable[[str], None]) -> None:
    decoder(CONFINED + "confine(DecodeLimits(cpu_s=1))\nwhile True: pass")

    with pytest.raises(DecoderStopped, match=r"it took more CPU time than 1 s and 5 s for each second of video"):
        probe(video, DecodeLimits(cpu_s=1))


def cpu_limits_s(earnings: str) -> list[int]:
    """The CPU time allowed after these steps, in a process of its own, with 60 s and 2 s for each second of video."""
    code = (
        "import resource; from pipeline.decoder_process import CpuAllowance, confine\n"
        "from pipeline.sampling import DecodeLimits\n"
        "limits = DecodeLimits(cpu_s=60, cpu_s_per_video_s=2); confine(limits); allowance = CpuAllowance(limits)\n"
        f"for time_s in {earnings}: allowance.earn(time_s); print(resource.getrlimit(resource.RLIMIT_CPU)[0])"
    )
    return list(map(int, subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).split()))


def test_cpu_time_grows_with_what_the_video_has_shown() -> None:
    assert cpu_limits_s("[0, 1, 2.5, 5]") == [60, 62, 65, 70]


def test_a_few_frames_far_apart_earn_no_hours_of_cpu_time() -> None:
    assert cpu_limits_s("[0, 3600, 7200, 7201]") == [60, 80, 100, 102]


@pytest.fixture(scope="module")
def size_at_start() -> int:
    """The address space of the process before it opens a video, in bytes."""
    code = "import pipeline.decoder_process; print(open('/proc/self/statm').read().split()[0])"
    environment = {**os.environ, **frames.FEW_THREADS}
    pages = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, env=environment, text=True)
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("more_bytes", [1_000_000, 15_000_000, 40_000_000])
def test_memory_is_limited(odd: Path, size_at_start: int, more_bytes: int) -> None:
    """It lacks when the file is opened, when a thread is started, or when a frame is decoded."""
    limits = DecodeLimits(max_memory_bytes=size_at_start + more_bytes)

    with pytest.raises(VideoTooLarge, match=rf"than the {limits.max_memory_bytes:,} bytes .*limit max_memory_bytes\)"):
        list(sample_frames(odd / "real_pq.mp4", 1, limits=limits))


def test_memory_does_not_grow_with_the_video(tmp_path: Path) -> None:
    """PyAV kept each frame whose side data had been looked at: a minute of 4K took all the memory there was."""

    def resident_mb(pid: int) -> float:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

    before = children()
    sampled = sample_frames(write_video(tmp_path / "large.avi", (1600, 1200), num_frames=150), 25)
    for _ in range(20):
        next(sampled)
    (pid,) = children() - before
    early_mb = resident_mb(pid)
    for _ in range(120):
        next(sampled)

    assert resident_mb(pid) < early_mb + 40  # a frame has 3 MB, before and after its conversion
    sampled.close()


def test_a_confined_process_opens_one_file_and_writes_none(tmp_path: Path, decoder: Callable[[str], None]) -> None:
    code = CONFINED + (
        "import socket, sys; confine(DecodeLimits())\n"
        "video = open(sys.argv[1])\n"
        "for opening in (lambda: open('/etc/passwd'), socket.socket):\n"
        "    try: opening()\n"
        "    except OSError as error: print(error.errno)\n"
        "video.close()\n"
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "try: open(sys.argv[1], 'r+b', 0).write(b'x')\n"
        "except OSError as error: print(error.errno)\n"
        "import resource\n"
        "for what in (resource.RLIMIT_NOFILE, resource.RLIMIT_FSIZE, resource.RLIMIT_AS, resource.RLIMIT_CORE):\n"
        "    soft, hard = resource.getrlimit(what); print(soft == hard)"
    )
    (tmp_path / "video").write_text("12345")
    said = subprocess.check_output([sys.executable, "-c", code, str(tmp_path / "video")], cwd=ROOT, text=True)

    # Too many open files, twice; file too large; and no way back.
    assert said.split() == ["24", "24", "27", "True", "True", "True", "True"]
    assert (tmp_path / "video").read_text() == "12345"


def test_the_process_gets_no_secrets(
    video: Path, monkeypatch: pytest.MonkeyPatch, decoder: Callable[[str], None]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    decoder("import os, sys; sys.exit(7 if 'HF_TOKEN' in os.environ else 8 if 'PATH' in os.environ else 9)")

    with pytest.raises(DecoderStopped, match="exit code 8"):
        probe(video)


def test_no_decoder_is_loaded_into_the_callers_process(video: Path) -> None:
    code = "import sys; from pipeline.frames import probe; probe(sys.argv[1]); print({'av', 'cv2'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code, str(video)], cwd=ROOT, capture_output=True, text=True)

    assert run.stdout.strip() == "set()"


# Limits


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        (DecodeLimits(max_video_bytes=10_000), r"has [\d,]+ bytes; 10,000 are the most .*limit max_video_bytes\)"),
        (DecodeLimits(max_pixels=1000), r"have 64 x 48 pixels; 1,000 in all .*limit max_pixels\)"),
        (DecodeLimits(max_duration_s=2), r"lasts 0:03; 0:02 is the most .*limit max_duration_s\)"),
        (DecodeLimits(max_frames=2), r"about 3 frames; 2 are the most .*limit max_frames\)"),
    ],
)
def test_what_is_beyond_a_limit_is_refused_before_a_frame(video: Path, limits: DecodeLimits, words: str) -> None:
    with pytest.raises(VideoTooLarge, match=words):
        next(sample_frames(video, 1, limits=limits))


def test_a_window_within_the_limits_is_fine(video: Path) -> None:
    assert len(list(sample_frames(video, 1, end_s=2, limits=DecodeLimits(max_duration_s=2)))) == 2
    assert len(list(sample_frames(video, 1, max_frames=2, limits=DecodeLimits(max_frames=2)))) == 2


@pytest.mark.parametrize(
    ("limits", "times_ms", "words"),
    [
        (DecodeLimits(max_duration_s=2.5), [0, 1000, 2000], r"goes on after that; 0:02 is .*limit max_duration_s\)"),
        (DecodeLimits(max_frames=2), [0, 1000], r"has more frames; 2 are the most .*limit max_frames\)"),
    ],
)
def test_a_file_that_does_not_say_its_length_ends_at_the_limit(
    odd: Path, limits: DecodeLimits, times_ms: list[int], words: str
) -> None:
    sampled = sample_frames(odd / "pipe_nodur.webm", 1, limits=limits)

    assert [next(sampled).timestamp_ms for _ in times_ms] == times_ms
    with pytest.raises(VideoTooLarge, match=words):
        next(sampled)


# One frame by its time


@pytest.mark.parametrize("name", ["vfr.mp4", "interlaced.mp4", "delay2s.mp4", "pipe_nodur.webm", "two_video.mkv"])
def test_a_frame_is_found_again_by_its_timestamp(odd: Path, name: str) -> None:
    for frame in list(sample_frames(odd / name, 1))[-2:]:
        found = seek_frame(odd / name, frame.timestamp_ms)
        assert found is not None and found.timestamp_ms == frame.timestamp_ms
        assert np.array_equal(found.image, frame.image)


def test_a_late_frame_is_found_without_decoding_what_comes_before() -> None:
    """Frames are numbered from where decoding began."""
    (late,) = sample_frames(SAMPLE_VIDEO, 1, start_s=24)
    found = seek_frame(SAMPLE_VIDEO, late.timestamp_ms)

    assert found is not None and np.array_equal(found.image, late.image)
    assert found.frame_idx < late.frame_idx


def test_a_time_at_which_no_frame_is_shown_gives_none(video: Path) -> None:
    assert seek_frame(video, 1001) is None
