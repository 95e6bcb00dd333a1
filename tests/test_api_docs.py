"""/docs as it is sent. In a browser: test_page.py."""

import re

from door_client import ask
from fastapi import FastAPI

from jobs import csp
from jobs.api_docs import FOLDER, PAGE, docs_router


def test_docs_and_all_that_they_load_come_from_here() -> None:
    """FastAPI's own came from another host, whichever version that had: a stranger's script beside a session."""
    app = FastAPI(docs_url=None)
    app.include_router(docs_router)
    page = ask(app, path="/docs")
    loaded = re.findall(r'(?:src|href)="(docs/[^"]+)"', page.body.decode())

    assert page.headers["content-security-policy"] == csp.for_docs(PAGE)
    assert loaded == ["docs/swagger-ui.css", "docs/swagger-ui-bundle.js"] and b"//" not in page.body
    for address in loaded:
        size = len((FOLDER / address.removeprefix("docs/")).read_bytes())
        assert ask(app, path=f"/{address}").headers["content-length"] == str(size)
    assert ask(app, "HEAD", "/docs").status == 200
