"""A file makes the decoder read no other file and no network, whatever it says and whatever it is called.

A trap is set: a file whose openings are counted, and a server that counts connections. The first tests show that
FFmpeg, left to itself, walks into both.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import av
import pytest
from av.error import FFmpegError
from file_watch import FileWatch, watching
from indirections import HEADS, NAMES, PLAYLISTS, indirections
from local_server import Lab, LocalServer, fetch, http
from video_files import write_video

from pipeline.errors import DescriberError, InputError, VideoUnreadable
from pipeline.frames import probe, sample_frames


@dataclass
class Trap:
    path: Path
    watch: FileWatch
    server: LocalServer

    @property
    def url(self) -> str:
        return f"http://127.0.0.2:{self.server.port}/canary.mp4"

    def is_untouched(self) -> bool:
        return not self.watch.was_opened() and self.server.num_connections == 0


@pytest.fixture(scope="module")
def movie(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five grey frames in a MOV, whose index is at its end."""
    return write_video(tmp_path_factory.mktemp("movie") / "grey.mov", fps=5, num_frames=5)


@pytest.fixture
def trap(tmp_path: Path, movie: Path) -> Iterator[Trap]:
    folder = tmp_path / "trap"
    folder.mkdir()
    path = folder / "canary.mov"
    path.write_bytes(movie.read_bytes())
    server = LocalServer("127.0.0.2")
    server.replies["/canary.mp4"] = [http(path.read_bytes())]
    with watching(path) as watch:
        yield Trap(path, watch, server)
    server.stop()


def attack(trap: Trap, movie: Path, name: str) -> bytes:
    content = dict(indirections(trap.path, trap.url, movie))[name]
    trap.watch.was_opened()
    return content


ATTACKS = [name for name, _ in indirections(Path("/x"), "http://127.0.0.2:1/x", Path(__file__))]


# The trap works


@pytest.mark.parametrize(
    ("name", "called", "options"),
    [
        ("m3u8 with a path", "clip.m3u8", {"allowed_extensions": "ALL", "extension_picky": "0"}),
        ("ffconcat with a name", "clip.mp4", {}),
        ("mov that says where its samples are", "clip.mov", {"enable_drefs": "1", "use_absolute_path": "1"}),
    ],
)
def test_ffmpeg_by_itself_opens_other_files(
    trap: Trap, movie: Path, name: str, called: str, options: dict[str, str]
) -> None:
    path = trap.path.with_name(called)
    path.write_bytes(attack(trap, movie, name))
    with av.open(str(path), options=options) as container:
        assert len(list(container.decode(video=0))) == 5

    assert trap.watch.was_opened()


def test_ffmpeg_by_itself_connects(trap: Trap, movie: Path) -> None:
    path = trap.path.with_name("clip.m3u8")
    path.write_bytes(attack(trap, movie, "m3u8 with a URL"))
    with contextlib.suppress(FFmpegError), open(str(path), "rb") as playlist:  # given a name, it keeps to files
        av.open(playlist, options={"allowed_extensions": "ALL", "extension_picky": "0"}).close()

    assert trap.server.num_connections > 0


# Nothing of ours walks into it


@pytest.mark.parametrize("name", ATTACKS)
def test_a_file_opens_no_other(trap: Trap, movie: Path, name: str) -> None:
    """Under the names by turns: FFmpeg is told none of them."""
    content, number = attack(trap, movie, name), ATTACKS.index(name)
    for called in ("clip.m3u8", NAMES[number % len(NAMES)], NAMES[(number + 3) % len(NAMES)]):
        path = trap.path.with_name(called)
        path.write_bytes(content)
        with pytest.raises(InputError):
            list(sample_frames(path, 5))
        path.unlink()

    assert trap.is_untouched()


@pytest.mark.parametrize("name", ATTACKS)
def test_a_download_opens_no_other(
    trap: Trap, movie: Path, name: str, lab: Lab, server: LocalServer, tmp_path: Path
) -> None:
    server.replies["/clip.mp4"] = [http(attack(trap, movie, name), headers=("Content-Type: video/mp4",))]
    folder = tmp_path / "download"
    folder.mkdir()
    with pytest.raises(DescriberError):
        arrived = fetch(lab, f"http://video.example:{server.port}/clip.mp4", folder, server)
        list(sample_frames(arrived.path, 5))

    assert trap.is_untouched()


@pytest.mark.parametrize("name", PLAYLISTS)
def test_a_playlist_does_not_reach_the_decoder(trap: Trap, movie: Path, name: str) -> None:
    path = trap.path.with_name("clip.mp4")
    path.write_bytes(attack(trap, movie, name))

    with pytest.raises(VideoUnreadable, match=r"^This file is (a playlist|text|a web page), not a video"):
        probe(path)


@pytest.mark.parametrize("called", NAMES)
def test_a_video_is_read_whatever_its_name(trap: Trap, movie: Path, called: str) -> None:
    path = trap.path.with_name(called)
    path.write_bytes(movie.read_bytes())
    for number in range(3):
        trap.path.with_name(f"s_{number:03}.jpg").write_bytes(b"\xff\xd8\xff")
    trap.path.with_name("a.mp4").write_bytes(b"")

    assert [frame.timestamp_ms for frame in sample_frames(path, 5)] == [0, 200, 400, 600, 800]
    assert trap.is_untouched()


@pytest.mark.parametrize("container", HEADS)
def test_the_first_bytes_choose_the_demuxer(tmp_path: Path, movie: Path, container: str) -> None:
    """FFmpeg looks for itself what a file is; here it may not."""
    path = tmp_path / "clip.mov"
    path.write_bytes(HEADS[container] + bytes(300) + movie.read_bytes())

    with pytest.raises(VideoUnreadable, match=r"cannot be decoded|not a video|No frame"):
        list(sample_frames(path, 5))
