"""The layers of experiments/long_context.py: a calibration, and the shapes made of it."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np
from long_context_cases import shape_config

import kvjax
from kvjax.calibrate.artefact import FILE, Provenance, load_moments, save_moments
from kvjax.calibrate.moments import Moments, measure_moments
from kvjax.evals.drawn_layer import DrawnLayer, drawn_layer, shaped_like
from kvjax.evals.query_moments import QueryMoments, measure_queries
from kvjax.evals.text import load_readable, model_windows, read_docstrings
from kvjax.models.config import ModelConfig
from kvjax.models.fingerprint import fingerprint

QUERIES = "queries.npz"


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer to measure on: the model whose shape it has, its moments, and what draws it."""

    config: ModelConfig
    moments: Moments
    drawn: DrawnLayer


@dataclasses.dataclass(frozen=True)
class Source:
    """A calibration: of keys, values and queries of a model; about it, for lines."""

    config: ModelConfig
    moments: Moments
    queries: QueryMoments
    about: dict[str, Any]

    def layer(self, shape: str, first: int) -> Layer:
        """A layer of that shape, of heads from layer `first` on."""
        target = shape_config(shape, self.config)
        moments, queries = shaped_like(self.moments, self.queries, target, first)
        return Layer(target, moments, drawn_layer(moments, queries))


def make_source(name: str, folder: Path, tokens: int, context: int) -> Source:
    """The calibration in a folder; what is missing there is measured on docstrings and kept."""
    model = load_readable(name)
    weights = fingerprint(model.params)
    about, text = read_docstrings()
    windows = lambda: list(model_windows(model, text, context=context, windows=tokens // context))
    if not (folder / FILE).exists():
        print(f"calibrating {name}", flush=True)
        moments = measure_moments(model.params, model.config, windows())
        facts = Provenance(
            model.config.name, about, kvjax.__version__, moments.tokens, context, weights
        )
        save_moments(moments, folder, facts)
    moments, facts = load_moments(folder, model.config, model.params)
    path = folder / QUERIES
    if not path.exists():
        print(f"queries of {name}", flush=True)
        found = measure_queries(model.params, model.config, windows())
        partial = path.with_suffix(".partial.npz")
        np.savez(partial, mean=found.mean, cov=found.cov)
        os.replace(partial, path)  # whole or not at all
    with np.load(path) as kept:
        queries = QueryMoments(kept["mean"], kept["cov"])
    return Source(model.config, moments, queries, dataclasses.asdict(facts))


def reset_peak() -> None:
    """Forgets the peak that `peak_memory` tells, where the system can (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int | None:
    """The most bytes of memory that this process held since `reset_peak`; None if not known."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")), None)
