"""Attacks on a server by one visitor, or by damage to its data: `python -m tests.attacks` runs all and prints a table.

One module is one attack: `python -m tests.attacks.odd_files` runs one alone, prints one line and exits with 1 if the
attack works. A module has POINT (which promise it tests), TITLE (one sentence) and attack(), which returns an Outcome.
All attacks are bounded in count and time, and use loopback only. They see the server from outside (HTTP, files, signals
and command lines), so the folder can be copied into an older tree to see what an attack did there.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # as pytest does
