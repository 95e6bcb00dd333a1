"""Gradio's stub files are left alone, told by what is opened: in a process of its own."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
COUNT = """
import contextlib, sys
opened = []
sys.addaudithook(lambda event, args: opened.append(args[0]) if event == "open" else None)
from jobs.gradio_import import no_stubs
with no_stubs() if sys.argv[1] == "quick" else contextlib.nullcontext():
    import gradio
print(sum(str(path).endswith(".pyi") for path in opened))
"""


def test_no_stub_file_is_looked_at() -> None:
    def num_stubs(how: str) -> int:
        return int(subprocess.run([sys.executable, "-c", COUNT, how], cwd=ROOT, check=True, stdout=-1).stdout)

    assert num_stubs("plain") > 50
    assert num_stubs("quick") == 0
