"""The Gradio app: one page, and the endpoints for gradio_client.

The page is ours (viewer/): one custom component, which talks to the JSON API from the browser. Gradio gives the server
and the named endpoints, which answer the same dictionaries as the API. Test: pytest tests/test_ui.py
"""

import asyncio
import logging
import os
import secrets
import shutil
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import gradio as gr
from gradio import processing_utils
from gradio.events import api as named_endpoint
from gradio.themes import Base
from gradio.utils import get_upload_folder
from pydantic import ValidationError

from jobs.api import checked, page_of, status_of
from jobs.api_ask import ask_frame
from jobs.auth import Caller, rate_key
from jobs.http import UNEXPECTED, Api, count_request, invalid
from jobs.job_files import storing
from jobs.record import FINISHED, Upload
from jobs.schema import UPLOAD, JobRequest, JobStatusName, Submitted
from pipeline.download import check_video_url
from pipeline.errors import DescriberError, InvalidOption, JobRunning
from pipeline.moondream.prompts import DEFAULT_QUESTION
from pipeline.sampling import too_many_bytes
from pipeline.sniff import HEAD_BYTES, sniff

FOLDER = Path(__file__).parent / "viewer"
SCRIPTS = ("base", "form", "player", "list", "strip", "usage", "ask", "viewer", "jobs", "main")
STYLES = ("gradio", "base", "form", "viewer", "ask", "jobs")
LONGEST_WAIT_S = 15.0
MAX_EVENTS = 1000  # calls of gradio_client and questions of the page that may wait; more are answered 503
WAIT_S = 1.0  # between two answers of wait, at least


def css() -> str:
    return "\n".join((FOLDER / f"{name}.css").read_text(encoding="utf-8") for name in STYLES)


LAUNCH: dict[str, Any] = {
    "prevent_thread_lock": True,
    "quiet": True,
    "show_error": False,
    "share": False,  # whatever the environment says: no public tunnel
    "ssr_mode": False,  # its front server would answer /api with the page
    "run_history": False,
    "state_session_capacity": 100,  # of 60 KB each; nothing of ours is in them
    "enable_monitoring": False,
    "mcp_server": False,  # likewise
    "footer_links": [],
    "theme": Base(),
    "css": css(),
}


def make_page() -> gr.HTML:
    """The whole page as one component. (No subclass: Gradio would write a stub file for that into this folder.)"""
    script = "\n".join((FOLDER / f"{name}.js").read_text(encoding="utf-8") for name in SCRIPTS)
    template = (FOLDER / "page.html").read_text(encoding="utf-8")
    return gr.HTML(
        {}, html_template=template, js_on_load=script, apply_default_css=False, container=False, padding=False
    )


async def _as_it_is(data: Any, *_: Any, **__: Any) -> Any:
    return data


def build(api: Api) -> gr.Blocks:
    """The Blocks app over an API. Until set_capacity says more, one event at a time uses the model."""
    # Gradio looks through all that goes in and out for what says that it is a file, anywhere in a job's metadata, too:
    # it would fetch its URL, into memory and past our rules, or copy its path. Our only file is submit_file's.
    processing_utils.async_move_files_to_cache = _as_it_is
    endpoints = Endpoints(api)
    with gr.Blocks(title="Moonreel", analytics_enabled=False) as blocks:
        make_page()
        for name, endpoint in endpoints.named().items():
            named_endpoint(endpoint, api_name=name, concurrency_limit=None)
        named_endpoint(endpoints.ask, api_name="ask", api_visibility="undocumented", concurrency_limit=1)
    return blocks.queue(api_open=False, max_size=MAX_EVENTS, default_concurrency_limit=1)


def set_capacity(blocks: gr.Blocks, num_slots: int) -> None:
    """Let as many events use the model as frames fit into it: known only when it is loaded, after the page is there.
    Gradio looks at these numbers when an event comes, and when one could begin."""
    for limited in (*blocks.fns.values(), *blocks._queue.event_queue_per_concurrency_id.values()):
        if limited.concurrency_limit is not None:
            limited.concurrency_limit = num_slots
    blocks._queue.default_concurrency_limit = num_slots


logger = logging.getLogger(__name__)


class Endpoints:
    """What gradio_client can call. The docstrings are what it shows."""

    def __init__(self, api: Api) -> None:
        self._api = api

    def named(self) -> dict[str, Any]:
        return {
            "submit": self.submit,
            "submit_file": self.submit_file,
            "status": self.status,
            "list": self.list_jobs,
            "wait": self.wait,
            "result": self.result,
            "cancel": self.cancel,
        }

    async def submit(
        self,
        video_url: str,
        target_fps: float = 1.0,
        question: str = DEFAULT_QUESTION,
        request: gr.Request | None = None,
    ) -> dict:
        """Submit a video by its URL -> {job_id, status, message}."""
        with told():
            check_video_url(video_url, self._api.rules)
            return await self._add(request, video_url, target_fps, question, None)

    async def submit_file(
        self,
        file: gr.FileData,
        target_fps: float = 1.0,
        question: str = DEFAULT_QUESTION,
        request: gr.Request | None = None,
    ) -> dict:
        """Submit a video file, as handle_file("video.mp4") -> {job_id, status, message}."""
        with told():
            sent = cast(Any, file)  # what the caller has sent, whatever its type says
            upload = await self._api.in_thread(self._take_over, _uploaded(sent))
            name = Path(str(sent.get("orig_name") or "video")).name
            return await self._add(request, UPLOAD + name, target_fps, question, upload)

    async def status(self, job_id: str, include_results: bool = False, request: gr.Request | None = None) -> dict:
        """All about a job; with include_results, the results of a completed one, too."""
        with told():
            return await self._status(job_id, include_results, request)

    async def list_jobs(
        self, limit: int = 10, status_filter: str = "", cursor: str = "", request: gr.Request | None = None
    ) -> dict:
        """Your jobs, newest first -> {jobs, total_count, next_cursor}."""
        with told():
            number = str(int(cursor)) if cursor.isdecimal() else ""
            page = (self._caller(request), max(1, min(100, limit)), cast(JobStatusName, status_filter) or None, number)
            return await self._api.in_thread(page_of, self._api, *page)

    async def wait(self, job_id: str, request: gr.Request | None = None) -> AsyncIterator[dict]:
        """Follow a job: its status at each change, about once a second at most; the last one is that of its end."""
        with told():
            while True:
                version = self._api.store.changes.version(job_id)
                shown = await self._status(job_id, False, request)
                yield shown
                if shown["status"] in FINISHED or self._api.is_stopping():
                    return
                await self._api.store.changes.wait(job_id, version, LONGEST_WAIT_S)
                await asyncio.sleep(WAIT_S)

    async def result(self, job_id: str, request: gr.Request | None = None) -> dict:
        """The results_payload of a completed job."""
        with told():
            shown = await self._status(job_id, True, request)
            if shown["results_payload"] is None:
                raise JobRunning(
                    f"The job is {shown['status']}: there are no complete results. {shown['error_message'] or ''}"
                )
            return shown["results_payload"]

    async def cancel(self, job_id: str, request: gr.Request | None = None) -> dict:
        """Cancel a job that waits or runs; what it described is kept."""
        with told():
            self._api.own(job_id, self._caller(request))
            record = await self._api.in_thread(self._api.store.cancel, job_id)
            shown = self._api.shown(record, self._caller(request))
            return await self._api.in_thread(status_of, self._api, shown, False)

    async def ask(self, job_id: str, frame_idx: int, question: str, request: gr.Request | None = None) -> dict:
        """For the page: the answer to a question about one frame, in its turn."""
        with told():
            caller = self._caller(request)
            assert request is not None and request.request is not None
            count_request(self._api, request.request, caller)
            who = rate_key(request.request, caller)
            return await ask_frame(self._api, caller, who, job_id, frame_idx, question)

    def _caller(self, request: gr.Request | None) -> Caller:
        """Raises Unauthorized."""
        assert request is not None and request.request is not None  # Gradio fills it in
        return self._api.gate.identify(request.request)

    async def _status(self, job_id: str, include_results: bool, request: gr.Request | None) -> dict[str, Any]:
        record = self._api.own(job_id, self._caller(request))
        return await self._api.in_thread(status_of, self._api, record, include_results)

    async def _add(
        self, request: gr.Request | None, video_url: str, target_fps: float, question: str, upload: Upload | None
    ) -> dict[str, Any]:
        caller = self._caller(request)
        assert request is not None and request.request is not None
        count_request(self._api, request.request, caller)
        asked = {"video_url": video_url, "target_fps": target_fps, "question": question}
        job = JobRequest.model_validate(asked)
        job_id = await self._api.in_thread(self._api.store.add, checked(job, self._api), caller.owner, upload, None)
        return Submitted(job_id=job_id).model_dump()

    def _take_over(self, path: Path) -> Upload:
        """Take an upload out of Gradio's folder, which is emptied again and again.

        Raises VideoUnreadable, VideoTooLarge, StorageFull."""
        self._api.store.check_space()
        num_bytes, most = path.stat().st_size, self._api.decode_limits.max_video_bytes
        if num_bytes > most:
            raise too_many_bytes(f"{num_bytes:,} bytes", most)
        with path.open("rb") as file:
            container = sniff(file.read(HEAD_BYTES))
        incoming = self._api.store.files.incoming / secrets.token_hex(16)
        # Gradio names a file by its content, so that somebody who sends the same one just now needs the name, too:
        # it stays for an hour (gradio_uploads.py). The same upload again gets a new file under it, so a link is safe.
        with storing():
            try:
                os.link(path, incoming)
            except OSError:  # not every file system knows links
                shutil.copyfile(path, incoming)
        return Upload(incoming, container)


def _uploaded(file: Any) -> Path:
    """Where /gradio_api/upload has put a file. Raises InvalidOption for whatever else is given as one."""
    path = Path(str(file.get("path")) if isinstance(file, dict) else "").resolve()
    if not path.is_relative_to(Path(get_upload_folder()).resolve()) or not path.is_file():
        raise InvalidOption('file: send it along, as handle_file("video.mp4"). A URL goes to submit.')
    return path


@contextmanager
def told() -> Iterator[None]:
    """Tell the caller what is wrong, in the API's words."""
    try:
        yield
    except ValidationError as error:
        raise gr.Error(str(invalid(error)), print_exception=False) from error
    except DescriberError as error:
        raise gr.Error(str(error), print_exception=False) from error
    except Exception as error:
        logger.exception("An endpoint failed unexpectedly")
        raise gr.Error(UNEXPECTED, print_exception=False) from error
