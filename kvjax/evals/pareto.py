"""The picture of a comparison: KL against true bits, with the Pareto front and every name."""

from __future__ import annotations

import io
import itertools
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from kvjax.evals.families import FAMILIES, family
from kvjax.evals.table import Row, fixed, front_rows, measured, number, one_line, point

LOWEST_KL = 1e-5  # below this the plot only says "less": it is rounding, not compression
TICKS = (0.5, 1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 12, 16, 32)  # bits

Box = tuple[float, float, float, float]  # left, bottom, right, top, in pixels


def pareto_png(metrics: Mapping[str, Any]) -> bytes:
    """KL (log) against true bits per value (log2), 1200 x 800 pixels."""
    rows = measured(metrics.get("rows") or [])
    figure = Figure(figsize=(12, 8), dpi=100, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_axes((0.095, 0.09, 0.885, 0.79))
    figure.text(0.095, 0.945, "What compression costs: KL against bits", size=19, weight="bold")
    under = f"{one_line(metrics.get('model'))} on {one_line(metrics.get('text'))}"
    windows, context = (fixed(number(metrics, name), 0) for name in ("windows", "context"))
    under = f"{under[:100]}, {windows} windows of {context} tokens, bars ± 1 s.e."
    figure.text(0.095, 0.905, under, size=13, color="#555555", parse_math=False)
    with warnings.catch_warnings():  # a name in a script that the font lacks is drawn as boxes
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        if rows:
            _draw(axes, canvas, rows)
        else:
            axes.text(0.5, 0.5, "no method has both bits and KL", size=16, ha="center")
            axes.set_axis_off()
        buffer = io.BytesIO()
        canvas.print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()


def _draw(axes: Axes, canvas: FigureCanvasAgg, rows: Sequence[Row]) -> None:
    floor = _floor(rows)
    marks = [(bits, max(kl, floor)) for bits, kl in map(point, rows)]
    low, high = _limits(axes, marks, rows, floor)
    front = [(bits, max(kl, floor)) for bits, kl in map(point, front_rows(rows))]
    ends = [(front[0][0], high), *front, (axes.get_xlim()[1], front[-1][1])]
    axes.step(*zip(*ends, strict=True), where="post", color="#9aa5b1", lw=2.2, zorder=1)
    for row, (bits, kl) in zip(rows, marks, strict=True):
        colour, marker = FAMILIES[family(one_line(row.get("method")))]
        clipped = point(row)[1] < floor
        error = number(row, "kl_se")
        if error and math.isfinite(error) and not clipped:
            down = min(error, kl - low)
            axes.errorbar(bits, kl, [[down], [error]], color=colour, capsize=4, lw=1.3, zorder=2)
        style: dict[str, Any] = {
            "color": colour,
            "markeredgecolor": "white",
            "markeredgewidth": 0.9,
            "zorder": 3,
        }
        axes.plot(bits, kl, "v" if clipped else marker, markersize=11, **style)
    legend = _legend(axes, rows, floor)
    canvas.draw()
    left, bottom, right, top = legend.get_window_extent().extents
    _label(axes, canvas.get_renderer(), rows, marks, ends, (left, bottom, right, top))


def _floor(rows: Sequence[Row]) -> float:
    """The decade under the least KL that is more than rounding."""
    kls = [kl for _, kl in map(point, rows) if kl >= LOWEST_KL]
    return max(LOWEST_KL, 10.0 ** math.floor(math.log10(min(kls) / 1.3))) if kls else LOWEST_KL


def _limits(axes: Axes, marks, rows, floor: float) -> tuple[float, float]:
    bits = [b for b, _ in marks]
    tops = [kl + _finite(number(row, "kl_se")) for row, (_, kl) in zip(rows, marks, strict=True)]
    low = floor / 1.5 if any(point(row)[1] < floor for row in rows) else floor
    high = 2.0 * max(*tops, 5 * floor)
    axes.set(xscale="log", yscale="log", ylim=(low, high))
    apart = math.sqrt(max(1.0, 2.0 * min(bits) / max(bits)))  # at least an octave
    left, right = min(bits) / (1.15 * apart), max(bits) * 1.22 * apart
    axes.set_xlim(left, right)
    axes.set_xlabel("true bits per value (scales, zeros and norms counted)", size=14)
    axes.set_ylabel("KL to the full cache, nats per token", size=14)
    axes.set_xticks([t for t in TICKS if left <= t <= right])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_locator(LogLocator(numticks=12))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(labelsize=13)
    axes.tick_params(axis="x", which="minor", length=0)
    axes.grid(which="major", color="#e6e8eb")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return low, high


def _finite(x: float | None) -> float:
    return x if x is not None and math.isfinite(x) else 0.0


def _legend(axes: Axes, rows: Sequence[Row], floor: float) -> Legend:
    present = {family(one_line(row.get("method"))) for row in rows}
    handles = [
        Line2D([], [], ls="", marker=marker, color=colour, ms=11, mec="white", label=name)
        for name, (colour, marker) in FAMILIES.items()
        if name in present
    ]
    handles.append(Line2D([], [], color="#9aa5b1", lw=2.2, label="Pareto front"))
    if any(point(row)[1] < floor for row in rows):
        below = f"KL below {floor:g}, drawn there"
        handles.append(Line2D([], [], ls="", marker="v", color="#555555", ms=10, label=below))
    return axes.legend(handles=handles, loc="best", fontsize=12.5, framealpha=0.95)


def _label(axes: Axes, renderer, rows: Sequence[Row], marks, ends, legend: Box) -> None:
    names = [one_line(row.get("method")) for row in rows]
    errors = [_finite(number(row, "kl_se")) for row in rows]
    line = [tuple(axes.transData.transform(end)) for end in ends]
    steps = [box for a, b in itertools.pairwise(line) for box in _steps(a, b)]
    place_names(axes, renderer, names, marks, errors, taken=[legend], crossed=steps)


def place_names(
    axes: Axes,
    renderer,
    names: Sequence[str],
    marks: Sequence[tuple[float, float]],
    errors: Sequence[float],
    *,
    taken: Sequence[Box],
    crossed: Sequence[Box],
    size: float = 12,
    sideways: Sequence[float] = (14, 30),
) -> None:
    """Puts each name where it covers the least: greedy, then twice more knowing all the others.

    Args:
      names: of the marks; "" for one that gets none.
      errors: half lengths of the error bars.
      taken: what names should not cover. crossed: what they may sooner.
      size: of the letters, in points. sideways: how far off a name may begin, in pixels.
    """
    to_pixels, to_data = axes.transData.transform, axes.transData.inverted().transform
    pixels = [tuple(to_pixels(mark)) for mark in marks]
    fixed_boxes = [*taken, *(_around(x, y, 9, 9) for x, y in pixels)]
    for (bits, kl), (x, _), error in zip(marks, pixels, errors, strict=True):
        low = max(kl - error, axes.get_ylim()[0])
        fixed_boxes.append(
            (x - 5, to_pixels((bits, low))[1], x + 5, to_pixels((bits, kl + error))[1])
        )
    frame = tuple(axes.get_window_extent(renderer).extents)
    texts = [_text_at(axes, name, mark, size) for name, mark in zip(names, marks, strict=True)]
    sizes = [text.get_window_extent(renderer).size for text in texts]
    near = [sum(math.dist(a, b) < 120 for b in pixels) for a in pixels]
    order = sorted((i for i, name in enumerate(names) if name), key=lambda i: -near[i])
    spots: dict[int, _Spot] = {}
    for i in order * 3:
        others = [spot for n, spot in spots.items() if n != i]
        spots[i] = _place(
            pixels[i], sizes[i], pixels, fixed_boxes, others, crossed, frame, sideways
        )
    for i, spot in spots.items():
        texts[i].set_position((spot.box[0] + 2 - pixels[i][0], spot.middle - pixels[i][1]))
        if spot.leader:
            points = zip(marks[i], to_data(spot.leader[-1]), strict=True)
            axes.plot(*points, color=texts[i].get_color(), lw=0.8, zorder=1.5)


def _text_at(axes: Axes, name: str, mark, size: float):
    short = name if len(name) <= 40 else f"{name[:19]}…{name[-19:]}"
    shade = tuple(0.72 * channel for channel in to_rgb(FAMILIES[family(name)][0]))
    style: dict[str, Any] = {"size": size, "color": shade, "va": "center", "parse_math": False}
    return axes.annotate(short, mark, (0, 0), textcoords="offset pixels", zorder=4, **style)


class _Spot(NamedTuple):
    """Where a name goes, in pixels: its box, and points along the line back to its mark."""

    box: Box
    leader: list[tuple[float, float]]

    @property
    def middle(self) -> float:
        return (self.box[1] + self.box[3]) / 2


def _place(
    at, size, pixels, fixed_boxes, others: Sequence[_Spot], crossed_boxes, frame, sideways
) -> _Spot:
    """The cheapest spot for a name of `size` pixels near the point `at`."""
    (wide, tall), spots = size, []
    shifts = [0, 14, -14, 22, -22, 34, -34, 48, -48, 64, -64, 82, -82, 102, -102]
    names = np.array([spot.box for spot in others])
    blocked = np.array([*fixed_boxes, *(spot.box for spot in others)])
    threads = [_around(*dot, 4, 4) for spot in others for dot in spot.leader]
    crossed = np.array([*crossed_boxes, *threads])
    first, *more = sideways
    across = [first, -first - wide, -wide / 2, *(x for far in more for x in (far, -far - wide))]
    for dy, dx in itertools.product(shifts, across):
        x, y = at[0] + dx, at[1] + dy
        box = (x - 2, y - tall / 2 - 1, x + wide + 2, y + tall / 2 + 1)
        spot = _Spot(box, _leader(at, box))
        cost = 2.0 * _covered(box, blocked) + _covered(box, crossed)
        cost += _covered([_around(*dot, 4, 4) for dot in spot.leader[2:]], names)
        cost += 10 * ((wide + 4) * (tall + 2) - _covered(box, frame))
        cost += 1.2 * abs(dy) + 0.3 * abs(dx + wide / 2)
        here = math.dist(at, _nearest(at, box))
        cost += 120 * sum(math.dist(p, _nearest(p, box)) < here + 8 for p in pixels if p != at)
        spots.append((cost, spot))
    return min(spots, key=lambda scored: scored[0])[1]


def _nearest(at, box: Box) -> tuple[float, float]:
    """The point of a name, less its margin, that is nearest to a mark."""
    return min(max(at[0], box[0] + 2), box[2] - 2), min(max(at[1], box[1] + 2), box[3] - 2)


def _leader(at, box: Box) -> list[tuple[float, float]]:
    """Points from the mark to the nearest edge of its name; none where they are close."""
    x, y = _nearest(at, box)
    if math.dist(at, (x, y)) < 22:
        return []
    return [(at[0] + k / 8 * (x - at[0]), at[1] + k / 8 * (y - at[1])) for k in range(9)]


def _around(x: float, y: float, w: float, h: float) -> Box:
    return (x - w, y - h, x + w, y + h)


def _steps(a, b) -> tuple[Box, Box]:
    """The step from a to b, flat and then down, as two thin boxes."""
    return (a[0], a[1] - 2, b[0], a[1] + 2), (b[0] - 2, min(a[1], b[1]), b[0] + 2, max(a[1], b[1]))


def _covered(boxes, others) -> float:
    """Square pixels that boxes `[m, 4]` or one box share with `others`, `[n, 4]`, summed."""
    a, b = np.reshape(boxes, (-1, 1, 4)), np.reshape(others, (1, -1, 4))
    sides = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    return float(sides.clip(0).prod(-1).sum())
