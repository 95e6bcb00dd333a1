"""Run the attacks, one after the other, each in a process of its own: `python -m tests.attacks [NAME ...]`.

The last line counts them. Exit code 0 only if the server held against all. Test: pytest -m long tests/test_attacks.py
"""

import argparse
import pkgutil
import subprocess
import sys

import tests.attacks
from tests.attacks import ROOT

NOT_ATTACKS = ("__main__", "outcome")
MAX_S = 300


def names() -> list[str]:
    """Return the names of all attacks, sorted."""
    found = [module.name for module in pkgutil.iter_modules(tests.attacks.__path__)]
    return sorted(name for name in found if name not in NOT_ATTACKS)


def run(name: str) -> tuple[bool, str]:
    """Run one attack and return whether the server held, and the attack's line."""
    command = [sys.executable, "-m", f"tests.attacks.{name}"]
    try:
        process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=MAX_S)
    except subprocess.TimeoutExpired:
        return False, f"BROKEN: not over after {MAX_S} s"
    printed = process.stdout.strip().splitlines() or process.stderr.strip().splitlines()[-1:]
    return process.returncode == 0, printed[-1] if printed else f"BROKEN: exit code {process.returncode}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.attacks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="attacks to run; all without one")
    chosen = parser.parse_args().names or names()
    num_held = 0
    for name in chosen:
        is_held, line = run(name)
        num_held += is_held
        print(f"{name:24} {line}", flush=True)
    print(f"{len(chosen)} attacks, the server held against {num_held}")
    return 0 if num_held == len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
