"""The log: every line in one format, whoever writes it: we, uvicorn, Gradio, warnings, or a library that prints.

Nobody but app.py sets it up. Test: pytest tests/test_log.py
"""

import io
import logging
import re
import sys
import warnings

from pythonjsonlogger.core import RESERVED_ATTRS
from pythonjsonlogger.json import JsonFormatter
from uvicorn.config import LOGGING_CONFIG

QUIET = ("httpx", "httpx2", "httpcore", "httpcore2")  # they would tell the queries of URLs, which may be secrets
QUERY = re.compile(r"(https?://[^\s?'\"]+)\?[^\s'\"]*")  # of a URL; it may be a secret
KEYS = "%(asctime)s %(levelname)s %(name)s %(message)s"


def set_up_log(log_format: str) -> None:
    handler = logging.StreamHandler()
    handler.addFilter(_without_queries)
    if log_format == "json":
        handler.setFormatter(JsonFormatter(KEYS, reserved_attrs=[*RESERVED_ATTRS, "color_message"]))
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    for name in QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)
    LOGGING_CONFIG["loggers"].clear()  # Gradio starts uvicorn with it, which would write by handlers of its own
    logging.captureWarnings(True)
    warnings.formatwarning = _on_one_line
    sys.stdout = Printed()


def adopt_loggers(*names: str) -> None:
    """Have libraries that bring handlers of their own, once they are imported, write as all others do."""
    for name in names:
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = True


def _without_queries(record: logging.LogRecord) -> bool:
    text = record.getMessage()
    shown = QUERY.sub(r"\1?…", text)
    if shown != text:
        record.msg, record.args = shown, ()
    return True


class Printed(io.StringIO):
    """Takes the place of stdout: what Gradio prints is a line of the log."""

    def __init__(self) -> None:
        super().__init__()
        self._begun = ""  # print() writes its line in parts

    def write(self, text: str) -> int:
        *lines, self._begun = (self._begun + text).split("\n")
        for line in filter(str.strip, lines):
            logging.getLogger("stdout").info("%s", line)
        return len(text)


def _on_one_line(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    return f"{category.__name__}: {message} ({filename}:{lineno})"
