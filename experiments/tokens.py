"""Which tokens stay: eviction policies x codes x budgets, as a Pareto surface.

Question: at the bytes that a cache really takes, which policy loses least, on a text that goes on
          after its history was evicted and on facts that must be found again, and is it better to
          keep fewer tokens or fewer bits?
Command:  python experiments/tokens.py --config=configs/tokens.py
          (a tiny run, half a minute: --config=configs/tokens.py:tiny)
          A text of your own, calibrated codes: --config.text=FILE --config.calibration=FOLDER
          --config.more_methods="('turboquant-3', 'klt-2')"
          Only the pictures and the tables, from what is there: --plot_only
Cost:     compiling, 10 to 40 s per policy and budget on a CPU, is most of a first run; compiled
          programs are kept.
Expected: SmolLM2, 512 of 2048 tokens of Pride and Prejudice in bf16 (0.33 of the bytes): KL 0.020
          to 0.024 where attention is read (kvzip-head, tova, snapkv, h2o), 0.031 for the newest
          tokens, 0.058 for random ones; turboquant-3 of all tokens has 0.009 at 0.25 of the bytes,
          and of those that snapkv keeps 0.027 at 0.12.

The history is read in blocks, each against what was kept of those before, and evicted after every
block; what is left is encoded at its end. Policies do not see the question unless
`with_question`. KL is to the exact model that saw every token, at the positions after the history;
its standard error is over positions, as if these were independent (`kl_windows` are the means of
the windows). Bytes count all leaves of the caches: see `evals.evicted.cache_sizes`.

A line of metrics.jsonl per measurement, as soon as it is made; a rerun into the same folder skips
what is there. Writes config.json, stamp.json, metrics.jsonl, tables.txt, pareto.png and, for the
retrieval part, retrieval.png into `config.out`.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import json
import shlex
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import app, flags
from frontier_cases import append_row, read_rows
from ml_collections import ConfigDict, config_flags
from tokens_cases import Case, Row, all_cases, make_keep, own_settings, settings_of
from tokens_plot import flat, pareto_png
from tokens_tables import current, print_tables, summary

import kvjax
from kvjax.calibrate.artefact import load_moments
from kvjax.calibrate.names import get_for_model
from kvjax.cli.compare import write_json
from kvjax.cli.options import use_compilation_cache
from kvjax.core.errors import InputError
from kvjax.core.layout import Layout
from kvjax.evals.evicted import continuation_fidelity, evicted_runner
from kvjax.evals.fidelity import summarize
from kvjax.evals.heat_map import heat_map_png
from kvjax.evals.reference import reference_pass
from kvjax.evals.retrieval import run as run_retrieval
from kvjax.evals.retrieval_runner import full_cache_runner
from kvjax.evals.stamp import make_stamp
from kvjax.evals.text import load_readable, model_windows, read_text
from kvjax.generate.plan import check_finite, make_plan
from kvjax.models.fingerprint import fingerprint
from kvjax.models.load import Model

_CONFIG = config_flags.DEFINE_config_file("config")
_PLOT_ONLY = flags.DEFINE_bool("plot_only", False, "Measure nothing: redraw what is there.")


def main(argv: list[str]) -> None:
    del argv
    config = _CONFIG.value
    folder = Path(config.out)
    if _PLOT_ONLY.value:
        saved = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        report(saved["about"], folder)
        return
    cases = all_cases(config)
    folder.mkdir(parents=True, exist_ok=True)
    command = shlex.join(["python", *sys.argv])
    for path in filter(None, (config.text, config.calibration)):
        command = command.replace(path, Path(path).name)  # folders are no part of a result
    stamp = make_stamp(seed=config.seed, command=command)
    if jax.config.jax_compilation_cache_dir is None:
        use_compilation_cache()
    bench = Bench(load_readable(config.model), config, stamp)
    shown = {name: Path(config[name]).name for name in ("text", "calibration")}
    about = {part: bench.shared(part) for part in config.parts}
    write_json(folder / "config.json", config.to_dict() | shown | {"about": about})
    write_json(folder / "stamp.json", stamp)
    failures = bench.run(cases, folder / "metrics.jsonl")
    report(about, folder)
    print("".join(f"not measured: {failure}\n" for failure in failures), end="")


def report(about: dict[str, Row], folder: Path) -> None:
    """Tables and pictures of the lines that have the settings `about`, which are by part."""
    rows = current(read_rows(folder / "metrics.jsonl"), about)
    (folder / "tables.txt").write_text(print_tables(rows), encoding="utf-8")
    (folder / "pareto.png").write_bytes(pareto_png(rows))
    names = ["tables.txt", "pareto.png"]
    if found := flat(rows):
        (folder / "retrieval.png").write_bytes(heat_map_png(found, score="token_accuracy"))
        names.append("retrieval.png")
    print(f"wrote {folder / 'metrics.jsonl'}, {', '.join(names)}")


class Bench:
    """One model, and what its measurements share."""

    def __init__(self, model: Model, config: ConfigDict, stamp: dict[str, Any]):
        self.model, self.config = model, config
        self.made = {name: stamp[name] for name in ("git", "device")}
        self.weights = fingerprint(model.params)
        sink, recent, page = config.layout
        self.layout = Layout(sink=sink, recent=recent, page=page)
        about, text = read_text(config.text or None)
        self.text, self.source = text[config.skip :], {"about": about, "skip": config.skip}
        self.moments, self.calibration = None, None
        if config.calibration:
            self.moments, facts = load_moments(config.calibration, model.config, model.params)
            self.calibration = dataclasses.asdict(facts)
        self.references = functools.cache(self.exact_passes)

    def methods(self, name: str):
        options = {"layout": self.layout, "seed": self.config.seed}
        return get_for_model(name, self.model.config, self.moments, **options)

    def run(self, cases: list[Case], path: Path) -> list[str]:
        """Measures what metrics.jsonl does not have yet; what could not be done, and why."""
        done = {settings_of(row) for row in read_rows(path)}
        todo = [case for case in cases if settings_of(self.settings(case)) not in done]
        print(f"{self.model.config.name}: {len(cases) - len(todo)} of {len(cases)} are there")
        failures = []
        for count, case in enumerate(todo, 1):
            start = time.perf_counter()
            try:
                found = self.fidelity(case) if case.part == "fidelity" else self.retrieval(case)
            except InputError as error:  # a budget below the windows, say
                failures.append(f"{case.label}: {error}")
                continue
            seconds = round(time.perf_counter() - start, 2)
            now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            row = {**self.settings(case), **found, "seconds": seconds, "date": now, **self.made}
            append_row(path, row)
            print(f"{count}/{len(todo)} {case.label}: {summary(row)}, {seconds:.0f} s", flush=True)
        return failures

    def fidelity(self, case: Case) -> Row:
        """KL, perplexity and bytes of a text that goes on after its history was evicted."""
        config, plan = self.config, make_plan(self.model.config, self.methods(case.method))
        windows, hidden = self.references()
        keep = self.keep(case, config.history)
        scores = []
        for tokens, reference in zip(windows, hidden, strict=True):
            one, sizes = continuation_fidelity(
                plan, self.model.params, tokens, reference, keep, history=config.history
            )
            scores.append(one)
        kls = {"kl_windows": [float(one.kl.mean()) for one in scores]}
        return {**sizes, **dict(summarize(scores)), **kls}

    def exact_passes(self) -> tuple[np.ndarray, list[jax.Array]]:
        """Windows of tokens, and what the exact model makes of each after its history."""
        config = self.config
        context = config.history + config.continuation
        windows = model_windows(self.model, self.text, context=context, windows=config.windows)
        hidden = []
        for window in windows:
            reference = reference_pass(self.model.params, self.model.config, window)
            check_finite(reference.finite)
            hidden.append(reference.hidden[config.history :])
        return windows, hidden

    def retrieval(self, case: Case) -> Row:
        """Means and single rows of a task at a length, over depths and samples."""
        config, tokenizer = self.config, self.model.tokenizer
        assert case.task is not None  # as cases of this part have
        assert case.length is not None
        assert tokenizer is not None  # see load_readable
        keep = self.keep(case, case.length)
        options = {} if keep is None else {"with_question": config.with_question}
        make = full_cache_runner if keep is None else functools.partial(evicted_runner, keep=keep)
        rows = run_retrieval(
            [case.task],
            [case.length],
            list(config.depths),
            config.samples,
            make(self.model, self.methods(case.method), **options),
            tokenizer=tokenizer,
            filler=self.text if config.text_as_filler else None,
            seed=config.seed,
        )
        kept = "depth", "tokens", "exact", "token_accuracy", "nll"
        means = {name: statistics.fmean(row[name] for row in rows) for name in kept[2:]}
        return {**means, "rows": [{name: row[name] for name in kept} for row in rows]}

    def keep(self, case: Case, history: int):
        given = {"history": history, "block": self.config.block, "seed": self.config.seed}
        return make_keep(case, self.model.config, self.model.tokenizer, self.layout, **given)

    def settings(self, case: Case) -> Row:
        """What decides the numbers of a case, as a line has it."""
        shared = own_settings(self.shared(case.part), case.method, case.task)
        return dataclasses.asdict(case) | shared

    def shared(self, part: str) -> Row:
        """What decides the numbers of all cases of a part alike, but for `own_settings`."""
        config = self.config
        own = {
            "fidelity": {
                "text": self.source,
                **{name: config[name] for name in ("history", "continuation", "windows")},
            },
            "retrieval": {
                "text": self.source if config.text_as_filler else None,
                "depths": list(config.depths),
                **{name: config[name] for name in ("samples", "with_question")},
            },
        }
        return {
            "kvjax": kvjax.__version__,
            "model": self.model.config.name,
            "weights": self.weights,
            "dtype": str(self.model.params.embed.dtype),
            "block": config.block,
            "layout": list(config.layout),
            "seed": config.seed,
            "calibration": self.calibration,
            **own[part],
        }


if __name__ == "__main__":
    app.run(main)
