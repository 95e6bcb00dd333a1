"""The door by which gradio_client uploads: a file comes first; submit_file, which names it then, links it (ui.py).

What comes here counts as any other upload does, and its name here is deleted within the hour: Gradio itself would keep
it for ever. Test: pytest tests/test_gradio_uploads.py
"""

import shutil
import time
from pathlib import Path

from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jobs.doors import route_path
from jobs.http import Api, count_upload, refusal
from pipeline.errors import DescriberError, RateLimited

PATH = "/gradio_api/upload"
KEPT_S, SWEEP_S = 3600.0, 300.0


def bounded(app: ASGIApp, api: Api) -> ASGIApp:
    """Refuse an upload where there is no room, and count its bytes as they come."""

    async def counted(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or route_path(scope) != PATH:
            return await app(scope, receive, send)
        request = HTTPConnection(scope)
        try:
            caller = api.gate.identify(request)
            await api.in_thread(api.store.check_space)
        except DescriberError as error:
            return await refusal(error)(scope, receive, send)
        if not api.upload_slots.acquire(blocking=False):
            too_many = RateLimited("Too many uploads at once. Try again in a minute.", 60)
            return await refusal(too_many)(scope, receive, send)

        async def receive_counted() -> Message:
            message = await receive()
            count_upload(api, request, caller, len(message.get("body", b"")))  # what it raises, the app answers
            return message

        try:
            await app(scope, receive_counted, send)
        finally:
            api.upload_slots.release()

    return counted


def sweep(folder: Path, kept_s: float = KEPT_S) -> int:
    """Delete what lies in Gradio's folder for uploads since so long. -> how many"""
    oldest, swept = time.time() - kept_s, 0
    for path in folder.iterdir() if folder.is_dir() else ():
        try:
            if path.stat().st_mtime <= oldest:
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()
                swept += 1
        except OSError:  # taken over meanwhile
            continue
    return swept
