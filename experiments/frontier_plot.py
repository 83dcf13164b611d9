"""The picture of experiments/frontier.py: KL against true bits, a panel per model."""

from __future__ import annotations

import io
import itertools
import math
import re
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from frontier_tables import calibration_of, layout_of, over_texts
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from kvjax.calibrate.names import CALIBRATED
from kvjax.calibrate.rungs import LADDER
from kvjax.evals.families import FAMILIES, family
from kvjax.evals.pareto import LOWEST_KL, TICKS, place_names
from kvjax.evals.table import one_line

Row = dict[str, Any]

MOST_BITS = 7  # what keeps more is not drawn
INK = "#222222"
Series = dict[str, list[Row]]
Box = tuple[float, float, float, float]  # left, bottom, right, top, in pixels


def frontier_png(rows: Sequence[Row], methods: Sequence[str] = ()) -> bytes:
    """Means over the test texts in the first layout; 1600 pixels wide.

    Args:
      rows: lines of metrics.jsonl. methods: the ones to draw, all if empty.
    """
    rows = [row for row in rows if row["part"] == "frontier"]
    rows = [row for row in rows if layout_of(row) == layout_of(rows[0])]
    models = list(dict.fromkeys(row["model"] for row in rows))
    across, down = min(2, max(1, len(models))), max(1, -(-len(models) // 2))
    figure = Figure(figsize=(16, 1.1 + 7.6 * down), dpi=100, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    all_axes = figure.subplots(down, across, squeeze=False).ravel()
    tall = figure.get_figheight()
    edges = {"left": 0.078, "right": 0.99, "top": 1 - 1.45 / tall, "bottom": 0.78 / tall}
    figure.subplots_adjust(**edges, wspace=0.14, hspace=0.2)
    _head(figure, rows, tall)
    for axes in all_axes[len(models) :]:
        axes.set_axis_off()
    for axes, model in zip(all_axes, models, strict=False):
        means = over_texts([row for row in rows if row["model"] == model])
        _panel(axes, canvas, model, [r for r in means if not methods or r["method"] in methods])
    buffer = io.BytesIO()
    with warnings.catch_warnings():  # a name in a script that the font lacks is drawn as boxes
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        canvas.print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()


def _head(figure: Figure, rows: Sequence[Row], tall: float) -> None:
    title = "What a smaller KV cache costs: KL to the full cache against true bits"
    figure.text(0.078, 1 - 0.45 / tall, title, size=23, weight="bold", color=INK)
    if not rows:
        return
    one = rows[0]
    sink, recent, _ = layout_of(one)
    texts = " and ".join(dict.fromkeys(row["text"]["text"] for row in rows))
    made = next((calibration_of(row) for row in rows if row["calibration"]), None)
    windows = f"{one['windows']} x {one['context']} tokens"
    under = f"tested on {texts} ({windows} each); "
    under += f"calibrated on {made}; " if made else ""
    under += f"first {sink} and last {recent} tokens exact; bars ± 1 s.e."
    figure.text(0.078, 1 - 0.83 / tall, one_line(under), size=15, color="#444444", parse_math=False)


def _panel(axes, canvas: FigureCanvasAgg, model: str, means: Sequence[Row]) -> None:
    drawn = [row for row in means if row["kl"] >= LOWEST_KL and row["bits_per_value"] < MOST_BITS]
    left_out = [row["method"] for row in means if row not in drawn]
    title = one_line(model) + (f"   (not drawn: {', '.join(left_out)})" if left_out else "")
    axes.set_title(title[:90], size=17, loc="left", color=INK, parse_math=False)
    if not drawn:
        axes.set_axis_off()
        return
    drawn.sort(key=lambda row: row["bits_per_value"])
    series = by_series(drawn)
    _scales(axes, drawn)
    _rungs(axes, drawn)
    for name, own in series.items():
        _curve(axes, name, own)
    canvas.draw()
    _name(axes, canvas.get_renderer(), drawn, series)


def _name(axes, renderer, rows: Sequence[Row], series: Series) -> None:
    """Each curve is named once, at its lowest rate: most in a column on the left, others nearby."""
    start = 1.25 * min(row["bits_per_value"] for row in rows)
    low = {name: own[0] for name, own in series.items() if own[0]["bits_per_value"] < start}
    taken = _column(axes, renderer, low)
    nearby = {own[0]["method"]: name for name, own in series.items() if name not in low}
    place_names(
        axes,
        renderer,
        [one_line(nearby.get(row["method"], "")) for row in rows],
        [(row["bits_per_value"], row["kl"]) for row in rows],
        [row["kl_se"] for row in rows],
        taken=taken,
        crossed=[box for own in series.values() for box in _along(axes, own)],
        size=14,
        sideways=(14, 30, 60, 100),
    )


def _column(axes, renderer, low: dict[str, Row]) -> list[Box]:
    """Names above each other in the order of their marks, so that no two lines cross; boxes."""
    names = sorted(low, key=lambda name: low[name]["kl"])
    marks = [(low[name]["bits_per_value"], low[name]["kl"]) for name in names]
    pixels = [axes.transData.transform(mark) for mark in marks]
    right = min(x for x, _ in pixels) - 44
    frame = axes.get_window_extent(renderer)
    gap = min(25.0, (frame.height - 20) / len(names))
    tall = spread([y for _, y in pixels], gap)
    tall += max(0.0, frame.y0 + 14 - tall[0]) - max(0.0, tall[-1] - frame.y1 + 10)
    boxes = []
    for name, mark, (x, y), at in zip(names, marks, pixels, tall, strict=True):
        colour = tuple(0.68 * channel for channel in to_rgb(FAMILIES[family(name)][0]))
        line = {"arrowstyle": "-", "color": colour, "lw": 0.9, "relpos": (1, 0.5)}
        text = axes.annotate(
            *(one_line(name), mark, (right - x, at - y)),
            textcoords="offset pixels",
            ha="right",
            va="center",
            size=14,
            color=colour,
            parse_math=False,
            arrowprops=line | {"shrinkA": 1, "shrinkB": 5},
        )
        boxes.append(tuple(text.get_window_extent(renderer).extents))
    return boxes


def spread(wanted: Sequence[float], gap: float) -> np.ndarray:
    """The nearest numbers to rising ones that are at least `gap` apart, by least squares.

    Example:
      >>> spread([0.0, 1.0, 9.0], 3.0).tolist()
      [-1.0, 2.0, 9.0]
    """
    runs: list[list[float]] = []  # rising means of `wanted - i gap`: pool what does not rise
    for i, y in enumerate(wanted):
        runs.append([y - i * gap])
        while len(runs) > 1 and np.mean(runs[-2]) > np.mean(runs[-1]):
            last = runs.pop()
            runs[-1] += last
    flat = [float(np.mean(run)) for run in runs for _ in run]
    return np.array(flat) + gap * np.arange(len(flat))


def by_series(rows: Sequence[Row]) -> Series:
    """Rows of one method at several widths, by its name without them; single ones by all of it."""
    series: Series = {}
    for row in rows:
        series.setdefault(stem(row["method"]), []).append(row)
    return {name if len(own) > 1 else own[0]["method"]: own for name, own in series.items()}


def stem(method: str) -> str:
    """A name without its width.

    Example:
      >>> stem("klt-lloyd-max-2"), stem("int4"), stem("kivi-2/turboquant-3")
      ('klt-lloyd-max', 'int', 'kivi-2/turboquant-3')
    """
    return method if "/" in method else re.sub(r"-?\d+(\.\d+)?$", "", method)


def _scales(axes, rows: Sequence[Row]) -> None:
    bits = [row["bits_per_value"] for row in rows]
    low = min(row["kl"] for row in rows) / 1.6
    high = max(row["kl"] + row["kl_se"] for row in rows) * 1.6
    right = max(max(bits) * 1.08, 2 * min(bits))
    names = 225 / axes.get_window_extent().width  # the part that names take, left of all marks
    left = min(bits) / (right / min(bits)) ** (names / (1 - names))
    axes.set(xscale="log", yscale="log", xlim=(left, right), ylim=(low, high))
    axes.set_xlabel("true bits per value, all side information counted", size=16, color=INK)
    if axes.get_subplotspec().is_first_col():
        axes.set_ylabel("KL, nats per token", size=16, color=INK)
    axes.set_xticks([t for t in TICKS if left <= t <= right])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    some = (1, 2, 5) if high < 100 * low else (1,)
    axes.yaxis.set_major_locator(LogLocator(subs=some, numticks=12))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_formatter(NullFormatter())
    axes.tick_params(labelsize=15, labelcolor=INK)
    axes.tick_params(axis="x", which="minor", length=0)
    axes.grid(which="major", color="#e6e8eb")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _curve(axes, name: str, rows: Sequence[Row]) -> None:
    """The widths of one method, joined; calibrated ones in heavy lines."""
    colour, marker = FAMILIES[family(name)]
    calibrated = any(row["method"] in CALIBRATED for row in rows)
    x, y, error = np.array([(r["bits_per_value"], r["kl"], r["kl_se"]) for r in rows]).T
    axes.plot(
        *(x, y),
        color=colour,
        lw=2.6 if calibrated else 1.3,
        alpha=0.9 if calibrated else 0.55,
        zorder=2.5 if calibrated else 2,
    )
    bars = {"ls": "", "color": colour, "capsize": 3, "lw": 1.2}
    axes.errorbar(x, y, [np.minimum(error, 0.95 * y), error], **bars, zorder=2.6)
    edge = {"markeredgecolor": "white", "markeredgewidth": 0.8}
    axes.plot(x, y, ls="", marker=marker, ms=13 if calibrated else 10, color=colour, **edge)


def _rungs(axes, rows: Sequence[Row]) -> None:
    """The ladder at each width: from TurboQuant down to the last rung, dotted."""
    found = {row["method"]: (row["bits_per_value"], row["kl"]) for row in rows}
    for width in (2, 3, 4):
        points = [found[f"{rung}-{width}"] for rung in LADDER if f"{rung}-{width}" in found]
        if len(points) > 1:
            axes.plot(*zip(*points, strict=True), color=INK, ls=":", lw=1.6, zorder=1.8)


def _along(axes, rows: Sequence[Row]) -> list[Box]:
    """Small boxes along a curve, in pixels."""
    points = [axes.transData.transform((r["bits_per_value"], r["kl"])) for r in rows]
    boxes = []
    for a, b in itertools.pairwise(points):
        steps = max(2, int(math.dist(a, b) / 8))
        for x, y in np.linspace(a, b, steps):
            boxes.append((x - 4, y - 4, x + 4, y + 4))
    return boxes
