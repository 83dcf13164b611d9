"""The tables and the picture of experiments/conversations.py."""

from __future__ import annotations

import dataclasses
import io
import math
import statistics
from collections.abc import Sequence

import numpy as np
from conversations_cases import ALL, EPISODES, KNOWN, SETTINGS, Row, parse_case
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvjax.evals.conversations import mean_and_error, ratio_and_error
from kvjax.evals.table import fixed, small

# The settings that rows of one table agree in.
SHARED = tuple(
    name for name in SETTINGS if name not in ("case", "method", "calibration", "conversation")
)
# Ways to route that no question could take.
BOUNDS = {
    "oracle": "knows the evidence",
    "hindsight": "knows the KL",
    "chance": "a random episode",
}
COLOURS = {"episodes": "#0b6e4f", "single": "#3d5a80", "bound": "#9aa0a6"}


@dataclasses.dataclass(frozen=True)
class Line:
    """One case, code and route, over the questions of several conversations.

    Attributes:
      kl, nll, full_nll, same: of each question.
      saving: bytes of a full bf16 cache over those of the cache that decodes; total: over those of
        all episodes.
    """

    case: str
    method: str
    route: str
    kl: np.ndarray
    nll: np.ndarray
    full_nll: np.ndarray
    same: np.ndarray
    saving: float
    total: float
    row: Row

    @property
    def kind(self) -> str:
        """ "bound" (for comparison only), "episodes" or "single"."""
        kind = parse_case(self.case).kind
        if kind in (KNOWN, ALL) or self.route in BOUNDS:
            return "bound"
        return "episodes" if kind == EPISODES else "single"

    @property
    def label(self) -> str:
        routed = "" if self.route == "only" else f", {self.route}"
        codes = "" if self.method == "bf16" else f", {self.method}"
        return self.case + routed + codes


def groups(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows that may be compared, together; of lines that agree in all settings, the last."""
    found: dict[str, dict[tuple, Row]] = {}
    for row in rows:
        key = str([row[name] for name in SHARED])
        identity = row["case"], row["method"], row["conversation"], str(row["calibration"])
        found.setdefault(key, {})[identity] = row
    return [list(group.values()) for group in found.values()]


def lines(rows: Sequence[Row]) -> list[Line]:
    """Rows of one group, the questions of its conversations joined; only cases, codes and routes
    that all of them have."""
    names = list(dict.fromkeys(row["conversation"] for row in rows))
    cases = dict.fromkeys((row["case"], row["method"]) for row in rows)
    found = []
    for case, method in cases:
        own = {r["conversation"]: r for r in rows if (r["case"], r["method"]) == (case, method)}
        if len(own) < len(names):
            continue
        parts = [own[name] for name in names]
        for route in parts[0]["routes"]:
            scores = [part["routes"][route] for part in parts]
            join = lambda name, scores=scores: np.concatenate([s[name] for s in scores])
            ratio = lambda name, parts=parts: statistics.fmean(
                p["full_bytes"] / p[name] for p in parts
            )
            numbers = (join("kl"), join("nll"), join("full_nll"), join("same"))
            sizes = ratio("active_bytes"), ratio("total_bytes")
            found.append(Line(case, method, route, *numbers, *sizes, parts[0]))
    return found


def best(found: Sequence[Line], kind: str) -> Line | None:
    """The line of that kind with the lowest KL among exact caches of the whole budget that were
    evicted block by block."""
    fits = [
        line
        for line in found
        if line.kind == kind and line.method == "bf16"
        if (case := parse_case(line.case)).share == 1 and not case.once
    ]
    return min(fits, key=lambda line: line.kl.mean(), default=None)


def print_tables(rows: Sequence[Row]) -> str:
    """Prints tables of all conversations and of each alone, and gives all as plain text."""
    kept = Console(file=io.StringIO(), width=170)
    consoles = (Console(width=170), kept)
    for group in groups(rows):
        names = list(dict.fromkeys(row["conversation"] for row in group))
        alone = [[r for r in group if r["conversation"] == n] for n in names if len(names) > 1]
        for some in [group, *alone]:
            found = lines(some)
            for part in (_heading(some, found), _table(found), *_routing(some), _verdict(found)):
                for console in consoles:
                    console.print(part)
    return kept.file.getvalue()


def _heading(rows: Sequence[Row], found: Sequence[Line]) -> Text:
    one = rows[0]
    sink, recent, page = one["layout"]
    parts = {row["conversation"]: (row["tokens"], row["questions"]) for row in rows}
    talks = "; ".join(f"{name}: {t} tokens, {q} questions" for name, (t, q) in parts.items())
    full = f"{found[0].full_nll.mean():.3f}" if found else "not known"
    return Text(
        f"{one['model']}, {one['data']}: {talks}\nbudget {one['budget']} tokens per KV head, block "
        f"{one['block']}; exact (bf16): sink {sink}, recent {recent} to {recent + page - 1}, page "
        f"{page}; {one['episodes']} episodes; NLL of gold answers with the full cache {full}. KL "
        "in nats per answer token, ± standard error over questions; x: bytes of the full bf16 "
        "cache over those of the cache that decodes (active) and of all episodes (total)"
    )


def _table(found: Sequence[Line]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, header_style="bold")
    names = (
        "KL",
        "of best single",
        "NLL",
        "top-1 same",
        "active",
        "total",
        "s to read",
        "s/question",
    )
    table.add_column("case, route, codes")
    for name in names:
        table.add_column(name, justify="right")
    single = best(found, "single")
    order = sorted(found, key=lambda line: line.kl.mean())
    for line in order:
        mean, error = mean_and_error(line.kl)
        ratio = "-"
        if single is not None:
            ratio = "{:.2f} ± {:.2f}".format(*ratio_and_error(line.kl, single.kl))
        note = f" ({BOUNDS[line.route]})" if line.route in BOUNDS else ""
        note += " (question known)" if parse_case(line.case).kind == KNOWN else ""
        table.add_row(
            Text(line.label + note),
            f"{small(mean)} ± {small(error)}",
            ratio,
            fixed(line.nll.mean(), 3),
            fixed(line.same.mean(), 2),
            fixed(line.saving, 1, "x"),
            fixed(line.total, 1, "x"),
            fixed(line.row["seconds_to_read"], 0),
            fixed(line.row["seconds_per_question"], 2),
        )
    return table


def _routing(rows: Sequence[Row]) -> list[Table]:
    """Where evidence lies, of the cases that have episodes."""
    table = Table(box=box.SIMPLE_HEAD, header_style="bold")
    for name in ("case", "conversation", "segments of episodes", "route"):
        table.add_column(name)
    for name in ("evidence inside", "chance", "best"):
        table.add_column(name, justify="right")
    some = [row for row in rows if "evidence_inside" in row]
    for row in some:
        for how, share in row["evidence_inside"].items():
            sizes = " ".join(map(str, row["sizes"]))
            numbers = (fixed(share[name]) for name in ("inside", "chance", "best"))
            table.add_row(row["case"], row["conversation"], sizes, how, *numbers)
    return [table] if some else []


def _verdict(found: Sequence[Line]) -> Text:
    """Episodes against the best single cache of the same active bytes, and codes underneath."""
    single, episodes = best(found, "single"), best(found, "episodes")
    if single is None or episodes is None:
        return Text("")
    ratio, error = ratio_and_error(episodes.kl, single.kl)
    parts = [
        "At the same bytes of the cache that decodes, evicted block by block: best single cache "
        f"{single.label}, KL {small(float(single.kl.mean()))}; best episodes {episodes.label}, "
        f"{ratio:.2f} ± {error:.2f} of it (0.5 wanted: {_met(ratio <= 0.5)})"
    ]
    exact = {(x.case, x.route): x for x in found if x.method == "bf16"}
    for line in found:
        if line.kind != "episodes" or line.method == "bf16" or (line.case, line.route) not in exact:
            continue
        ratio, error = ratio_and_error(line.kl, exact[line.case, line.route].kl)
        parts.append(
            f"{line.label}: {ratio:.2f} ± {error:.2f} of the KL without codes (1.3 wanted: "
            f"{_met(ratio <= 1.3)}), active {line.saving:.1f}x (20x wanted: "
            f"{_met(line.saving >= 20)}), all episodes {line.total:.1f}x"
        )
    return Text("\n".join(parts) + "\n")


def _met(yes: bool) -> str:
    return "met" if yes else "missed"


def conversations_png(rows: Sequence[Row]) -> bytes:
    """KL of every line as bars, best first; a panel per group; 1600 pixels wide."""
    panels = [lines(group) for group in groups(rows)]
    panels = [panel for panel in panels if panel] or [[]]
    heights = [max(2.0, 0.42 * len(panel)) + 1.6 for panel in panels]
    figure = Figure(figsize=(16, sum(heights)), dpi=100, facecolor="white", layout="constrained")
    canvas = FigureCanvasAgg(figure)
    all_axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights).ravel()
    for axes, panel in zip(all_axes, panels, strict=True):
        _panel(axes, sorted(panel, key=lambda line: -line.kl.mean()))
    buffer = io.BytesIO()
    canvas.print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()


def _panel(axes, found: Sequence[Line]) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("KL to the full cache, nats per token of the gold answer", size=14)
    if not found:
        return
    means = [mean_and_error(line.kl) for line in found]
    axes.barh(
        range(len(found)),
        [mean for mean, _ in means],
        xerr=[error for _, error in means],
        color=[COLOURS[line.kind] for line in found],
        ecolor="#222222",
        capsize=3,
        height=0.72,
    )
    for i, (line, (mean, error)) in enumerate(zip(found, means, strict=True)):
        sizes = f"  {mean:.3f}   {line.saving:.1f}x"
        sizes += f" ({line.total:.1f}x all)" if abs(line.total - line.saving) > 0.05 else ""
        axes.text(mean + error, i, sizes, va="center", size=11)
    axes.set_yticks(range(len(found)), [line.label for line in found], size=12)
    most = max(mean + error for mean, error in means)
    axes.set_xlim(0, 1.25 * most if math.isfinite(most) and most > 0 else 1)
    one = found[0].row
    title = (
        f"{one['model']}: {one['budget']} of {one['limit']} tokens, {len(found[0].kl)} questions"
    )
    axes.set_title(f"{title}; green: episodes, grey: for comparison", size=15, loc="left")
