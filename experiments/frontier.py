"""Which method is best at which rate on real models, and does calibration carry over?

Question: KL and perplexity, with standard errors, of every method at its true bits on SmolLM2 and
          Gemma 3; what is left of calibrated methods on texts of another kind than they were
          calibrated on, with other seeds, and at positions beyond the calibration.
Command:  python experiments/frontier.py --config=configs/frontier.py
          (a tiny run, half a minute: --config=configs/frontier.py:tiny)
          Texts of your own: --config.texts="('NAME=FILE', 'NAME=FILE')" (first: calibration)
          Only the picture and the tables, from what is there: --plot_only
Cost:     compiling, 10 to 60 s per method, model and layout on a CPU, is most of a first run;
          compiled programs are kept.
Expected: SmolLM2, calibrated on Moby Dick, one window of Pride and Prejudice, sink 4, recent 64: KL
          0.0583 for turboquant-2 (2.25 true bits), 0.0117 for turboquant-3 (3.25), 0.0755 for
          kivi-2 (3.00), 0.0099 for klt-2 (2.26), 0.0048 for klt-layers-2 (2.25); other seeds
          move these by up to 13 %. Gemma 3: 0.5216 for turboquant-2 (2.06), 0.0137 for
          klt-fisher-2 (2.06).

A line of metrics.jsonl per measurement, as soon as it is made; a rerun into the same folder skips
what is there. KL has the standard error over positions, as if these were independent; `kl_windows`
are the means of the windows, which come nearer to that. Calibrations are kept in `calibration/`.

Writes config.json, stamp.json, metrics.jsonl, tables.txt and frontier.png into `config.out`.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import json
import math
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import app, flags
from frontier_cases import (
    SETTINGS,
    Case,
    Row,
    Text,
    all_cases,
    append_row,
    plain,
    read_rows,
    read_texts,
    settings_of,
)
from frontier_plot import frontier_png
from frontier_tables import current, print_tables
from ml_collections import ConfigDict, config_flags

import kvjax
from kvjax.calibrate.artefact import FILE, Provenance, load_moments, save_moments
from kvjax.calibrate.moments import Moments, measure_moments
from kvjax.calibrate.names import get_for_model
from kvjax.calibrate.sensitivity import measure_sensitivity
from kvjax.cli.compare import write_json
from kvjax.cli.options import use_compilation_cache
from kvjax.core.errors import InputError
from kvjax.core.rng import fold
from kvjax.evals.compare import Settings, quality, scoring_block, sizes
from kvjax.evals.fidelity import Scores
from kvjax.evals.reference import Reference, reference_pass
from kvjax.evals.stamp import make_stamp
from kvjax.evals.text import load_readable, model_windows
from kvjax.generate.plan import check_finite, make_plan
from kvjax.models.fingerprint import fingerprint
from kvjax.models.load import Model

_CONFIG = config_flags.DEFINE_config_file("config")
_PLOT_ONLY = flags.DEFINE_bool("plot_only", False, "Measure nothing: redraw what is there.")

References = tuple[np.ndarray, list[Reference]]  # windows of tokens, and their exact passes


def main(argv: list[str]) -> None:
    del argv
    config = _CONFIG.value
    folder = Path(config.out)
    if _PLOT_ONLY.value:
        saved = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        report(ConfigDict(saved | {"plot_methods": config.plot_methods}), folder)
        return
    texts = read_texts(config.texts)
    cases = all_cases(config, texts)
    folder.mkdir(parents=True, exist_ok=True)
    command = shlex.join(["python", *sys.argv])
    for path in (one.partition("=")[2] for one in config.texts if "=" in one):
        command = command.replace(path, Path(path).name)  # folders are no part of a result
    stamp = make_stamp(seed=config.seeds[0], command=command)
    about = {name: text.about for name, text in texts.items()}
    write_json(folder / "config.json", config.to_dict() | {"texts": list(texts), "about": about})
    write_json(folder / "stamp.json", stamp)
    if jax.config.jax_compilation_cache_dir is None:
        use_compilation_cache()
    failures = []
    for name in config.models:
        failures += Bench(load_readable(name), texts, config, folder, stamp).run(cases)
    report(config, folder)
    print("".join(f"not measured: {failure}\n" for failure in failures), end="")


def report(config: ConfigDict, folder: Path) -> None:
    """Tables and the picture, of the lines that belong to the config."""
    rows = current(read_rows(folder / "metrics.jsonl"), config)
    (folder / "tables.txt").write_text(print_tables(rows), encoding="utf-8")
    (folder / "frontier.png").write_bytes(frontier_png(rows, tuple(config.plot_methods)))
    print(f"wrote {folder / 'metrics.jsonl'}, tables.txt, frontier.png")


class Bench:
    """One model, and what its measurements share."""

    def __init__(
        self,
        model: Model,
        texts: dict[str, Text],
        config: ConfigDict,
        folder: Path,
        stamp: dict[str, Any],
    ):
        self.model, self.texts, self.config, self.folder = model, texts, config, folder
        self.path = folder / "metrics.jsonl"
        self.weights = fingerprint(model.params)
        self.made = {name: stamp[name] for name in ("git", "device")}
        self.moments: dict[str | None, Moments | None] = {None: None}
        self.references = functools.lru_cache(maxsize=3)(self.exact_passes)

    def run(self, cases: Sequence[Case]) -> list[str]:
        """Measures what metrics.jsonl does not have yet; what could not be done, and why."""
        known = {settings_of(row): row for row in read_rows(self.path)}
        done = {(row["part"], settings_of(row)) for row in read_rows(self.path)}
        todo = [c for c in cases if (c.part, settings_of(self.settings(c))) not in done]
        print(f"{self.model.config.name}: {len(cases) - len(todo)} of {len(cases)} are there")
        for text, context, windows in {case.shared for case in todo}:  # too short: told at once
            self.windows(text, context, windows)
        failures, count = [], 0
        for shared, group in groupby(todo, key=lambda case: case.shared):
            for case, found in self.measured(list(group), shared, known):
                count += 1
                label = f"{self.model.config.name} {case.part}: {case.label}"
                if isinstance(found, InputError):
                    failures.append(f"{label}: {found}")
                    continue
                row = {"part": case.part, **self.settings(case), **found}
                append_row(self.path, row)
                known[settings_of(row)] = row
                print(
                    f"{count}/{len(todo)} {label}: {row['bits_per_value']:.2f} bits, "
                    f"KL {row['kl']:.5f} ± {row['kl_se']:.5f}, {row['seconds']:.0f} s",
                    flush=True,
                )
        return failures

    def measured(
        self, cases: list[Case], shared: tuple[str, int, int], known: dict[str, Row]
    ) -> Iterator[tuple[Case, Row | InputError]]:
        """Numbers of cases that share a text; those that another part has are not made again."""
        fresh: dict[str, Case] = {}
        for case in cases:
            if (key := settings_of(self.settings(case))) not in known:
                fresh.setdefault(key, case)
        if fresh:
            references = self.references(*shared)
            for case in fresh.values():
                self.calibrate(case.calibration)

            def attempt(case: Case) -> Row | InputError:
                try:
                    return self.numbers(case, references)
                except InputError as error:  # a method that the layout does not suit, say
                    return error

            with ThreadPoolExecutor(self.config.workers) as pool:
                yield from zip(fresh.values(), pool.map(attempt, fresh.values()), strict=True)
        again = (case for case in cases if case not in fresh.values())
        for case in again:
            if row := known.get(settings_of(self.settings(case))):
                yield case, {k: v for k, v in row.items() if k not in ("part", *SETTINGS)}

    def numbers(self, case: Case, references: References) -> Row:
        """What is measured: the rest of a line."""
        start = time.perf_counter()
        config, moments = self.model.config, self.moments[case.calibration]
        method = get_for_model(case.method, config, moments, layout=case.layout, seed=case.seed)
        plan = make_plan(config, method)
        wanted = Settings((case.method,), context=case.context, layout=case.layout)
        block = scoring_block({case.method: plan}, wanted)
        params = self.model.params
        row, scores, _ = quality(plan, params, *references, block, case.context)
        numbers: Row = {**sizes(plan, case.context), **row}
        numbers |= {"kl_windows": [float(one.kl.mean()) for one in scores]}
        if case.buckets:
            numbers["kl_by_position"] = by_position(scores, case.buckets)
        numbers = {k: finite(v) if isinstance(v, float) else v for k, v in numbers.items()}
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        seconds = round(time.perf_counter() - start, 2)
        return {**numbers, "seconds": seconds, "date": now, **self.made}

    def settings(self, case: Case) -> Row:
        """What decides the numbers of a case, as a line has it."""
        config, made = self.config, case.calibration
        calibration = made and {
            "text": made,
            "about": self.texts[made].about,
            "tokens": config.calibrate,
            "context": config.calibrate_context,
            "gradients": config.gradients,
            "gradient_context": config.gradient_context,
        }
        layout = case.layout
        return {
            "kvjax": kvjax.__version__,
            "model": self.model.config.name,
            "weights": self.weights,
            "dtype": str(self.model.params.embed.dtype),
            "method": case.method,
            "calibration": calibration,
            "text": {"text": case.text, "about": self.texts[case.text].about},
            "seed": case.seed,
            "layout": {"sink": layout.sink, "recent": layout.recent, "page": layout.page},
            "context": case.context,
            "windows": case.windows,
            "buckets": case.buckets,
        }

    def windows(self, text: str, context: int, windows: int) -> np.ndarray:
        return model_windows(self.model, self.texts[text].text, context=context, windows=windows)

    def exact_passes(self, text: str, context: int, windows: int) -> References:
        """The full cache on a text; keys and values of the first window, as `quality` wants."""
        print(f"full cache on {text}, {windows} x {context} tokens", flush=True)
        tokens = self.windows(text, context, windows)
        found: list[Reference] = []
        for i, window in enumerate(tokens):
            reference = reference_pass(self.model.params, self.model.config, window)
            check_finite(reference.finite)
            if i:
                reference = dataclasses.replace(reference, key=(), value=(), query=())
            found.append(reference)
        return tokens, found

    def calibrate(self, name: str | None) -> None:
        """Measures the moments of a text, or takes those in the run's folder."""
        if name in self.moments:
            return
        config, params = self.model.config, self.model.params
        text, made = self.texts[name], self.config
        sizes = made.calibrate, made.calibrate_context, made.gradients
        digest = text.about.rpartition("sha256 ")[2].rstrip(")")
        about = "-".join(map(str, (config.name, self.weights, name, digest, *sizes)))
        folder = self.folder / "calibration" / plain(about)
        if not (folder / FILE).exists():
            print(f"calibrating on {name}", flush=True)
            moments = self.measure_moments(name)
            seen = moments.tokens, made.calibrate_context, self.weights
            facts = Provenance(config.name, text.about, kvjax.__version__, *seen)
            save_moments(moments, folder, facts)
        self.moments[name] = load_moments(folder, config, params)[0]  # float32, as a rerun has them

    def measure_moments(self, name: str) -> Moments:
        """As `kvjax calibrate` does."""
        config, params, made = self.model.config, self.model.params, self.config
        context, count = made.calibrate_context, made.calibrate // made.calibrate_context
        moments = measure_moments(params, config, list(self.windows(name, context, count)))
        if made.gradients:
            context, count = made.gradient_context, made.gradients // made.gradient_context
            windows = list(self.windows(name, context, count))
            rng = fold(jax.random.key(0), "calibrate")
            moments = measure_sensitivity(params, config, windows, moments, rng=rng)
        return moments


def by_position(scores: Sequence[Scores], buckets: int) -> list[Row]:
    """Mean KL, its standard error and the range, for stretches of equally many positions."""
    kl = np.stack([np.asarray(one.kl, np.float64) for one in scores])  # [windows, t - 1]
    edges = np.linspace(0, kl.shape[1] + 1, buckets + 1).astype(int)
    rows = []
    for start, stop in pairwise(edges):
        part = kl[:, start:stop]
        error = part.std(ddof=1) / math.sqrt(part.size)
        rows.append({"start": int(start), "stop": int(stop), "kl": part.mean(), "kl_se": error})
    return rows


def finite(x: float) -> float | None:
    """None for what JSON has no number for."""
    return x if math.isfinite(x) else None


if __name__ == "__main__":
    app.run(main)
