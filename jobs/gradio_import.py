"""Import Gradio in half the time. Test: pytest tests/test_gradio_import.py

For each class of a component, Gradio parses that class's source at import, and rewrites a stub file for editors beside
it: 2 of its 3.5 s, in a folder that two servers may share, or that cannot be written.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def no_stubs() -> Iterator[None]:
    """What imports gradio first in here leaves its stub files as they are."""
    getfile = inspect.getfile

    def getfile_but_of_gradio(of: Any) -> str:
        if isinstance(of, type) and of.__module__.startswith("gradio."):
            raise OSError("not looked for")  # as of a class typed in at a prompt, for which it writes none
        return getfile(of)

    inspect.getfile = getfile_but_of_gradio
    try:
        yield
    finally:
        inspect.getfile = getfile
