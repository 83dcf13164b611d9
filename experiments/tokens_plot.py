"""The picture of experiments/tokens.py: KL against the bytes that caches take."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from tokens_cases import ALL, SETUPS

from kvjax.evals.pareto import LOWEST_KL
from kvjax.evals.table import one_line

Row = dict[str, Any]
Series = dict[tuple[str, str], list[Row]]

INK = "#222222"
TICKS = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0)
# Colours that every colour vision tells apart (Okabe and Ito's); no two policies share a marker.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#b8860b", INK)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "h", "8", "p", "d", "H", "*")
STYLES = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)))  # of codes
FILLS = ("full", "white", "left", "top", "right", "bottom")


def flat(rows: Sequence[Row]) -> list[Row]:
    """Samples of the retrieval part, as `heat_map_png` takes them."""
    found = []
    for row in rows:
        if row["part"] == "retrieval":
            kept = row["policy"] if row["budget"] is None else f"{row['policy']} {row['budget']:g}"
            place = {"method": f"{kept}, {row['method']}", "task": row["task"]}
            found += [{**place, "length": row["length"], **one} for one in row["rows"]]
    return found


def front(rows: Sequence[Row]) -> list[Row]:
    """Rows that no other beats in both bytes and KL, from the smallest on.

    Example:
      >>> rows = [{"ratio": r, "kl": k} for r, k in ((0.2, 0.5), (0.3, 0.6), (0.4, 0.1))]
      >>> [row["ratio"] for row in front(rows)]
      [0.2, 0.4]
    """
    best: list[Row] = []
    for row in sorted(rows, key=lambda row: (row["ratio"], row["kl"])):
        if not best or row["kl"] < best[-1]["kl"]:
            best.append(row)
    return best


def pareto_png(rows: Sequence[Row]) -> bytes:
    """KL (log) against bytes relative to bf16 (log), 1400 x 850 pixels.

    Args:
      rows: lines of metrics.jsonl; those of the part "fidelity" are drawn.
    """
    rows = [row for row in rows if row["part"] == "fidelity"]
    figure = Figure(figsize=(14, 8.5), dpi=100, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_axes((0.075, 0.085, 0.665, 0.8))
    title = "Which tokens stay: KL against the bytes that are left"
    figure.text(0.075, 0.945, title, size=19, weight="bold", color=INK)
    with warnings.catch_warnings():  # a name in a script that the font lacks is drawn as boxes
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        if rows:
            figure.text(0.075, 0.91, _under(rows[0]), size=12.5, color="#444444", parse_math=False)
            _draw(axes, rows)
        else:
            axes.text(0.5, 0.5, "nothing is measured", size=16, ha="center")
            axes.set_axis_off()
        buffer = io.BytesIO()
        canvas.print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()


def _under(row: Row) -> str:
    sink, recent, _ = row["layout"]
    windows = f"{row['windows']} x {row['continuation']} tokens after {row['history']}"
    text = one_line(row["text"]["about"]).partition(" (")[0]
    exact = f"first {sink} and last {recent} exact"
    return f"{one_line(row['model'])} on {text}, {windows}; {exact}; bars ± 1 s.e."


def _draw(axes: Axes, rows: Sequence[Row]) -> None:
    series: Series = {}
    for row in rows:
        series.setdefault((row["policy"], row["method"]), []).append(row)
    methods = list(dict.fromkeys(method for _, method in series))
    policies = [name for name in (ALL, *SETUPS) if any(p == name for p, _ in series)]
    shown = [row for row in rows if row["ratio"] < 1 and row["kl"] >= LOWEST_KL]
    places = side_by_side(shown)
    best = front(shown)
    if best:
        steps = [(row["ratio"], row["kl"]) for row in best]
        axes.step(*zip(*steps, strict=True), where="post", color="#c3cad1", lw=6, zorder=1)
    for (policy, method), own in series.items():
        drawn = sorted(
            ((places[i], row) for i, row in enumerate(shown) if row in own), key=lambda at: at[0]
        )
        if drawn:
            _curve(axes, drawn, _look(policy), methods.index(method))
    _scales(axes, shown)
    _legend(axes, policies, methods, [row for row in rows if row not in shown])


def side_by_side(rows: Sequence[Row], gap: float = 1.02) -> list[float]:
    """Where to draw each row: at its ratio, but those of the same bytes side by side, best first.

    Example:
      >>> rows = [{"ratio": r, "kl": k} for r, k in ((0.3, 0.5), (0.3, 0.4), (0.6, 0.1))]
      >>> [round(x, 3) for x in side_by_side(rows)]
      [0.303, 0.297, 0.6]
    """
    columns: dict[int, list[int]] = {}
    for i, row in enumerate(rows):
        columns.setdefault(round(math.log(row["ratio"]) / 0.03), []).append(i)
    places = [0.0] * len(rows)
    for own in columns.values():
        for rank, i in enumerate(sorted(own, key=lambda i: rows[i]["kl"])):
            places[i] = rows[i]["ratio"] * gap ** (rank - (len(own) - 1) / 2)
    return places


def _look(policy: str) -> dict[str, Any]:
    place = (ALL, *SETUPS).index(policy)
    return {"color": COLOURS[place % len(COLOURS)], "marker": MARKERS[place % len(MARKERS)]}


def _curve(axes: Axes, drawn: Sequence[tuple[float, Row]], look: dict[str, Any], code: int) -> None:
    """The budgets of one policy under one method, joined."""
    x, y, error = np.array([(place, row["kl"], row["kl_se"]) for place, row in drawn]).T
    bars = [np.minimum(error, 0.9 * y), error]
    colour = look["color"]
    axes.errorbar(x, y, bars, ls="", color=colour, capsize=2, lw=1, alpha=0.6, zorder=2)
    axes.plot(x, y, lw=1.6, ms=10, **_style(code), **look, zorder=3)


def _style(code: int) -> dict[str, Any]:
    """The line and the filling of the marks of codes."""
    fill = FILLS[code % len(FILLS)]
    face = {"markerfacecolor": "white"} if fill == "white" else {"fillstyle": fill}
    return {"ls": STYLES[code % len(STYLES)], "markerfacecoloralt": "white", **face}


def _scales(axes: Axes, rows: Sequence[Row]) -> None:
    axes.set(xscale="log", yscale="log")
    axes.margins(0.06)
    axes.set_xlabel("bytes of the caches, all leaves counted, relative to bf16", size=14, color=INK)
    axes.set_ylabel("KL to the exact model, nats per token", size=14, color=INK)
    if rows:
        low, high = min(row["ratio"] for row in rows), max(row["ratio"] for row in rows)
        axes.set_xticks([t for t in TICKS if low / 1.2 <= t <= high * 1.2])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    low, high = axes.get_ylim()
    some = (1, 2, 5) if high > 30 * low else (1, 1.5, 2, 3, 5, 7)
    axes.yaxis.set_major_locator(LogLocator(subs=some, numticks=12))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_formatter(NullFormatter())
    axes.tick_params(labelsize=13)
    axes.grid(which="major", color="#e6e8eb")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _legend(
    axes: Axes, policies: Sequence[str], methods: Sequence[str], left: Sequence[Row]
) -> None:
    handles = [Line2D([], [], ls="", ms=10, label=p, **_look(p)) for p in policies]
    blank = Line2D([], [], ls="", label="")
    codes = [
        Line2D([], [], color=INK, marker="o", ms=9, label=one_line(method), **_style(i))
        for i, method in enumerate(methods)
    ]
    pareto = Line2D([], [], color="#c3cad1", lw=6, label="Pareto front")
    handles += [blank, *codes, blank, pareto]
    notes = [f"not drawn: {row['policy']}, {row['method']},\nKL {row['kl']:.2g}" for row in left]
    notes = ["marks of the same bytes\nstand side by side", *notes[:3]]
    handles += [blank, *(Line2D([], [], ls="", label=note) for note in notes)]
    place: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1.01, 1.0), "frameon": False}
    axes.legend(handles=handles, **place, fontsize=12.5, labelspacing=0.55, handlelength=3)
