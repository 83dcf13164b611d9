"""The picture of a retrieval run: a score per depth and length, a panel per method and task."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from kvjax.core.errors import InputError, known
from kvjax.evals.table import one_line

INK = "#222222"
COLOURS = colormaps["cividis"]  # even in lightness, and the same to every colour vision

# score: (title, the best comes last in the colours, how a cell is written)
SCORES = {
    "exact": ("answers that greedy decoding gets right, %", True, lambda x: f"{100 * x:.0f}"),
    "token_accuracy": ("answer tokens that rank first, %", True, lambda x: f"{100 * x:.0f}"),
    "nll": ("nats per answer token: lower is better", False, lambda x: f"{x:.2f}"),
}


def cells(rows: Sequence[Mapping[str, Any]], score: str) -> dict[tuple, tuple[float, int]]:
    """Mean score and number of rows, by (method, task, length, depth), in order of appearance."""
    found: dict[tuple, list[float]] = {}
    for row in rows:
        place = row["method"], row["task"], row["length"], row["depth"]
        found.setdefault(place, []).append(row[score])
    return {place: (float(np.mean(values)), len(values)) for place, values in found.items()}


def heat_map_png(rows: Sequence[Mapping[str, Any]], *, score: str = "exact") -> bytes:
    """Depth down, length across, the mean in each cell; a row of panels per method.

    Args:
      rows: of `kvjax.evals.retrieval.run`, of one method or several.
      score: a name of `SCORES`.
    Raises:
      InputError: no rows, an unknown score, a score that is not finite.
    """
    if score not in SCORES:
        raise InputError("score", got=repr(score), expected=known(SCORES), fix="use one of these")
    if not rows:
        raise InputError("rows", got="none", expected="at least one", fix="run a task first")
    means = cells(rows, score)
    if not all(math.isfinite(mean) for mean, _ in means.values()):
        raise InputError(
            "rows", got=f"{score} that is not finite", expected="numbers", fix="check the runner"
        )
    methods, tasks = (list(dict.fromkeys(place[i] for place in means)) for i in (0, 1))
    title, rising, _ = SCORES[score]
    highest = 1.0 if rising else max(mean for mean, _ in means.values()) or 1.0
    scale = ScalarMappable(Normalize(0, highest), COLOURS if rising else COLOURS.reversed())

    size = _size(means, methods, tasks)
    figure = Figure(figsize=size, dpi=100, facecolor="white", layout="constrained")
    canvas = FigureCanvasAgg(figure)
    panels = figure.subplots(len(methods), len(tasks), squeeze=False)
    for axes, method in zip(panels, methods, strict=True):
        for one, task in zip(axes, tasks, strict=True):
            own = {k[2:]: v[0] for k, v in means.items() if k[:2] == (method, task)}
            _draw(one, own, scale, score)
            name = f"{one_line(method)}: {one_line(task)}" if method else one_line(task)
            one.set_title(name, size=12, color=INK, parse_math=False)
    counts = sorted({n for _, n in means.values()})
    per_cell = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    figure.suptitle(f"Retrieval: {title} ({per_cell} samples per cell)", size=14, color=INK)
    bar = figure.colorbar(scale, ax=panels, fraction=0.04, pad=0.02)
    bar.outline.set_visible(False)
    bar.ax.yaxis.set_major_formatter(lambda x, _: SCORES[score][2](x))
    buffer = io.BytesIO()
    with warnings.catch_warnings():  # a name in a script that the font lacks is drawn as boxes
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        canvas.print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()


def _size(means, methods, tasks) -> tuple[float, float]:
    """Inches that leave a cell room for its number."""
    panels = [[place for place in means if place[:2] == p] for p in {place[:2] for place in means}]
    lengths, depths = (max(len({place[i] for place in own}) for own in panels) for i in (2, 3))
    wide = max(3.0, 0.75 * lengths + 1.2) * len(tasks) + 1.2
    tall = max(1.9, 0.42 * depths + 1.2) * len(methods) + 0.7
    return max(8.5, wide), tall  # the title is 8 inches


def _draw(axes: Axes, own: Mapping[tuple, float], scale: ScalarMappable, score: str) -> None:
    if not own:
        axes.text(0.5, 0.5, "not run", ha="center", va="center", color=INK)
        axes.set_axis_off()
        return
    lengths = sorted({length for length, _ in own})
    depths = sorted({depth for _, depth in own}, key=lambda d: -1.0 if d is None else d)
    for (length, depth), mean in own.items():
        x, y, colour = lengths.index(length), depths.index(depth), scale.to_rgba(np.array(mean))
        axes.fill_between([x - 0.47, x + 0.47], y - 0.46, y + 0.46, color=colour, lw=0)
        luminance = float(np.dot(colour[:3], (0.2126, 0.7152, 0.0722)))
        ink = INK if luminance > 0.5 else "white"
        axes.text(x, y, SCORES[score][2](mean), ha="center", va="center", color=ink, size=11)
    axes.set_xlim(-0.5, len(lengths) - 0.5)
    axes.set_ylim(len(depths) - 0.5, -0.5)
    axes.set_xticks(range(len(lengths)), [_short(length) for length in lengths])
    axes.set_yticks(range(len(depths)), ["any" if d is None else f"{d:g}" for d in depths])
    axes.set_xlabel("length, tokens")
    axes.set_ylabel("depth")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _short(length: int) -> str:
    """1024 as 1K, 1000 as 1000."""
    return f"{length // 1024}K" if length % 1024 == 0 else str(length)
