"""What a browser may load and run for each kind of answer: the Content-Security-Policy, a second lock behind the page's
care with text of models and strangers.

doors.py adds who may show an answer in a frame, and gives ANSWER or MEDIA to whatever has no policy of its own.
Test: pytest tests/test_csp.py
"""

import base64
import hashlib
import re

ANSWER = "default-src 'none'; base-uri 'none'; form-action 'none'"  # JSON, events, exports: nothing at all
# A video or picture that is opened by itself: browsers make a page around it, with styles of theirs.
MEDIA = f"{ANSWER}; img-src 'self'; media-src 'self'; style-src 'unsafe-inline'"
INLINE_SCRIPT = re.compile(rb"<script(?![^>]*\ssrc=)[^>]*>(.*?)</script>", re.DOTALL)


def for_page(html: bytes) -> str:
    """The policy of Gradio's page. Its base is "./", its components have style attributes, and the script of an HTML
    component runs by Function(), which 'unsafe-eval' allows; but no handler in markup and no foreign script runs."""
    return "; ".join(
        [
            "default-src 'none'",
            f"script-src 'self' 'unsafe-eval' {_hashes(html)}",
            "style-src 'self' 'unsafe-inline'",
            "img-src 'self' blob: data:",
            "media-src 'self' blob:",
            "font-src 'self' data:",
            "connect-src 'self'",
            "manifest-src 'self'",
            "object-src 'none'",
            "base-uri 'self'",
            "form-action 'none'",
        ]
    )


def for_docs(html: bytes) -> str:
    """The policy of /docs: Swagger UI has style attributes and pictures in its styles."""
    return "; ".join(
        [
            ANSWER,
            f"script-src 'self' {_hashes(html)}",
            "style-src 'self' 'unsafe-inline'",
            "img-src 'self' data:",
            "connect-src 'self'",
        ]
    )


def _hashes(html: bytes) -> str:
    """What lets the scripts run that stand in a page as the server made it, and none that gets in later."""
    digests = (hashlib.sha256(script).digest() for script in INLINE_SCRIPT.findall(html))
    return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)
