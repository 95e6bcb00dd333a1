"""What the search prints: a line per setting, the best ones, and where the time goes."""

from typing import Any

from benchmark.grid import AnyRow, Row

GIB = 1024**3
COLUMNS = ("instances", "slots", "frames/s", "tokens/s", "p50 s", "p95 s", "memory GiB", "device")
WIDTHS = (9, 6, 9, 9, 8, 8, 11, 7)


def print_header() -> None:
    print(_columns(COLUMNS), flush=True)


def line(row: AnyRow) -> str:
    if not isinstance(row, Row):
        return _columns((str(row.instances), str(row.slots))) + "  out of memory"
    rates = map(_figure, (row.frames_per_s, row.tokens_per_s, row.latency_p50_s, row.latency_p95_s))
    used = "" if row.utilisation is None else f"{row.utilisation:.0%}"
    return _columns((str(row.instances), str(row.slots), *rates, f"{row.peak_memory_bytes / GIB:.2f}", used))


def print_choice(best: Row, quick: Row | None, bound_s: float) -> None:
    print(f"\nbest: {_setting(best)}, {best.frames_per_s:.3g} frames/s")
    reached = "no setting" if quick is None else f"{_setting(quick)}, {quick.frames_per_s:.3g} frames/s"
    print(f"with 95% of the frames within {bound_s:.3g} s: {reached}")


def print_roofline(roofline: dict[str, Any]) -> None:
    ceilings = roofline["ceilings"]
    print(
        f"\nwhere the time goes with {roofline['instances']} x {roofline['slots']}; the device reaches "
        f"{ceilings['matmul_flops'] / 1e12:.3g} TFLOP/s ({ceilings['float32_flops'] / 1e12:.3g} in float32) and "
        f"{ceilings['bandwidth_bytes'] / 1e9:.3g} GB/s:"
    )
    print(f"{'':8}{'ms a frame':>11}{'share':>7}{'least ms':>10}{'reached':>9}  bound by")
    for name, phase in roofline["phases"].items():
        least = ""
        if "reached" in phase:
            least = f"{_figure(1000 * phase['least_s_per_frame']):>10}{phase['reached']:>9.0%}  {phase['bound_by']}"
        print(f"{name:8}{_figure(1000 * phase['s_per_frame']):>11}{phase['share']:>7.0%}{least}")


def _setting(row: Row) -> str:
    return (
        f"{row.instances} instance{'s' if row.instances > 1 else ''} of {row.slots} slot{'s' if row.slots > 1 else ''}"
    )


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _columns(cells: tuple[str, ...]) -> str:
    return " ".join(cell.rjust(width) for cell, width in zip(cells, WIDTHS, strict=False))
