"""A grid of codecs and vectors, and what it writes: a table, `metrics.json` and `gap.png`."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from kvjax.core.errors import InputError
from kvjax.core.layout import Layout
from kvjax.evals.distortion import Row, measure, pages_for
from kvjax.evals.distortion_plot import gap_png
from kvjax.evals.stamp import make_stamp
from kvjax.evals.text import read_text
from kvjax.evals.vectors import Vectors, of_model, synthetic
from kvjax.methods import get


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to measure.

    Attributes:
      methods: names; the key codec of each is measured, on values too.
      dims: of the synthetic vectors; data: their kinds.
      models: whose keys and values are measured too, at their own head_dim; text: None for ours.
      page: vectors per page.
      values: about how many numbers per kind of data.
      seed: of rotations and sketches; vectors have generators of their own.
    """

    methods: tuple[str, ...]
    dims: tuple[int, ...] = (128,)
    data: tuple[str, ...] = ("sphere",)
    models: tuple[str, ...] = ()
    text: str | None = None
    page: int = 64
    values: int = 131072
    seed: int = 0
    repeats: int = 3


@dataclasses.dataclass(frozen=True)
class Result:
    """Rows, and (method, dimension, reason) of what does not fit together."""

    rows: list[Row]
    left_out: list[tuple[str, int, str]]
    text: str | None


def run_distortion(settings: Settings, progress: Callable[[str], None]) -> Result:
    """Measures every method on every kind of vectors.

    Raises:
      InputError: an unknown name, or no vectors to measure on.
    """
    if not settings.models and not (settings.dims and settings.data):
        raise InputError(
            "data", got="no vectors", expected="a kind of data or a model", fix="name one"
        )
    text_name = None
    rows: list[Row] = []
    left_out: list[tuple[str, int, str]] = []
    if settings.models:
        text_name, text = read_text(settings.text)
    groups = [_synthetic(settings, d) for d in settings.dims if settings.data]
    for name in settings.models:
        progress(f"reading {name}")
        groups.append(_of_model(settings, name, text))
    for data in groups:
        page, d = data[0].x.shape[-2:]
        for name in settings.methods:
            progress(f"{name}, d = {d}")
            try:
                layout = Layout(page=page, recent=page)
                codec = get(name, d, layout=layout, seed=settings.seed).key
                rows += measure(name, codec, data, repeats=settings.repeats)
            except InputError as error:  # a dimension that this method does not take
                left_out.append((name, d, str(error)))
        jax.clear_caches()  # hundreds of programs, none of them used again
    if not rows:
        raise InputError("methods", got="none that fits", expected="one", fix=left_out[0][2])
    return Result(rows, left_out, text_name)


def _synthetic(settings: Settings, d: int) -> list[Vectors]:
    pages = pages_for(d, settings.page, settings.values)
    make = lambda kind: synthetic(kind, pages, settings.page, d, seed=settings.seed)
    return [make(kind) for kind in settings.data]


def _of_model(settings: Settings, name: str, text: str) -> list[Vectors]:
    from kvjax.models.load import load

    model = load(name)
    pages = pages_for(model.config.head_dim, settings.page, settings.values)
    return list(of_model(model, text, pages=pages, page=settings.page))


def write(result: Result, folder: Path, *, command: str, seed: int) -> None:
    """Writes `metrics.json` and `gap.png` into `folder`, whole or not at all, prints the table."""
    stamp = make_stamp(seed=seed, command=command)
    metrics: dict[str, Any] = {
        "text": result.text,
        "rows": [row.as_dict() for row in result.rows],
        "left_out": [
            {"codec": name, "d": d, "reason": reason} for name, d, reason in result.left_out
        ],
        "stamp": stamp,
    }
    content = json.dumps(metrics, indent=1, allow_nan=False) + "\n"
    for name, data in (("metrics.json", content.encode()), ("gap.png", gap_png(result.rows))):
        partial = folder / f"{name}.partial"
        partial.write_bytes(data)
        os.replace(partial, folder / name)
    print("\n".join(table(result.rows)))
    for name, d, reason in result.left_out:
        print(f"left out: {name} at d = {d}: {reason}")
    print(f"wrote {folder / 'metrics.json'}, gap.png")


def table(rows: Sequence[Row]) -> Iterator[str]:
    """Aligned lines, one per row, with a line of meanings at the end."""
    width = max(20, *(len(row.codec) for row in rows))
    kind = max(len(row.data) for row in rows)
    yield (
        f"{'codec':{width}s} {'data':{kind}s} {'d':>4s} {'bits':>6s} {'mse':>9s} {'ip error':>9s} "
        f"{'slope':>6s} {'dB':>6s} {'entropy':>7s} {'enc M/s':>8s} {'dec M/s':>8s}"
    )
    for row in rows:
        entropy = f"{row.entropy:7.3f}" if row.entropy is not None else f"{'–':>7s}"
        speeds = [f"{s:8.2f}" if s is not None else f"{'–':>8s}" for s in (row.encode, row.decode)]
        yield (
            f"{row.codec:{width}s} {row.data:{kind}s} {row.d:4d} {row.bits_per_value:6.3f} "
            f"{row.mse:9.6f} {row.ip_error:9.6f} {row.slope:6.3f} {row.gap_db:6.2f} {entropy} "
            f"{speeds[0]} {speeds[1]}"
        )
    yield (
        "bits: true, scalars and indices included; mse: relative to the vectors' energy; dB: above "
        "4^-bits; M/s: million values per second, on the first kind of data"
    )
