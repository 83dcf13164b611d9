"""The tables of experiments/frontier.py: the frontier, transfer, seeds and positions."""

from __future__ import annotations

import io
import math
import statistics
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from kvjax.evals.table import DASH, fixed, print_table, small

Row = dict[str, Any]
Titled = tuple[Text, Table]
MEANS = ("kl", "top1", "logit_db", "attention_error")  # over texts; perplexity is a mean of logs
SIZES = ("bits_per_value", "bits_per_value_total", "cache_bytes", "bf16_bytes")


def current(rows: Sequence[Row], config: Any) -> list[Row]:
    """The lines that a config's settings make, whatever the model and method; where a text changed
    under its name, the last."""
    made = {"tokens": config.calibrate, "context": config.calibrate_context}
    made |= {"gradients": config.gradients}
    long = (config.position_context, config.position_windows, config.buckets)
    lengths = {"positions": long}
    texts = [one.partition("=")[0] for one in config.texts]
    layouts = set(map(tuple, config.layouts))
    found = {}
    for row in rows:
        part, calibration = row["part"], row["calibration"] or {"text": texts[0], **made}
        fits = (row["context"], row["windows"], row["buckets"]) == lengths.get(
            part, (config.context, config.windows, 0)
        )
        fits &= all(calibration[name] == wanted for name, wanted in made.items())
        fits &= layout_of(row) in layouts
        fits &= row["seed"] in (config.seeds if part == "seeds" else config.seeds[:1])
        fits &= row["text"]["text"] in (texts if part == "transfer" else texts[1:])
        fits &= calibration["text"] in (texts if part == "transfer" else texts[:1])
        if fits:
            found[identity(row)] = row
    return list(found.values())


def identity(row: Row) -> tuple:
    """A line's place: part, model, method, calibration, text, seed, layout."""
    names = calibration_of(row), row["text"]["text"]
    return row["part"], row["model"], row["method"], *names, row["seed"], layout_of(row)


def calibration_of(row: Row) -> str:
    return row["calibration"]["text"] if row["calibration"] else DASH


def layout_of(row: Row) -> tuple[int, int, int]:
    return row["layout"]["sink"], row["layout"]["recent"], row["layout"]["page"]


def over_texts(rows: Sequence[Row]) -> list[Row]:
    """Means over the test texts, a row per method; errors of texts are independent."""
    methods: dict[str, list[Row]] = {}
    for row in rows:
        methods.setdefault(row["method"], []).append(row)
    means = []
    for method, own in methods.items():
        mean: Row = {"method": method} | {name: own[0][name] for name in SIZES}
        for name in MEANS:
            known = [row[name] for row in own if row[name] is not None]
            mean[name] = statistics.fmean(known) if known else None
        mean["kl_se"] = math.hypot(*(row["kl_se"] or 0.0 for row in own)) / len(own)
        for name in ("ppl", "full_ppl"):
            mean[name] = statistics.geometric_mean(row[name] for row in own)
        means.append(mean | {"texts": [row["text"]["text"] for row in own]})
    return means


def print_tables(rows: Sequence[Row]) -> str:
    """Prints every table, and gives all as plain text."""
    screen, kept = Console(), Console(file=io.StringIO(), width=160)
    consoles = (screen if screen.is_terminal else Console(width=160)), kept
    for model in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model]
        part = lambda name, own=own: [row for row in own if row["part"] == name]
        for layout in dict.fromkeys(map(layout_of, part("frontier"))):
            found = [row for row in part("frontier") if layout_of(row) == layout]
            for console in consoles:
                _print_frontier(found, console)
        tables = [*_transfer(part("transfer")), *_seeds(part("seeds"))]
        for table in [*tables, *_positions(part("positions"))]:
            for console in consoles:
                console.print(Group(*table))
    return kept.file.getvalue()


def _print_frontier(rows: Sequence[Row], console: Console) -> None:
    means, one = over_texts(rows), rows[0]
    texts = " and ".join(dict.fromkeys(row["text"]["text"] for row in rows))
    made = next((calibration_of(row) for row in rows if row["calibration"]), None)
    calibrated = f"; calibrated on {made}" if made else ""
    full = f"; perplexity with the full cache {fixed(means[0]['full_ppl'])}"
    shared = {name: one[name] for name in ("model", "context", "windows", "layout")}
    print_table({**shared, "text": texts + calibrated + full, "rows": means}, console)
    console.print()


def _transfer(rows: Sequence[Row]) -> list[Titled]:
    """KL by text of the calibration (down) and of the test (across)."""
    tables = []
    for method in dict.fromkeys(row["method"] for row in rows):
        own = {(calibration_of(r), r["text"]["text"]): r for r in rows if r["method"] == method}
        texts = list(dict.fromkeys(text for _, text in own))
        down = sorted({made for made, _ in own}, key=lambda name: (*texts, DASH).index(name))
        title = f"{rows[0]['model']}, {method}: KL, calibrated on (down), tested on (across)"
        table = _table("calibrated on", *sorted(texts, key=[*down, *texts].index))
        for made in down:
            cells = (own.get((made, text)) for text in sorted(texts, key=[*down, *texts].index))
            table.add_row(Text(made), *(_kl(row) for row in cells))
        tables.append((Text(title), table))
    return tables


def _seeds(rows: Sequence[Row]) -> list[Titled]:
    if not rows:
        return []
    one = rows[0]
    title = f"{one['model']}, KL over seeds, on {one['text']['text']}"
    table = _table("method", "seeds", "mean", "s.d.", "least", "most", "s.e. over tokens")
    for method in dict.fromkeys(row["method"] for row in rows):
        kls = [row["kl"] for row in rows if row["method"] == method]
        error = statistics.fmean(row["kl_se"] for row in rows if row["method"] == method)
        spread = statistics.stdev(kls) if len(kls) > 1 else None
        numbers = (statistics.fmean(kls), spread, min(kls), max(kls), error)
        table.add_row(Text(method), str(len(kls)), *map(small, numbers))
    return [(Text(title), table)]


def _positions(rows: Sequence[Row]) -> list[Titled]:
    """KL by position; calibration windows end at their context."""
    if not rows:
        return []
    one = rows[0]
    parts = [f"{b['start']} to {b['stop'] - 1}" for b in one["kl_by_position"]]
    seen = next((row["calibration"]["context"] for row in rows if row["calibration"]), None)
    windows = f", calibrated at positions below {seen}" if seen else ""
    title = f"{one['model']}, KL by position, on {one['text']['text']}{windows}"
    table = _table("positions", *(row["method"] for row in rows))
    for i, part in enumerate(parts):
        table.add_row(part, *(_kl(row["kl_by_position"][i]) for row in rows))
    return [(Text(title), table)]


def _table(first: str, *others: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, header_style="bold")
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="right")
    return table


def _kl(row: Row | None) -> str:
    return DASH if row is None else f"{small(row['kl'])} ± {small(row['kl_se'])}"
