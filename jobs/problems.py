"""How the server says no: a problem document (RFC 9457) with one of the stable codes of pipeline/errors.py.

Test: pytest tests/test_doors_middleware.py
"""

from collections.abc import Mapping
from http import HTTPStatus

from starlette.responses import JSONResponse, Response


def problem(status: int, code: str, detail: str, headers: Mapping[str, str] | None = None) -> Response:
    """Make the answer {type, title, status, detail, code}. detail says what happened and what to try."""
    document = {
        "type": "about:blank",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": detail,
        "code": code,
    }
    return JSONResponse(document, status, headers, media_type="application/problem+json")
