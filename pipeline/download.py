"""Download a video from a stranger's URL into a file: whole, in time, and only if it is a video.

safe_http.py sends each request and keeps it off private addresses; this module follows redirects, tries again, counts
bytes and writes. While it runs, the bytes are in a `.part` file beside the destination. That file is renamed when it is
complete and on the disk, and removed on any failure; only a killed process leaves it behind, for the next download to
the same destination to overwrite.
"""

import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from pipeline.addresses import IPAddress, is_public
from pipeline.atomic import sync_folder
from pipeline.errors import DownloadFailed, UnsupportedUrl, VideoUnreadable
from pipeline.safe_http import Answer, ExchangeFailed, Network, Watch, retry_after_s, send
from pipeline.sampling import DEFAULT_LIMITS as DECODE_LIMITS
from pipeline.sampling import too_many_bytes
from pipeline.sniff import HEAD_BYTES, sniff
from pipeline.urls import UrlRefused, UrlRules, WebUrl, check_url, shown

REDIRECTS = (301, 302, 303, 307, 308)
STATUS_MEANINGS = {
    401: ": it wants a login",
    403: ": it forbids the download, or the link has expired",
    404: ": there is no such file",
    410: ": the file is gone",
}
ADVICE = "Check the link in a browser, or download the video yourself and send the file."
# Pages that people take for videos: (host, what to call it).
PAGES = (
    (r"(.+\.)?(youtube\.com|youtu\.be|youtube-nocookie\.com)", "a YouTube watch page"),
    (r"(.+\.)?vimeo\.com", "a Vimeo page"),
    (r"(.+\.)?(tiktok|instagram|facebook|twitter|x|twitch|dailymotion)\.(com|tv)", "a page of a social network"),
    (r"(drive|docs)\.google\.com", "a Google Drive page"),
    (r"(.+\.)?dropbox\.com", "a Dropbox page (its file comes with dl=1 at the end of the link)"),
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DownloadLimits:
    """How much a download may take."""

    max_video_bytes: int = DECODE_LIMITS.max_video_bytes
    connect_s: float = 10  # for name, connection and TLS, of each request
    idle_s: float = 30  # for the head of an answer, and for each pause in its body
    total_s: float = 3600  # for all tries together
    min_bytes_per_s: float = 20_000  # on average, of a body that has come for slow_after_s
    slow_after_s: float = 60
    max_redirects: int = 5
    max_tries: int = 3
    backoff_s: float = 1  # doubles with each try
    max_retry_after_s: float = 60  # a server that asks for more is not waited for


DEFAULT_LIMITS, DEFAULT_RULES, DEFAULT_NETWORK = DownloadLimits(), UrlRules(), Network()


@dataclass(frozen=True)
class Download:
    """A video that has arrived."""

    path: Path
    url_shown: str  # of the last redirect, for logs and messages
    num_bytes: int
    container: str  # a key of sniff.CONTAINERS
    content_type: str | None  # as claimed by the server
    num_tries: int
    seconds: float


def download(
    url: str,
    destination: str | os.PathLike[str],
    *,
    limits: DownloadLimits = DEFAULT_LIMITS,
    rules: UrlRules = DEFAULT_RULES,
    on_progress: Callable[[int, int | None], None] | None = None,
    is_cancelled: Callable[[], bool] | None = None,
    network: Network = DEFAULT_NETWORK,
) -> Download:
    """Download the video at url to destination, replacing what is there.

    on_progress gets the bytes received and the total, None where the server does not say; a new try begins at 0 again.
    is_cancelled is asked at least twice a second, except while a connection is being made.

    Raises UnsupportedUrl, DownloadFailed, VideoTooLarge, VideoUnreadable (saying what came instead of a video) or
    Canceled, and leaves nothing behind then."""
    checked, watch = check_video_url(url, rules, network.is_public), Watch(network, limits.total_s, is_cancelled)
    started_s = network.clock()
    fetch = _Fetch(limits, rules, network, watch, on_progress or (lambda num_bytes, num_total_bytes: None))
    try:
        with _part_file(Path(destination)) as file:
            arrived, num_tries = _with_retries(lambda: fetch.follow(checked, file), limits, watch)
    except UrlRefused as error:
        raise UnsupportedUrl(f"Invalid video URL: {error}") from error
    except ExchangeFailed as error:
        raise DownloadFailed(f"The video could not be downloaded from {checked.host}: {error}. {ADVICE}") from error
    seconds = network.clock() - started_s
    logger.info("Downloaded %s: %d bytes in %.1f s", shown(checked), arrived.num_bytes, seconds)
    return Download(
        path=Path(destination),
        url_shown=shown(arrived.url),
        num_bytes=arrived.num_bytes,
        container=arrived.container,
        content_type=arrived.content_type,
        num_tries=num_tries,
        seconds=seconds,
    )


def check_video_url(
    text: str, rules: UrlRules = DEFAULT_RULES, is_public: Callable[[IPAddress], bool] = is_public
) -> WebUrl:
    """Check what the text of a URL tells, without asking a name server. Raises UnsupportedUrl."""
    try:
        return check_url(text, rules, is_public=is_public)
    except UrlRefused as error:
        raise UnsupportedUrl(f"Invalid video URL: {error}") from error


@dataclass(frozen=True)
class _Arrived:
    url: WebUrl  # the last redirect
    num_bytes: int
    container: str
    content_type: str | None


def _with_retries(fetch: Callable[[], _Arrived], limits: DownloadLimits, watch: Watch) -> tuple[_Arrived, int]:
    """Fetch until it succeeds; say how many tries that took. Raises what the last try raised."""
    for num_tries in range(1, limits.max_tries):
        try:
            return fetch(), num_tries
        except ExchangeFailed as error:
            if not error.is_transient:
                raise
            wait_s = max(limits.backoff_s * 2 ** (num_tries - 1), error.retry_after_s or 0)
            logger.info("Try %d of %d failed: %s. Next in %.0f s", num_tries, limits.max_tries, error, wait_s)
        watch.sleep(wait_s)
    return fetch(), limits.max_tries


@dataclass(frozen=True)
class _Fetch:
    """One try, from the first URL to the last byte."""

    limits: DownloadLimits
    rules: UrlRules
    network: Network
    watch: Watch
    on_progress: Callable[[int, int | None], None]

    def follow(self, url: WebUrl, file: FileIO) -> _Arrived:
        """Follow redirects to the video and write it to file from its beginning."""
        asked = url
        for _ in range(self.limits.max_redirects + 1):
            with send(
                "GET",
                url,
                rules=self.rules,
                network=self.network,
                watch=self.watch,
                connect_s=self.limits.connect_s,
                idle_s=self.limits.idle_s,
                headers={"Accept": "*/*", "Accept-Encoding": "identity"},
            ) as answer:
                if answer.status not in REDIRECTS:
                    return self._receive(asked, url, answer, file)
                url = self._redirected(url, answer)
        raise ExchangeFailed(f"it redirects more than {self.limits.max_redirects} times", is_transient=False)

    def _redirected(self, url: WebUrl, answer: Answer) -> WebUrl:
        location = answer.headers.get("location")
        if not location:
            raise ExchangeFailed("it redirects to nowhere", is_transient=False)
        try:
            target = check_url(location, self.rules, base=url, is_public=self.network.is_public)
        except UrlRefused as error:
            raise UrlRefused(f"it redirects to a URL that is refused, as {error}") from error
        if (url.scheme, target.scheme) == ("https", "http"):
            raise UrlRefused("it redirects from https to http. Use the link of a server that stays with https.")
        return target

    def _receive(self, asked: WebUrl, url: WebUrl, answer: Answer, file: FileIO) -> _Arrived:
        num_total_bytes = self._check_head(answer)
        with _storing():
            file.seek(0)
            file.truncate()
        head, container, num_bytes, started_s = b"", None, 0, self.network.clock()
        for chunk in answer.chunks:
            num_bytes += len(chunk)
            self._check_size(num_bytes, "more bytes")
            self._check_speed(num_bytes, self.network.clock() - started_s)
            if container is None:
                head += chunk
                if len(head) >= HEAD_BYTES:
                    container = _sniff(head[:HEAD_BYTES], asked, url)
            _write(file, chunk)
            self.on_progress(num_bytes, num_total_bytes)
        container = container or _sniff(head, asked, url)
        return _Arrived(url, num_bytes, container, answer.headers.get("content-type"))

    def _check_head(self, answer: Answer) -> int | None:
        """Return the announced size of the body, which httpcore2 holds the server to."""
        status, headers = answer.status, answer.headers
        if status == 429 or status >= 500:
            wait_s = retry_after_s(headers)
            is_transient = (wait_s or 0) <= self.limits.max_retry_after_s
            wish = f" and asks to come back in {wait_s:.0f} s" if wait_s else ""
            raise ExchangeFailed(f"it answered {status}{wish}", is_transient=is_transient, retry_after_s=wait_s)
        if status != 200:
            raise ExchangeFailed(f"it answered {status}{STATUS_MEANINGS.get(status, '')}", is_transient=False)
        encoding = headers.get("content-encoding", "").strip().lower()
        if encoding not in ("", "identity"):
            raise ExchangeFailed("it sends the file compressed, though asked not to", is_transient=False)
        if "transfer-encoding" in headers or "content-length" not in headers:
            return None
        num_total_bytes = int(headers["content-length"])
        self._check_size(num_total_bytes, f"{num_total_bytes:,} bytes")
        return num_total_bytes

    def _check_speed(self, num_bytes: int, seconds: float) -> None:
        """A body that drips would hold up the jobs behind it for an hour."""
        if seconds > self.limits.slow_after_s and num_bytes < self.limits.min_bytes_per_s * seconds:
            raise ExchangeFailed(f"it sends only {num_bytes / seconds:,.0f} bytes a second", is_transient=False)

    def _check_size(self, num_bytes: int, how_many: str) -> None:
        if num_bytes > self.limits.max_video_bytes:
            raise too_many_bytes(how_many, self.limits.max_video_bytes)


def _sniff(head: bytes, asked: WebUrl, url: WebUrl) -> str:
    """Name the container. Raises VideoUnreadable saying what came instead."""
    try:
        return sniff(head)
    except VideoUnreadable as error:
        if not re.search(rb"<(!doctype\s+)?html|<head|<body", head, re.IGNORECASE):
            raise
        pages = [name for host, name in PAGES if re.fullmatch(host, asked.host) or re.fullmatch(host, url.host)]
        looks_like = f": this looks like {pages[0]}" if pages else ""
        raise VideoUnreadable(
            f"What came is an HTML page{looks_like}, not a video file. "
            "Use the address of the video itself, or download it yourself and send the file."
        ) from error


@contextmanager
def _part_file(destination: Path) -> Iterator[FileIO]:
    """A new file that becomes the destination at the end of the block, or nothing if that raises."""
    part = destination.with_name(destination.name + ".part")
    with _storing():
        file = FileIO(part, "w")  # unbuffered: a full disk shows at the write, and only there
    try:
        with file:
            yield file
            with _storing():
                os.fsync(file.fileno())
        with _storing():
            os.replace(part, destination)
            sync_folder(destination.absolute().parent)
    finally:
        part.unlink(missing_ok=True)


def _write(file: FileIO, chunk: bytes) -> None:
    rest = memoryview(chunk)
    with _storing():
        while rest:
            rest = rest[file.write(rest) :]


@contextmanager
def _storing() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DownloadFailed(
            f"The video cannot be stored: {error.strerror}. Make room, or choose another folder."
        ) from error
