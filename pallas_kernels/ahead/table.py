"""Rows of the compile report as a table to read."""

from __future__ import annotations

from collections.abc import Sequence

from pallas_kernels.ahead.measure import Row, TpuRow

HEADS = (
    "launch", "regs", "spill B", "shared B", "threads", "warps/SM", "loop", "tokens",
    "lanes/value", "budget", "bits/value", "memory us", "issue us", "half-rate us", "MMA us",
    "bound us", "by",
)  # fmt: skip
NOTE = (
    "regs to tokens: as compiled for sm_90a (tokens: read per iteration of the main loop). Times\n"
    "are projected from instruction counts and vendor rates (1.755 GHz, 4.3 TB/s): lower bounds\n"
    "of a layer's step, never measurements."
)


def heading() -> str:
    """The first line."""
    return _line(HEADS)


def line(row: Row) -> str:
    """The line of one launch."""
    return _line(_cells(row) if row.projected else (row.name, *["-"] * len(HEADS[1:])))


def note(rows: Sequence[Row]) -> str:
    """What is below the lines: how to read them, and which launches do not pass."""
    return "\n".join(["", NOTE, *failed(rows)])


def tpu_line(row: TpuRow) -> str:
    """The line of one launch, or why there is none."""
    if row.failures:
        return failed([row])[0]
    return f"{row.name:<44} {row.temporary:>12} B temporary  compiled in {row.seconds:.0f} s"


def failed(rows: Sequence[Row | TpuRow]) -> list[str]:
    """Launches that do not pass, with the reasons."""
    return [f"FAILED {row.name}: {'; '.join(row.failures)}" for row in rows if row.failures]


def _cells(row: Row) -> tuple[str, ...]:
    assert row.projected is not None
    times = row.projected
    return (
        row.name, str(row.registers), str(row.spilled), str(row.shared), str(row.threads),
        str(row.resident_warps), str(row.loop_instructions), str(row.loop_tokens),
        f"{row.lanes_per_value:.2f}", "-" if row.budget is None else f"{row.budget:g}",
        f"{row.bits_per_value:.2f}", f"{times.memory:.1f}", f"{times.issue:.1f}",
        f"{times.half_rate:.1f}", f"{times.products:.1f}", f"{times.longest:.1f}", times.binds,
    )  # fmt: skip


def _line(cells: Sequence[str]) -> str:
    first, *rest = cells
    widths = [max(7, len(head)) for head in HEADS[1:]]
    return f"{first:<42}" + " ".join(f"{c:>{w}}" for c, w in zip(rest, widths, strict=True))
