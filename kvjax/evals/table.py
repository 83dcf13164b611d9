"""A comparison of methods as a table: the columns, how each number is written, and the front."""

from __future__ import annotations

import dataclasses
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from kvjax.core.errors import InputError

DASH = "–"  # not measured
LINE = 160  # characters of a plain line
NAME = 38  # characters of a method's name in a plain line

Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Column:
    """One column of the comparison.

    Attributes:
      header: short, for plain text.
      title: in full.
      meaning: one line for the reader.
      show: the cell of a row as text.
      value: what to sort by; None is "not measured".
    """

    header: str
    title: str
    meaning: str
    show: Callable[[Row], str]
    value: Callable[[Row], float | None]


def print_table(metrics: Mapping[str, Any], console: Console | None = None) -> None:
    """Prints the rows of `metrics.json` and what they were measured on.

    A terminal gets a rich table, in two or more parts where it is too narrow, with the Pareto
    front in bold; a pipe gets aligned plain text, one line per method, without colours or boxes.

    Raises:
      InputError: a value that is not a number where one is due.
    """
    console = console or Console()
    rows = metrics.get("rows") or []
    if console.is_terminal:
        for table in _rich_tables(rows, console):
            console.print(table)
        console.print(Text(setting(metrics)), highlight=False)
        return
    for line in [*_plain(rows), "", *textwrap.wrap(setting(metrics), LINE)]:
        console.out(_encodable(line, console.encoding), highlight=False)


def setting(metrics: Mapping[str, Any]) -> str:
    """One line: model, text, context, windows, layout, and what stays exact."""
    windows, context = _count(metrics, "windows"), _count(metrics, "context")
    layout = metrics.get("layout") or {}
    sizes = ", ".join(f"{name} {_count(layout, name)}" for name in ("sink", "recent", "page"))
    return (
        f"model {one_line(metrics.get('model'))}; text {one_line(metrics.get('text'))}; "
        f"{windows} windows of {context} tokens; {sizes}; {exact(layout)}"
    )


def exact(layout: Mapping[str, Any]) -> str:
    """Which tokens a layout keeps exact, in words.

    Example:
      >>> exact({"sink": 4, "recent": 64, "page": 32})
      'exact (bf16): the first 4 tokens and the last 64 to 95'
    """
    sink, recent, page = (number(layout, name) for name in ("sink", "recent", "page"))
    if sink is None or recent is None or page is None:
        return "exact (bf16): the sink and the recent window, sizes not recorded"
    last = f"{recent:.0f} to {recent + page - 1:.0f}" if page > 1 else f"{recent:.0f}"
    return f"exact (bf16): the first {sink:.0f} tokens and the last {last}"


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other point beats, by increasing x; less is better in both.

    A point is beaten by one that is no worse in x and y and better in one of them; equal points
    stay together.

    Example:
      >>> pareto_front([(4.0, 0.1), (2.0, 0.5), (3.0, 0.5), (8.0, 0.1)])
      [1, 0]
    """
    front: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: tuple(points[i])):
        if not front or points[i][1] < points[front[-1]][1] or points[i] == points[front[-1]]:
            front.append(i)
    return front


def measured(rows: Sequence[Row]) -> list[Row]:
    """The rows that have a place in the plane of bits and KL."""
    pairs = [(row, point(row)) for row in rows]
    return [row for row, (bits, kl) in pairs if math.isfinite(bits + kl) and bits > 0]


def point(row: Row) -> tuple[float, float]:
    """(true bits per value, KL) of a row, NaN where not measured."""
    bits, kl = number(row, "bits_per_value"), number(row, "kl")
    return math.nan if bits is None else bits, math.nan if kl is None else kl


def front_rows(rows: Sequence[Row]) -> list[Row]:
    """The rows on the Pareto front of KL against bits, by increasing bits."""
    rows = measured(rows)
    return [rows[i] for i in pareto_front([point(row) for row in rows])]


def number(row: Row, name: str) -> float | None:
    """A number of a row, or None where it is missing or null."""
    value = row.get(name)
    try:
        if isinstance(value, (str, bool)):
            raise TypeError
        return None if value is None else float(value)
    except (TypeError, ValueError):
        raise InputError(
            f"metrics, {name} of {one_line(row.get('method'))}",
            got=repr(value),
            expected="a number, or null where it was not measured",
            fix="write the file again with `kvjax compare`",
        ) from None


def fixed(x: float | None, places: int = 2, suffix: str = "") -> str:
    """`x` with a fixed number of decimals; scientific from a million on."""
    if x is None:
        return DASH
    if not math.isfinite(x) or abs(x) >= 1e6:
        return f"{x:.1e}{suffix}"
    return f"{x:.{places}f}{suffix}"


def small(x: float | None) -> str:
    """Four decimals, or scientific where those would hide the value; an exact zero is "0"."""
    if x is None or abs(x) >= 1e-4 or math.isnan(x):
        return fixed(x, 4)
    return f"{x:.1e}" if x else "0"


def about(x: float | None) -> str:
    """Three digits or so: 0.12, 12.3, 123."""
    return fixed(x, 2 if x is None or abs(x) < 10 else 1 if abs(x) < 100 else 0)


def kl_text(row: Row) -> str:
    """KL ± standard error."""
    kl = number(row, "kl")
    return DASH if kl is None else f"{small(kl)} ± {small(number(row, 'kl_se'))}"


def one_line(value: object) -> str:
    """Any value as one printable line: no line ends, no control or escape characters."""
    text = " ".join(str(DASH if value is None else value).split())
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def _ratio(row: Row, top: str, bottom: str) -> float | None:
    a, b = number(row, top), number(row, bottom)
    return None if a is None or not b else a / b


def _scaled(name: str, factor: float) -> Callable[[Row], float | None]:
    def value(row: Row) -> float | None:
        x = number(row, name)
        return None if x is None else x * factor

    return value


def _column(header, title, value, show, meaning) -> Column:
    if isinstance(value, str):
        value = _scaled(value, 1.0)
    return Column(header, title, meaning, lambda row: show(value(row)), value)


COLUMNS: tuple[Column, ...] = (
    _column(
        *("bits/value", "bits per value", "bits_per_value", fixed),
        "bits that one packed number takes, with all side information (scales, zeros, norms).",
    ),
    _column(
        *("+windows", "bits with windows", "bits_per_value_total", fixed),
        "the whole cache over all its numbers: packed pages and exact windows, at this context.",
    ),
    _column(
        *("cache MiB", "cache MiB", _scaled("cache_bytes", 2.0**-20), about),
        "memory of the cache at this context (1 MiB is 1,048,576 bytes).",
    ),
    _column(
        *("of bf16", "size of bf16", lambda row: _ratio(row, "cache_bytes", "bf16_bytes")),
        lambda x: fixed(x, 2, "x"),
        "that memory as a part of an uncompressed bf16 cache; lower is smaller.",
    ),
    _column(
        *("ppl", "perplexity", "ppl", lambda x: fixed(x, 2 if x is None or x < 1000 else 0)),
        "perplexity on the text; lower is better.",
    ),
    Column(
        *("KL ± s.e.", "KL ± s.e."),
        "how far the predictions are from those with the full cache, mean nats per token, and the "
        "standard error over the tokens; 0 is no change.",
        kl_text,
        _scaled("kl", 1.0),
    ),
    _column(
        *("top-1 %", "top-1 %", _scaled("top1", 100.0), lambda x: fixed(x, 1)),
        "how often the most likely next token is the same as with the full cache.",
    ),
    _column(
        *("logit dB", "logit dB", "logit_db", lambda x: fixed(x, 1)),
        "squared error of the attention logits over their variance, every token packed, in "
        "decibels; lower is better, -20 dB is a tenth in amplitude.",
    ),
    _column(
        *("attn err", "attention error", "attention_error", small),
        "relative error of the attention outputs, every token packed; lower is better.",
    ),
    _column(
        *("tokens/s", "tokens/s", "decode_tokens_per_s", about),
        "new tokens decoded per second on the device of the stamp.",
    ),
    _column(
        *("x bf16", "speed x bf16", "decode_vs_bf16", lambda x: fixed(x, 2, "x")),
        "that speed over the speed with a bf16 cache; above 1 is faster.",
    ),
)


def _count(row: Mapping[str, Any], name: str) -> str:
    x = number(row, name)
    return DASH if x is None else f"{x:.0f}"


def _plain(rows: Sequence[Row]) -> list[str]:
    names = [_middle(one_line(row.get("method"))) for row in rows]
    lines = [["method", *(c.header for c in COLUMNS)]]
    lines += [
        [name, *(c.show(row) for c in COLUMNS)] for name, row in zip(names, rows, strict=True)
    ]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    return [
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
        for line in lines
    ]


def _middle(name: str) -> str:
    """A name cut in its middle, so that both KEYS and VALUES can be told."""
    half = (NAME - 1) // 2
    return name if len(name) <= NAME else f"{name[:half]}…{name[-half:]}"


def _rich_tables(rows: Sequence[Row], console: Console) -> list[Table]:
    """All columns in as few tables as fit the console; each repeats the names."""
    best = {id(row) for row in front_rows(rows)}
    tables, columns = [], list(COLUMNS)
    while columns:
        take = len(columns)
        while take > 1 and _width(_rich_table(rows, columns[:take], best), console) > console.width:
            take -= 1
        tables.append(_rich_table(rows, columns[:take], best))
        columns = columns[take:]
    return tables


def _rich_table(rows: Sequence[Row], columns: Sequence[Column], best: set[int]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1), header_style="bold")
    table.add_column("method", vertical="bottom", overflow="fold")
    for column in columns:
        title = Text(textwrap.fill(column.title, 10))
        table.add_column(title, justify="right", vertical="bottom", no_wrap=True)
    for row in rows:
        name = Text(one_line(row.get("method")), style="cyan")
        cells = [Text(column.show(row)) for column in columns]
        table.add_row(name, *cells, style="bold" if id(row) in best else "")
    return table


def _width(table: Table, console: Console) -> int:
    wide = console.options.update(max_width=10_000)
    return Measurement.get(console, wide, table).maximum


def _encodable(line: str, encoding: str) -> str:
    return line.encode(encoding, "replace").decode(encoding)
