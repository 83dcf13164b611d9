"""The picture of `kvjax limits`: the rungs of the ladder over all KV heads, layer by layer."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from kvjax.evals.table import one_line

# From the worst rung to the best; told apart with any colour vision, and dark to light in grey.
COLOURS = ("#0072b2", "#56b4e9", "#009e73", "#e69f00", "#c2185b", "#7a52a8", "#8a8a8a", "#b5541c")
INK = "#222222"


def limits_png(metrics: Mapping[str, Any]) -> bytes:
    """Left: each head's errors, by layer. Right: measured against predicted, a dot per head."""
    figure = Figure(figsize=(15, 6.4), dpi=100, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(2.3, 1))
    _draw_heads(left, metrics)
    _draw_agreement(right, metrics)
    for axes in (left, right):
        axes.grid(color="#e6e8eb")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    title = f"Logit errors on {metrics['model']}, {metrics['bits']} bits: lower is better"
    figure.suptitle(one_line(title), size=16, parse_math=False)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=min(8, len(labels)), fontsize=11)
    figure.tight_layout(rect=(0, 0.07, 1, 0.99))
    buffer = io.BytesIO()
    with warnings.catch_warnings():  # a name in a script that the font lacks is drawn as boxes
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        canvas.print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()


def _draw_heads(axes, metrics: Mapping[str, Any]) -> None:
    layers, heads = np.shape(metrics["bound"])
    x = np.arange(layers * heads) / heads  # a layer is 1 wide
    style = {"color": INK, "lw": 1.6}
    axes.plot(
        x, np.ravel(metrics["bound_known_text"]), label=f"bound, {metrics['bits']} bits", **style
    )
    axes.fill_between(x, np.ravel(metrics["bound_known_text"]), -1e3, color="#f1f2f4", zorder=0)
    lowest, highest = np.min(metrics["bound_known_text"]), 0.0
    for row, colour in zip(metrics["rows"], _colours(metrics), strict=True):
        measured = np.ravel(row["measured"])
        lowest, highest = min(lowest, measured.min()), max(highest, measured.max())
        if row["predicted"] is not None:
            axes.plot(x, np.ravel(row["predicted"]), color=colour, lw=1.2)
        name = one_line(row["method"]).replace("$", r"\$")
        axes.plot(x, measured, ls="", marker="o", ms=4, color=colour, label=name)
    axes.set_xlim(-0.5, layers - 0.5 + 1 / heads)
    axes.set_ylim(lowest - 2, min(highest, 6) + 1)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("layer, one step per KV head", size=12)
    axes.set_ylabel("logit error, dB of the logit variance", size=12)
    axes.set_title("lines: predicted; dots: measured on another text", size=12)


def _draw_agreement(axes, metrics: Mapping[str, Any]) -> None:
    low, high = [], []
    for row, colour in zip(metrics["rows"], _colours(metrics), strict=True):
        if row["predicted"] is None:
            continue
        predicted, measured = np.ravel(row["predicted"]), np.ravel(row["measured"])
        low.append(min(predicted.min(), measured.min()))
        high.append(max(predicted.max(), measured.max()))
        axes.plot(predicted, measured, ls="", marker="o", ms=4, color=colour, alpha=0.7)
    ends = np.array([min(low, default=-30) - 1, max(high, default=0) + 1])
    axes.plot(ends, ends, color=INK, lw=1)
    axes.fill_between(ends, ends - 1.5, ends + 1.5, color="#f1f2f4", zorder=0)
    axes.set_xlim(*ends)
    axes.set_ylim(*ends)
    axes.set_xlabel("predicted by the calibration, dB", size=12)
    axes.set_ylabel("measured, dB", size=12)
    axes.set_title("band: 1.5 dB either way", size=12)


def _colours(metrics: Mapping[str, Any]) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(len(metrics["rows"]))]
