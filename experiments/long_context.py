"""A million tokens: what is still found in a long history, and what a step costs, by code.

Question: with contexts from 8K to 1M, does attention over codes still find the one token that exact
          attention finds, how far is its output from the exact one, and what does a decode step
          cost in time and memory, by method and true bits?
Command:  python experiments/long_context.py --config=configs/long_context.py
          (a tiny run, half a minute: --config=configs/long_context.py:tiny)
          Spread over simulated devices: --config.devices=8 --config.mesh="(1, 8)"
          Only the picture and the tables, from what is there: --plot_only
Cost:     CPU, one core, per method: a layer of 8 KV heads x 128 takes 60 s per million tokens, and
          20 s to compile once. Gemma 3 270M takes 2 minutes for 8K tokens, each method; the exact
          model is kept. Calibrating SmolLM2 takes some minutes.
Expected: a layer of the shape of Llama 3.1 8B at 8K: KL of its attention 0.55 for turboquant-2
          (2.13 true bits), 0.15 for turboquant-3, 0.11 for centred-2, 0.03 for klt-lloyd-max-2;
          needles along q with half of the attention found: 73, 92, 94 and 93 %. At 128K 0.61, 0.17,
          0.14 and, calibrated on 2048 positions, 0.18; found 76, 95, 97 and 72 %. A step over 1M
          tokens of a layer of the shape of 70B takes one core 1.3 s, with bf16 (4.0 GiB) as with
          turboquant-2 (0.5 GiB).

Three parts:
  needles  One layer of the shape of a model, its history drawn page by page from moments that were
           calibrated on `model` (mean and covariance of queries, keys and values, RoPE at the true
           position), and packed as it is drawn. Shapes with other heads than `model` take several
           of its heads as blocks of channels: they have a shape of their own, and the statistics
           of `model` (see `evals.drawn_layer.shaped_like`). Calibrated methods know what a
           calibration at `calibrate_context` positions says; beyond these RoPE turns what it saw
           standing still. Into it goes a needle, for every query, depth and margin its own, its
           key moved along the query or to where keys are likely: see `evals.needles`.
  speed    A decode step of one layer, append and attend, over random tokens, all methods in the
           same rounds, and lines over contexts.
  text     A real model that reads a text through its cache: KL to the exact model before some ends.

A line of metrics.jsonl per measurement, as soon as it is made; a rerun into the same folder skips
what is there. What one run has otherwise than another, as times, is under "run" of a line; all else
of it is the same bit by bit. On several devices sums are taken in another order: equal to 1e-3 or
so. Standard errors are over queries.

Writes config.json, stamp.json, metrics.jsonl, tables.txt and long_context.png into `config.out`;
calibrations are kept in `calibration/`.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import json
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import app, flags
from frontier_cases import append_row, read_rows
from long_context_cases import (
    RUN,
    Case,
    Row,
    all_cases,
    is_calibrated,
    layout_of,
    margins,
    mesh_of,
    settings_of,
    shape_config,
)
from long_context_layer import Layer, Source, make_source
from long_context_needles import needle_row
from long_context_plot import long_context_png
from long_context_speed import step_times
from long_context_tables import current, print_tables, summary
from long_context_text import compare, exact_hidden, hidden_at, stretches
from ml_collections import ConfigDict, config_flags

import kvjax
from kvjax.calibrate.artefact import load_moments
from kvjax.calibrate.names import get_for_model
from kvjax.cli.compare import write_json
from kvjax.cli.options import use_compilation_cache
from kvjax.evals.compare import sizes
from kvjax.evals.stamp import make_stamp
from kvjax.evals.text import load_readable, model_windows, read_text
from kvjax.generate import make_plan
from kvjax.models.fingerprint import fingerprint
from kvjax.parallel import ShardingRules, make_mesh

_CONFIG = config_flags.DEFINE_config_file("config")
_PLOT_ONLY = flags.DEFINE_bool("plot_only", False, "Measure nothing: redraw what is there.")


def main(argv: list[str]) -> None:
    del argv
    config = _CONFIG.value
    folder = Path(config.out)
    if _PLOT_ONLY.value:
        report(folder)
        return
    cases = all_cases(config)
    margins(config)
    heads, sequence = mesh_of(config)
    if config.devices > 1:  # before there are devices
        jax.config.update("jax_num_cpu_devices", config.devices)
        left = [case.label for case in cases if case.part != "needles"]
        cases = [case for case in cases if case.part == "needles"]
        print("".join(f"on one device only: {label}\n" for label in left), end="")
    elif jax.config.jax_compilation_cache_dir is None:
        use_compilation_cache()
    if config.devices > 1:  # keeping programs of many devices crashes XLA's serialization
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1e9)
    folder.mkdir(parents=True, exist_ok=True)
    command = shlex.join(["python", *sys.argv])
    for path in filter(None, (config.text, config.calibration, config.text_calibration)):
        command = command.replace(path, Path(path).name)  # folders are no part of a result
    stamp = make_stamp(seed=config.seed, command=command)
    shown = {n: Path(config[n]).name for n in ("text", "calibration", "text_calibration")}
    write_json(folder / "config.json", config.to_dict() | shown)
    write_json(folder / "stamp.json", stamp)
    rules = ShardingRules(make_mesh(1, heads, sequence))
    report(folder, Bench(config, folder, stamp, rules).run(cases))


def report(folder: Path, wanted: set[str] | None = None) -> None:
    """Tables and the picture of the lines with these settings, or of all."""
    rows = current(read_rows(folder / "metrics.jsonl"), wanted)
    (folder / "tables.txt").write_text(print_tables(rows), encoding="utf-8")
    (folder / "long_context.png").write_bytes(long_context_png(rows))
    print(f"wrote {folder / 'metrics.jsonl'}, tables.txt, long_context.png")


class Bench:
    """What measurements share; models are loaded and calibrated when they are wanted."""

    def __init__(
        self, config: ConfigDict, folder: Path, stamp: dict[str, Any], rules: ShardingRules
    ):
        self.config, self.folder, self.rules = config, folder, rules
        self.made = {name: stamp[name] for name in ("git", "device")}
        self.layout = layout_of(config)

    @functools.cached_property
    def source(self) -> Source:
        """The calibration that layers are drawn from."""
        config, own = self.config, self.folder / "calibration"
        folder = Path(config.calibration) if config.calibration else own
        sizes = config.calibrate, config.calibrate_context
        return make_source(config.model, folder, *sizes)

    def run(self, cases: Sequence[Case]) -> set[str]:
        """Measures what metrics.jsonl does not have yet; the settings of all cases."""
        path = self.folder / "metrics.jsonl"
        done = {settings_of(row) for row in read_rows(path) if "settings" in row}
        settings = {case: self.settings(case) for case in cases}
        keys = {case: settings_of({"settings": own}) for case, own in settings.items()}
        todo = [case for case in cases if keys[case] not in done]
        print(f"{len(cases) - len(todo)} of {len(cases)} are there", flush=True)
        for count, case in enumerate(todo, 1):
            start, load = time.perf_counter(), os.getloadavg()[0]
            found, run = getattr(self, case.part)(case)
            now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            run = {
                "seconds": round(time.perf_counter() - start, 2),
                "date": now,
                "load": round(load, 2),
                **self.made,
                **run,
            }
            row = {"part": case.part, "settings": settings[case], **found, RUN: run}
            append_row(path, row)
            print(
                f"{count}/{len(todo)} {case.label}: {summary(row)}, {run['seconds']:.0f} s",
                flush=True,
            )
        return set(keys.values())

    def needles(self, case: Case) -> tuple[Row, Row]:
        """What is found in one layer."""
        config, layer = self.config, self.layer(case)
        methods = self.layer_methods(case, layer)
        return needle_row(
            methods[case.methods[0]],
            layer,
            context=case.context,
            queries=config.queries,
            depths=tuple(config.depths),
            margins=margins(config),
            rules=self.rules,
            seed=config.seed,
            direction=case.direction,
        )

    def speed(self, case: Case) -> tuple[Row, Row]:
        """Times of a step of one layer."""
        layer = self.layer(case)
        options = {"rounds": self.config.rounds, "seed": self.config.seed}
        methods = self.layer_methods(case, layer)
        sizes, times = step_times(methods, layer.config, case.context, **options)
        return {"sizes": sizes}, {"times": times}

    def layer(self, case: Case) -> Layer:
        assert case.layer is not None  # as cases of these parts have
        return self.source.layer(case.shape, case.layer)

    def layer_methods(self, case: Case, layer: Layer):
        options = {"layout": self.layout, "seed": self.config.seed}
        found = {}
        for name in case.methods:
            made = get_for_model(name, layer.config, layer.moments, **options)
            found[name] = made[0] if isinstance(made, tuple) else made
        return found

    def text(self, case: Case) -> tuple[Row, Row]:
        """A model that reads a text."""
        config, model, (name,) = self.config, self.reader, case.methods
        wanted = stretches(config.stretch_ends, config.stretch)
        tokens = self.tokens
        moments = None
        if is_calibrated(case.methods):
            moments = load_moments(config.text_calibration, model.config, model.params)[0]
        settings = self.settings(case)
        of_all = {k: v for k, v in settings.items() if k not in ("method", "calibration", "seed")}
        mark = hashlib.sha256(json.dumps(of_all, sort_keys=True).encode()).hexdigest()[:16]
        given = {"layout": self.layout, "block": config.block}
        exact = exact_hidden(
            model.params,
            model.config,
            tokens,
            wanted,
            path=self.folder / f"exact-{mark}.npy",
            **given,
        )
        options = {"layout": self.layout, "seed": config.seed}
        plan = make_plan(model.config, get_for_model(name, model.config, moments, **options))
        start = time.perf_counter()
        hidden = hidden_at(plan, model.params, tokens, wanted, config.block, jax.numpy.bfloat16)
        reading = round(time.perf_counter() - start, 2)
        found = compare(model.params, model.config, tokens, wanted, hidden, exact)
        return {**sizes(plan, case.context), **found}, {"reading_seconds": reading}

    @functools.cached_property
    def reader(self):
        """The model of the part "text"."""
        return load_readable(self.config.text_model)

    @functools.cached_property
    def tokens(self) -> np.ndarray:
        """What it reads."""
        _, text = read_text(self.config.text or None)
        text = text[self.config.skip :]
        return model_windows(self.reader, text, context=self.config.text_context, windows=1)[0]

    def settings(self, case: Case) -> Row:
        """What decides the numbers of a case, as its line has it."""
        config = self.config
        made: Row = {
            "part": case.part,
            "kvjax": kvjax.__version__,
            "shape": case.shape,
            "context": case.context,
            "layout": list(config.layout),
            "seed": config.seed,
        }
        if case.part == "text":
            about, _ = read_text(config.text or None)
            calibration = None
            if is_calibrated(case.methods):
                calibration = load_moments(config.text_calibration)[1].text
            return made | {
                "method": case.methods[0],
                "weights": fingerprint(self.reader.params),
                "calibration": calibration,
                "text": {"about": about, "skip": config.skip},
                "stretch": config.stretch,
                "stretch_ends": list(config.stretch_ends),
                "block": config.block,
            }
        shape = shape_config(case.shape, self.source.config)
        made |= {
            "heads": [shape.kv_heads, shape.q_heads, shape.head_dim],
            "drawn_from": self.source.about | {"layer": case.layer},
        }
        if case.part == "speed":
            return made | {"methods": list(case.methods), "rounds": config.rounds}
        return made | {
            "method": case.methods[0],
            "queries": config.queries,
            "depths": list(config.depths),
            "margins": [list(pair) for pair in config.margins],
            "direction": case.direction,
            "mesh": list(mesh_of(config)),
        }


if __name__ == "__main__":
    app.run(main)
