"""A benchmark's rows, as people read them while it runs."""


def show(what: str, found: str, required: str = "", is_met: bool | None = None, beside: str = "") -> None:
    verdict = {True: "met", False: "MISSED", None: ""}[is_met]
    print(f"{what:<50} {found:>10} {required:>8} {verdict:<7} {beside}", flush=True)
