"""Receive an uploaded video: a multipart form, written to the disk as it comes, counted, and told by its first bytes.

streaming-form-data parses; memory holds one chunk. A refused upload leaves nothing behind.
Test: pytest tests/test_uploads.py
"""

import hashlib
import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import Request
from starlette.requests import ClientDisconnect
from streaming_form_data import ParseFailedException, StreamingFormDataParser
from streaming_form_data.targets import BaseTarget, ValueTarget
from streaming_form_data.validators import MaxSizeValidator, ValidationError

from jobs.auth import Caller
from jobs.http import Api, count_upload
from jobs.job_files import storing
from pipeline.atomic import sync_folder
from pipeline.errors import DescriberError, InvalidOption
from pipeline.sampling import too_many_bytes
from pipeline.sniff import HEAD_BYTES, sniff

MAX_FIELD_BYTES = 16_384
MAX_FORM_BYTES = 3 << 20  # of all that is not the file, and what the parser has not handed on yet
CHECK_BYTES = 16_000_000
FEED_BYTES = 1 << 20  # to collect before a thread parses and writes
DRAIN_BYTES = 8 << 20  # of a refused body to read nevertheless: many clients see the answer only after they have sent


@dataclass(frozen=True)
class Received:
    path: Path
    name: str
    container: str
    sha256: str
    fields: dict[str, str]  # of the form, beside the file


class _File(BaseTarget):
    """Writes the file of the form. Raises VideoTooLarge, VideoUnreadable, StorageFull."""

    def __init__(self, path: Path, max_bytes: int, check_space: Callable[[], None]) -> None:
        super().__init__()
        self._check_space, self._checked_bytes = check_space, 0
        self.hash, self.num_bytes, self.container, self.is_complete = hashlib.sha256(), 0, "", False
        self._path, self._max_bytes, self._head = path, max_bytes, b""
        self._file: Any = None

    def on_start(self) -> None:
        if self._file is not None:
            raise InvalidOption("file: the form holds several. Send one video for each job.")
        with storing():
            self._file = self._path.open("wb")

    def on_data_received(self, chunk: bytes) -> None:
        self.num_bytes += len(chunk)
        if self.num_bytes > self._max_bytes:
            raise too_many_bytes("more bytes", self._max_bytes)
        if not self.container and len(self._head) < HEAD_BYTES:
            self._head += chunk[:HEAD_BYTES]
            if len(self._head) >= HEAD_BYTES:
                self.container = sniff(self._head)
        if self.num_bytes - self._checked_bytes >= CHECK_BYTES:  # others fill the disk meanwhile, too
            self._checked_bytes = self.num_bytes
            self._check_space()
        self.hash.update(chunk)
        with storing():
            self._file.write(chunk)

    def on_finish(self) -> None:
        if not self.container:
            self.container = sniff(self._head)
        with storing():
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            sync_folder(self._path.parent)
        self.is_complete = True

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


class _Field(ValueTarget):
    """A field of the form. Raises InvalidOption if it comes twice: ValueTarget would put both texts together."""

    def __init__(self, name: str) -> None:
        super().__init__(validator=MaxSizeValidator(MAX_FIELD_BYTES))
        self._name, self._has_come = name, False

    def on_start(self) -> None:
        if self._has_come:
            raise InvalidOption(f"{self._name}: the form holds several. Send each field once.")
        self._has_come = True


async def receive(request: Request, api: Api, caller: Caller, field_names: list[str]) -> Received:
    """Receive the form. Its file is the caller's to move away, or to remove.

    Raises InvalidOption, VideoTooLarge, VideoUnreadable, StorageFull, RateLimited."""
    path = api.store.files.incoming / secrets.token_hex(16)
    file = _File(path, api.decode_limits.max_video_bytes, api.store.check_space)
    fields = {name: _Field(name) for name in field_names}
    try:
        parser = StreamingFormDataParser(headers=dict(request.headers), strict=True)
        parser.register("file", file)
        for name, target in fields.items():
            parser.register(name, target)
        await _feed(request, api, caller, parser, file)
        if not file.is_complete:
            raise InvalidOption('file: the form has none. Send it as the part "file": curl -F file=@video.mp4 ...')
        values = {name: target.value.decode(errors="replace") for name, target in fields.items() if target.value}
        return Received(path, _name(file.multipart_filename or ""), file.container, file.hash.hexdigest(), values)
    except BaseException as error:
        file.close()
        path.unlink(missing_ok=True)
        if isinstance(error, ParseFailedException | ValidationError | UnicodeError):
            raise InvalidOption(
                f"The form cannot be read ({error}). Send multipart/form-data, with fields of /docs."
            ) from error
        if isinstance(error, ClientDisconnect):
            raise InvalidOption("The upload broke off.") from error
        raise


async def _feed(request: Request, api: Api, caller: Caller, parser: StreamingFormDataParser, file: _File) -> None:
    num_fed = 0
    refusal: DescriberError | ParseFailedException | ValidationError | None = None
    buffer, num_drained = bytearray(), 0
    async for chunk in request.stream():
        if refusal:
            num_drained += len(chunk)
            if num_drained > DRAIN_BYTES:
                break
            continue
        buffer += chunk
        if len(buffer) >= FEED_BYTES or not chunk:
            data, buffer = bytes(buffer), bytearray()
            num_fed += len(data)
            try:
                count_upload(api, request, caller, len(data))
                await api.in_thread(parser.data_received, data)
                if num_fed - file.num_bytes > MAX_FORM_BYTES:  # the parser keeps a part's header until it ends
                    raise InvalidOption("The form holds too much beside the file.")
            except (DescriberError, ParseFailedException, ValidationError) as error:
                refusal = error
    if refusal:
        raise refusal
    if buffer:
        count_upload(api, request, caller, len(buffer))
        await api.in_thread(parser.data_received, bytes(buffer))


def _name(sent: str) -> str:
    """What an uploaded file is called, for people: its name at the sender, without folders."""
    name = Path(sent.replace("\\", "/")).name
    return "".join(filter(str.isprintable, name)).strip(" .")[:200] or "video"
