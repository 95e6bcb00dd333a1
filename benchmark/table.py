"""What a benchmark tells people while it runs: its rows, and how far it is."""

import sys


def show(what: str, found: str, required: str = "", is_met: bool | None = None, beside: str = "") -> None:
    verdict = {True: "met", False: "MISSED", None: ""}[is_met]
    print(f"{what:<50} {found:>10} {required:>8} {verdict:<7} {beside}", flush=True)


def progress(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
