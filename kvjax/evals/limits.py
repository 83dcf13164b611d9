"""Predicted and measured logit errors of methods beside the bound, for every layer and KV head."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvjax.calibrate.moments import Moments
from kvjax.calibrate.names import get_for_model
from kvjax.calibrate.predicted import bound_db, predicted_db
from kvjax.core.method import Method
from kvjax.evals.logit_error import held_out, logit_error_db
from kvjax.evals.table import one_line
from kvjax.evals.text import model_windows
from kvjax.methods.describe import code_bits
from kvjax.models.load import Model

CLOSE = 1.5  # dB between prediction and measurement that pass for agreement

Progress = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Settings:
    """What `limits` does.

    Attributes:
      methods: names, calibrated or not. bits: of the bound.
      context: tokens per window. windows: how many, spread over the text.
      seed: for rotations.
    """

    methods: tuple[str, ...]
    bits: int = 2
    context: int = 2048
    windows: int = 1
    seed: int = 0


def limits(
    model: Model,
    moments: Moments,
    text: str,
    settings: Settings,
    progress: Progress = lambda message: None,
) -> dict[str, Any]:
    """What stands in `limits.json`: a row per method, and the bound.

    All in dB of the logit variance, as `[layers][heads]`: `measured` on the text; `predicted` by
    the moments of the calibration, on which the method was built; `known_text`, the prediction for
    the same method by the moments of the measured tokens. What lies between the last two is owed to
    the change of text and to few tokens of calibration; between `known_text` and `measured`, to
    keys that are not normal. Predictions are None for methods without a formula.

    Raises:
      InputError: a method, context, text or model that does not fit; NaN in a layer.
    """
    config = model.config
    built: dict[str, tuple[Method, ...]] = {}
    for name in settings.methods:
        made = get_for_model(name, config, moments, seed=settings.seed)
        built[name] = (made,) * config.layers if isinstance(made, Method) else made
        for method in built[name]:
            method.check(config.head_dim)
    windows = model_windows(model, text, context=settings.context, windows=settings.windows)
    held = held_out(model.params, config, list(windows), progress)
    rows = []
    for name, methods in built.items():
        progress(f"{name}: measuring")
        rows.append(
            {
                "method": name,
                "key_bits": float(
                    np.mean([code_bits(m.key, config.head_dim, m.layout.page) for m in methods])
                ),
                "measured": _plain(logit_error_db(methods, held)),
                "predicted": _plain(predicted_db(methods, moments)),
                "known_text": _plain(predicted_db(methods, held)),
            }
        )
    return {
        "bits": settings.bits,
        "context": settings.context,
        "windows": settings.windows,
        "bound": _plain(bound_db(moments, settings.bits)),
        "bound_known_text": _plain(bound_db(held, settings.bits)),
        "rows": rows,
    }


def _plain(db: np.ndarray | None) -> list[list[float]] | None:
    return None if db is None else np.round(db, 4).tolist()


HEADINGS = (
    ("key bits", "true bits per value of a packed key, lengths and positions included"),
    ("predicted", "median over KV heads, from the moments of the calibration alone"),
    ("known text", "the same for the moments of the tokens that are measured"),
    ("measured", "median over KV heads, dB of the logit variance; lower is better"),
    ("quartiles", "of the measured heads"),
    ("|m - p|", "measured less predicted: median and largest over heads"),
    ("close", f"heads where that is at most {CLOSE} dB"),
    ("to bound", "median over heads of measured less the bound of the measured tokens"),
)


def print_limits(
    metrics: Mapping[str, Any],
    *,
    layers: bool = False,
    heads: bool = False,
    console: Console | None = None,
) -> None:
    """Prints the rungs over all heads, and if asked one line per layer (medians) or per head."""
    console = console or Console()
    if not console.is_terminal:
        console = Console(file=console.file, width=160)
    rows = metrics["rows"]
    table = _table("method", *(title for title, _ in HEADINGS))
    for row in rows:
        table.add_row(Text(one_line(row["method"]), style="cyan"), *_summary(row, metrics))
    bound, known = (np.median(metrics[name]) for name in ("bound", "bound_known_text"))
    table.add_row("bound", f"{metrics['bits']:.2f}", _number(bound), _number(known))
    console.print(table)
    for title, meaning in HEADINGS:
        console.print(Text(f"  {title}: {meaning}"), highlight=False, style="dim")
    if layers or heads:
        console.print(_by_head(metrics, heads=heads))
    console.print(Text(setting(metrics)), highlight=False)


def setting(metrics: Mapping[str, Any]) -> str:
    """One line: model, text, and what the calibration saw."""
    made = metrics["calibration"]
    shape = np.shape(metrics["bound"])
    return (
        f"model {one_line(metrics['model'])}, {shape[0]} layers of {shape[1]} KV heads; text "
        f"{one_line(metrics['text'])}, {metrics['windows']} windows of {metrics['context']} tokens;"
        f" calibrated on {made['tokens']} tokens of {one_line(made['text'])}"
    )


def _summary(row: Mapping[str, Any], metrics: Mapping[str, Any]) -> list[str]:
    measured = np.array(row["measured"])
    low, median, high = np.percentile(measured, [25, 50, 75])
    to_bound = np.median(measured - np.array(metrics["bound_known_text"]))
    cells = [f"{row['key_bits']:.2f}", "-", "-", _number(median), f"{low:.1f} .. {high:.1f}"]
    if row["predicted"] is None:
        return [*cells, "-", "-", _number(to_bound)]
    off = abs(measured - np.array(row["predicted"]))
    cells[1:3] = [_number(np.median(row[name])) for name in ("predicted", "known_text")]
    close = f"{(off <= CLOSE).sum()} of {off.size}"
    return [*cells, f"{np.median(off):.2f}, {off.max():.2f}", close, _number(to_bound)]


def _by_head(metrics: Mapping[str, Any], *, heads: bool) -> Table:
    """Predicted and measured, one line per layer or per head."""
    rows = metrics["rows"]
    place = ("layer", "head") if heads else ("layer",)
    table = _table(*place, "bound", *(f"{one_line(r['method'])}\npred. meas." for r in rows))
    found = [(r["predicted"], r["measured"]) for r in rows]
    shape = np.shape(metrics["bound"])
    for layer in range(shape[0]):
        for head in range(shape[1] if heads else 1):
            pick = lambda a: a[layer][head] if heads else np.median(a[layer])  # noqa: B023
            pair = lambda p, m: f"{'-' if p is None else _number(pick(p)):>6} {_number(pick(m)):>6}"  # noqa: B023
            where = [str(layer), str(head)][: len(place)]
            table.add_row(*where, _number(pick(metrics["bound"])), *(pair(p, m) for p, m in found))
    return table


def _table(first: str, *others: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column(first)
    for title in others:
        table.add_column(title, justify="right", no_wrap=True)
    return table


def _number(db: Sequence[float] | float | np.floating) -> str:
    return f"{db:.2f}"
