"""The tables of experiments/tokens.py: a text that goes on, and what is found again."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text
from tokens_cases import own_settings, settings_of

from kvjax.evals.table import DASH, fixed, small

Row = dict[str, Any]


def summary(row: Row) -> str:
    """The numbers of a line, for people."""
    if row["part"] == "fidelity":
        return f"{row['ratio']:.3f} of bf16, KL {row['kl']:.4f} ± {row['kl_se']:.4f}"
    return f"{row['exact']:.0%} exact, {row['token_accuracy']:.0%} of tokens, NLL {row['nll']:.2f}"


def current(rows: Sequence[Row], about: Mapping[str, Row]) -> list[Row]:
    """The lines that have the settings `about[part]`, whatever their method, policy, budget, task
    and length; of two with all settings alike, the last."""
    found = {}
    for row in rows:
        if row["part"] not in about:
            continue
        wanted = own_settings(about[row["part"]], row["method"], row.get("task"))
        if all(row.get(name) == value for name, value in wanted.items()):
            found[settings_of(row)] = row
    return list(found.values())


def print_tables(rows: Sequence[Row]) -> str:
    """Prints every table, and gives all as plain text."""
    screen, text = Console(), io.StringIO()
    kept = Console(file=text, width=160)
    consoles = (screen if screen.is_terminal else Console(width=160)), kept
    tables = []
    if own := [row for row in rows if row["part"] == "fidelity"]:
        tables.append(_fidelity(own))
    found = [row for row in rows if row["part"] == "retrieval"]
    for length in sorted({row["length"] for row in found}):
        tables.append(_retrieval([row for row in found if row["length"] == length]))
    for console in consoles:
        console.print(*(Group(*table) for table in tables))
    return text.getvalue()


def _fidelity(rows: Sequence[Row]) -> tuple[Text, Table]:
    one = rows[0]
    title = (
        f"{one['model']}: {one['continuation']} tokens after {one['history']}, "
        f"{one['windows']} windows of {one['text']['about']}, layout {_layout(one)}, "
        f"blocks of {one['block']}; perplexity with all exact {fixed(one['full_ppl'])}"
    )
    table = _table("policy", "codes", "budget", "bytes/bf16", "KL ± s.e.", "ppl", "top-1 %")
    for row in sorted(rows, key=lambda row: (-row["ratio"], row["kl"])):
        table.add_row(
            Text(row["policy"]),
            Text(row["method"]),
            _budget(row),
            fixed(row["ratio"], 3),
            f"{small(row['kl'])} ± {small(row['kl_se'])}",
            fixed(row["ppl"]),
            fixed(100 * row["top1"], 1),
        )
    return Text(title), table


def _retrieval(rows: Sequence[Row]) -> tuple[Text, Table]:
    one = rows[0]
    asked = "with the question seen" if one["with_question"] else "the question not seen"
    title = (
        f"{one['model']}: retrieval at {one['length']} tokens, {asked}, layout {_layout(one)}; "
        "answers all right %, tokens right % (nats per token)"
    )
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    table = _table("policy", "codes", "budget", *tasks)
    found: dict[tuple, dict[str, Row]] = {}
    for row in rows:
        found.setdefault((row["policy"], row["method"], _budget(row)), {})[row["task"]] = row
    for (policy, method, budget), own in found.items():
        table.add_row(Text(policy), Text(method), budget, *(_found(own.get(t)) for t in tasks))
    return Text(title), table


def _found(row: Row | None) -> str:
    if row is None:
        return DASH
    accuracy = f"{100 * row['exact']:.0f}, {100 * row['token_accuracy']:.0f}"
    return f"{accuracy} ({fixed(row['nll'])})"


def _budget(row: Row) -> str:
    return DASH if row["budget"] is None else f"{row['budget']:g}"


def _layout(row: Row) -> str:
    return "/".join(map(str, row["layout"]))


def _table(*names: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, header_style="bold")
    for i, name in enumerate(names):
        table.add_column(name, justify="left" if i < 2 else "right")
    return table
