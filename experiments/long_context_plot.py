"""The picture of experiments/long_context.py: needles by shape, errors, steps, and a text."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from long_context_cases import RUN
from long_context_tables import of_part, slopes
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from kvjax.evals.families import FAMILIES, family
from kvjax.evals.table import one_line

Row = dict[str, Any]

INK = "#222222"
STYLES = {"1": (0, (1, 1)), "2": "-", "3": "--", "4": ":"}  # of lines, by bits
SHAPES = 3  # that are drawn


def long_context_png(rows: Sequence[Row]) -> bytes:
    """Six panels, 1800 x 1050 pixels.

    Args:
      rows: lines of metrics.jsonl.
    """
    figure = Figure(figsize=(18, 10.5), dpi=100, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    panels = figure.subplots(2, 3)
    figure.subplots_adjust(left=0.05, right=0.855, top=0.87, bottom=0.075, wspace=0.2, hspace=0.33)
    title = "A million tokens: what is found through codes, and what a step costs"
    figure.text(0.05, 0.945, title, size=21, weight="bold", color=INK)
    needles, speed, text = (of_part(rows, part) for part in ("needles", "speed", "text"))
    for axes, shape in zip(panels[0], [*needles, None, None, None][:SHAPES], strict=True):
        _panel(axes, shape and f"{shape}: found, %", needles.get(shape, []), _found)
    last = list(needles)[1:2] or list(needles)
    own = needles[last[0]] if last else []
    error = lambda row: (row["error"], row["error_se"])
    _panel(panels[1, 0], last and f"{last[0]}: error", own, error)
    if own:
        _logarithmic(panels[1, 0])
    for axes in panels[0, : len(needles)]:
        axes.set_ylim(0, 103)
    _speed(panels[1, 1], speed)
    _text(panels[1, 2], text)
    methods = dict.fromkeys(
        name
        for row in rows
        for name in row["settings"].get("methods", [row["settings"].get("method")])
    )
    handles = [Line2D([], [], label=one_line(name), ms=9, **_look(name)) for name in methods]
    figure.legend(
        handles=handles, loc="upper left", bbox_to_anchor=(0.862, 0.885), frameon=False,
        fontsize=13, labelspacing=0.7, handlelength=3,
    )  # fmt: skip
    if needles:
        one = next(iter(needles.values()))[0]
        about = one["settings"]["drawn_from"]
        share = 100 * one["needles"][_half(one)]["share"]
        under = (
            f"one layer, drawn from moments of {about['model']}; needles that get "
            f"{share:.0f} % of exact attention; bars ± 1 s.e. over queries"
        )
        figure.text(0.05, 0.912, one_line(under), size=13.5, color="#444444", parse_math=False)
    buffer = io.BytesIO()
    with warnings.catch_warnings():  # a name in a script that the font lacks is drawn as boxes
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        canvas.print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()


def _half(row: Row) -> int:
    """The margin that stays, and is nearest to half of the attention."""
    steady = [i for i, one in enumerate(row["needles"]) if one["base"] is None]
    return min(steady or [0], key=lambda i: abs(row["needles"][i]["margin"]))


def _found(row: Row) -> tuple[float, float | None]:
    one = row["needles"][_half(row)]
    return 100 * one["top"], None if one["top_se"] is None else 100 * one["top_se"]


def _look(name: str) -> dict[str, Any]:
    colour, marker = FAMILIES[family(name)]
    bits = next((b for b in STYLES if name.endswith(b)), "2")
    fill = {"2": colour, "3": "white"}.get(bits, colour)
    look = {"color": colour, "marker": marker, "ls": STYLES[bits], "markerfacecolor": fill}
    return look | ({"marker": "h", "ls": "-."} if "tiers" in name else {})  # of one family with klt


def _panel(
    axes: Axes,
    title: str | list | None,
    rows: Sequence[Row],
    of: Callable[[Row], tuple[float, float | None]],
) -> None:
    """A number over contexts, a line per method."""
    if not rows:
        axes.set_axis_off()
        return
    series: dict[str, list[Row]] = {}
    for row in rows:
        series.setdefault(row["settings"]["method"], []).append(row)
    for name, own in series.items():
        own = sorted(own, key=lambda row: row["settings"]["context"])
        x = [row["settings"]["context"] for row in own]
        y, bars = zip(*map(of, own), strict=True)
        look = _look(name)
        axes.plot(x, y, ms=8, lw=1.8, **look)
        errors = [bar or 0.0 for bar in bars]
        axes.errorbar(x, y, errors, ls="", color=look["color"], capsize=2, lw=1, alpha=0.6)
    _contexts(axes, sorted({row["settings"]["context"] for row in rows}))
    axes.set_title(one_line(title), size=13.5, color=INK, loc="left", parse_math=False)


def _speed(axes: Axes, by_shape: dict[str, list[Row]]) -> None:
    if not by_shape:
        axes.set_axis_off()
        return
    shape, rows = next(iter(by_shape.items()))
    rows = sorted(rows, key=lambda row: row["settings"]["context"])
    for name in rows[0][RUN]["times"]:
        own = [(r["settings"]["context"], r[RUN]["times"][name]) for r in rows]
        axes.plot([x for x, _ in own], [t["cpu_ms"] for _, t in own], ms=8, lw=1.8, **_look(name))
    slope = [f"{one_line(name)}: {line.ns:,.0f}" for name, line in slopes(rows).items()]
    under = "\n".join(["ns per token of context", *slope] if slope else [])
    place = {"transform": axes.transAxes, "ha": "right", "va": "bottom", "parse_math": False}
    axes.text(0.97, 0.04, under, size=11.5, color=INK, **place)
    _logarithmic(axes)
    _contexts(axes, [row["settings"]["context"] for row in rows])
    title = f"{shape}: step of a layer, ms of core time"
    axes.set_title(one_line(title), size=13.5, color=INK, loc="left", parse_math=False)


def _text(axes: Axes, by_model: dict[str, list[Row]]) -> None:
    if not by_model:
        axes.set_axis_off()
        return
    model, rows = next(iter(by_model.items()))
    for row in rows:
        x = [at["stop"] + 1 for at in row["by_position"]]
        y = [at["kl"] for at in row["by_position"]]
        look = _look(row["settings"]["method"])
        axes.plot(x, y, ms=8, lw=1.8, **look)
        errors = [at["kl_se"] for at in row["by_position"]]
        axes.errorbar(x, y, errors, ls="", color=look["color"], capsize=2, lw=1, alpha=0.6)
    _logarithmic(axes)
    _contexts(axes, list(rows[0]["settings"]["stretch_ends"]))
    title = f"{model} reads a text: KL, nats"
    axes.set_title(one_line(title), size=13.5, color=INK, loc="left", parse_math=False)


def _logarithmic(axes: Axes) -> None:
    """Numbers on a logarithmic axis, written out."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    some = (1, 2, 5) if high > 10 * low else (1, 1.5, 2, 3, 4, 5, 7)
    axes.yaxis.set_major_locator(LogLocator(subs=some, numticks=20))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))


def _contexts(axes: Axes, contexts: Sequence[int]) -> None:
    """Tokens on a logarithmic axis, each context a tick where there is room."""
    axes.set_xscale("log")
    ticks = [c for i, c in enumerate(contexts) if not i or c > 1.6 * contexts[i - 1]]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _short(int(x))))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("tokens of context", size=12, color=INK)
    axes.tick_params(labelsize=12)
    axes.grid(which="major", color="#e6e8eb")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _short(tokens: int) -> str:
    """Tokens as a tick says them.

    Example:
      >>> _short(512), _short(8192), _short(2**20)
      ('512', '8K', '1M')
    """
    for unit, name in ((2**20, "M"), (2**10, "K")):
        if tokens >= unit:
            return f"{tokens / unit:.3g}{name}"
    return str(tokens)
