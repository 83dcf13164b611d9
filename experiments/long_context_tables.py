"""The tables of experiments/long_context.py: needles, steps, and a text."""

from __future__ import annotations

import io
from collections.abc import Collection, Sequence
from typing import Any

from long_context_cases import RUN, settings_of
from long_context_speed import Slope, fit_slope
from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from kvjax.evals.needles import Margin
from kvjax.evals.table import DASH, fixed, small

Row = dict[str, Any]
Titled = tuple[Text, Table]
BASE = "bf16"
WAYS = {"query": "needles along q", "likely": "likely needles"}


def summary(row: Row) -> str:
    """The numbers of a line, for people."""
    if row["part"] == "speed":
        return ", ".join(f"{name} {t['cpu_ms']:.2f} ms" for name, t in row[RUN]["times"].items())
    kl = f"{row['bits_per_value']:.2f} bits, KL {row['kl']:.4f} ± {row['kl_se'] or 0:.4f}"
    if row["part"] == "text":
        return kl
    found = " ".join(f"{100 * one['top']:.0f}" for one in row["needles"])
    return f"{kl}, error {row['error']:.3f}, needles found {found} %"


def current(rows: Sequence[Row], wanted: Collection[str] | None = None) -> list[Row]:
    """The last line of each of these settings, or of all where none are named."""
    found = {settings_of(row): row for row in rows if "settings" in row}
    return [row for key, row in found.items() if wanted is None or key in wanted]


def of_part(rows: Sequence[Row], part: str) -> dict[str, list[Row]]:
    """Lines of a part by their shapes, and directions of needles, as they were measured."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row["part"] == part:
            shape, direction = (row["settings"].get(name) for name in ("shape", "direction"))
            name = f"{shape}, {WAYS[direction]}" if direction else shape
            found.setdefault(name, []).append(row)
    return found


def print_tables(rows: Sequence[Row]) -> str:
    """Prints every table, and gives all as plain text."""
    made = {"needles": _needles, "speed": _speed, "text": _text}
    tables = [
        table(shape, own)
        for part, table in made.items()
        for shape, own in of_part(rows, part).items()
    ]
    screen, text = Console(), io.StringIO()
    kept = Console(file=text, width=200)
    for console in (screen if screen.is_terminal else Console(width=200)), kept:
        console.print(*(Group(*table) for table in tables))
    return text.getvalue()


def _needles(shape: str, rows: Sequence[Row]) -> Titled:
    one = rows[0]
    drawn = one["settings"]["drawn_from"]
    heads, queries, d = one["settings"]["heads"]
    title = (
        f"{shape}: a layer of {heads} KV heads x {d}, {queries} query heads, drawn from moments of "
        f"{drawn['model']} from layer {drawn['layer']} on; {one['queries']} queries, "
        f"{len(one['settings']['depths'])} depths; layout {_layout(one)}. Found %: the needle has "
        "the largest logit. Share %: of the needle in exact attention -> over codes. "
        "Peak: memory beyond what the process held, while the cache is made and filled"
    )
    names = [Margin(a["nats"], a["base"]).name for a in one["needles"]]
    wide = [f"found, {name}" for name in names]
    sizes = "bits", "MiB", "/bf16", "peak MiB"
    table = _table("context", "method", *sizes, "KL ± s.e.", "error", *wide)
    for row in sorted(rows, key=lambda row: row["settings"]["context"]):
        table.add_row(
            f"{row['settings']['context']:,}",
            Text(row["settings"]["method"]),
            fixed(row["bits_per_value"]),
            f"{row['cache_bytes'] / 2**20:,.1f}",
            fixed(row["cache_bytes"] / row["bf16_bytes"], 3),
            _mib(row[RUN].get("fill_peak_bytes")),
            f"{small(row['kl'])} ± {small(row['kl_se'])}",
            f"{row['error']:.3f}",
            *(_found(needle) for needle in row["needles"]),
        )
    return Text(title), table


def _mib(size: int | None) -> str:
    return DASH if size is None else f"{size / 2**20:,.1f}"


def _found(needle: Row) -> str:
    found = f"{100 * needle['top']:.0f} ± {100 * (needle['top_se'] or 0):.0f}"
    return f"{found} ({100 * needle['share']:.0f}->{100 * needle['read_share']:.0f})"


def slopes(rows: Sequence[Row]) -> dict[str, Slope]:
    """Of steps over contexts, in time of the cores, by method: of those at two or more."""
    points: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        for name, time in row[RUN]["times"].items():
            points.setdefault(name, []).append((row["settings"]["context"], time["cpu_ms"]))
    return {
        name: fit_slope(*zip(*own, strict=True)) for name, own in points.items() if len(own) > 1
    }


def _speed(shape: str, rows: Sequence[Row]) -> Titled:
    rows = sorted(rows, key=lambda row: row["settings"]["context"])
    heads, queries, d = rows[0]["settings"]["heads"]
    title = (
        f"{shape}: a decode step of one layer ({heads} KV heads x {d}, {queries} query heads), "
        f"append and attend, ms of the cores' time (of the clock), and lines through the "
        f"former; {rows[0][RUN]['device']}, load at the start "
        f"{', '.join(str(row[RUN]['load']) for row in rows)}"
    )
    contexts = [f"{row['settings']['context']:,}" for row in rows]
    table = _table(
        "method", "bits", "MiB at most", *contexts, "ns per token", "/bf16", "off line %"
    )
    lines = slopes(rows)
    for name, size in rows[-1]["sizes"].items():
        line, base = lines.get(name), lines.get(BASE)
        table.add_row(
            Text(name),
            fixed(size["bits_per_value"]),
            f"{size['cache_bytes'] / 2**20:,.1f}",
            *(_time(row[RUN]["times"].get(name)) for row in rows),
            DASH if line is None else f"{line.ns:.1f}",
            DASH if line is None or base is None else f"{line.ns / base.ns:.2f}",
            DASH if line is None else f"{100 * line.worst:.0f}",
        )
    return Text(title), table


def _time(time: Row | None) -> str:
    if time is None:
        return DASH
    return f"{time['cpu_ms']:.2f} ({time['ms']:.2f})"


def _text(shape: str, rows: Sequence[Row]) -> Titled:
    one = rows[0]
    about = one["settings"]
    title = (
        f"{shape} reads {about['context']} tokens of {about['text']['about']}; KL to the exact "
        f"model (perplexity, exact) at {about['stretch']} positions before; layout {_layout(one)}"
    )
    ends = [f"{end:,}" for end in about["stretch_ends"]]
    table = _table("method", "bits", "KL ± s.e.", "top-1 %", *ends)
    for row in rows:
        table.add_row(
            Text(row["settings"]["method"]),
            fixed(row["bits_per_value"]),
            f"{small(row['kl'])} ± {small(row['kl_se'])}",
            fixed(100 * row["top1"], 1),
            *(
                f"{small(at['kl'])} ({fixed(at['ppl'])}, {fixed(at['full_ppl'])})"
                for at in row["by_position"]
            ),
        )
    return Text(title), table


def _layout(row: Row) -> str:
    return "/".join(map(str, row["settings"]["layout"]))


def _table(*names: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, header_style="bold")
    for i, name in enumerate(names):
        table.add_column(name, justify="left" if i < 2 else "right")
    return table
