"""The picture of `kvjax distortion`: how far each code is from the rate-distortion bound."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Sequence
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from kvjax.evals.distortion import Row
from kvjax.evals.families import FAMILIES, family
from kvjax.evals.table import one_line

WORST = 14.0  # dB; beyond it a code is drawn at the edge


def gap_png(rows: Sequence[Row]) -> bytes:
    """One panel per kind of data and dimension: dB above the bound against true bits."""
    panels = list(dict.fromkeys((row.data, row.d) for row in rows))
    columns = min(3, len(panels))
    rank = -(-len(panels) // columns)
    figure = Figure(figsize=(6.2 * columns + 2, 4.6 * rank + 0.9), dpi=100, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    grid = figure.subplots(rank, columns, squeeze=False, sharex=True, sharey=True)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    for axes, panel in zip(grid.flat, panels, strict=False):
        _draw(axes, [row for row in rows if (row.data, row.d) == panel])
        axes.set_title(one_line(f"{panel[0]}, d = {panel[1]}"), size=13, parse_math=False)
    for axes in grid[:, 0]:
        axes.set_ylabel("dB above the bound", size=12)
    for axes in grid.flat[max(0, len(panels) - columns) : len(panels)]:  # the lowest of each column
        axes.set_xlabel("true bits per value", size=12)
        axes.tick_params(labelbottom=True)
    handles: dict[str, Any] = {}
    for axes in grid.flat:
        lines, labels = axes.get_legend_handles_labels()
        handles |= dict(zip(labels, lines, strict=True))
    figure.suptitle("Distance to the rate-distortion bound: lower is better", size=16, x=0.45)
    figure.tight_layout(rect=(0, 0, 1 - 2.3 / figure.get_figwidth(), 0.985))
    figure.legend(list(handles.values()), list(handles), loc="center right", fontsize=11)
    buffer = io.BytesIO()
    with warnings.catch_warnings():  # a name in a script that the font lacks is drawn as boxes
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        canvas.print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()


def _draw(axes, rows: Sequence[Row]) -> None:
    kinds: dict[str, list[Row]] = {}
    for row in rows:
        kinds.setdefault(_curve(row.codec), []).append(row)
    for stem, members in kinds.items():
        members.sort(key=lambda row: row.bits_per_value)
        colour, marker = FAMILIES[family(stem)]
        dashed = stem not in FAMILIES and len(members) > 1  # a variant of its family
        axes.plot(
            [row.bits_per_value for row in members],
            [min(row.gap_db, WORST) for row in members],
            marker=marker,
            ls="--" if dashed else "-",
            fillstyle="none" if dashed else "full",
            color=colour,
            lw=1.2,
            ms=7,
            label=stem,
        )
    axes.axhline(0, color="#222222", lw=1)
    axes.set_xlim(0.8, 6.8)
    axes.set_ylim(-3, WORST + 0.5)
    axes.grid(color="#e6e8eb")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _curve(name: str) -> str:
    """The name without its width: what is one curve. Half bits are codes of another kind.

    Example:
      >>> _curve("turboquant-3"), _curve("turboquant-2.5"), _curve("hadamard-int4"), _curve("nvfp4")
      ('turboquant', 'turboquant, outliers', 'hadamard-int', 'nvfp4')
    """
    found = None if family(name) == "float" else re.fullmatch(r"(.+?)-?(\d+(\.\d+)?)", name)
    if found is None:
        return name
    return f"{found[1]}, outliers" if found[3] else found[1]
