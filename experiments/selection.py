"""How few tokens need a layer read, and how few layers need an indexer?

Question: what share of the attention do 256 of 4096 tokens hold that a lightning indexer, an
          indexer shared by four layers, or Quest's pages choose, how far does the model move, and
          what would the best choice of all give?
Command:  python experiments/selection.py --config=configs/selection.py
          --config.train_text=FILE --config.text=FILE
          (a tiny run, half a minute: --config=configs/selection.py:tiny)
Cost:     SmolLM2-135M, seconds of one slow core: 90 per window that is read (5), 1 per step of
          training, 15 to 30 per row of the table.
Expected: SmolLM2's attention is broad: the best 256 tokens of a layer, windows included, hold 0.905
          of it (0.45 in the first layer), 0.927 with two dense layers, at a KL of 0.014. Indexers
          after 440 steps: 0.920 and 0.025; one for four layers, trained for them: 0.916 and 0.046;
          Quest's pages of 16: 0.808 and 0.086, of each KV head 0.806 and 0.079. The best tokens of
          each KV head hold 0.938.

Stretches of the text are read after an exact history of it, with the first `dense` layers reading
everything, and each query of the others only what is chosen for it, `k` tokens that include sink
and recent ones. Keys and values are exact. KL is to the exact model, its standard error as if
positions were independent. A training is kept in `out`, and resumed; it is for one config.

Writes config.json, stamp.json, metrics.jsonl, metrics.json and table.txt into `config.out`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app
from ml_collections import ConfigDict, config_flags

from kvjax.cli.compare import write_json
from kvjax.cli.options import use_compilation_cache
from kvjax.core.rng import fold
from kvjax.evals.stamp import make_stamp
from kvjax.evals.text import load_readable, model_windows, read_docstrings, read_text
from kvjax.models.fingerprint import fingerprint
from kvjax.select import (
    Choice,
    Indexer,
    IndexTraining,
    best_pattern,
    by_attention,
    by_index,
    by_page_bounds,
    cost,
    greedy_pattern,
    init_indexer,
    next_token_kl,
    observe_windows,
    pattern_score,
    periodic_pattern,
    read_exactly,
    recall_matrix,
    restricted_pass,
    shared_targets,
    sizes_of,
    summary,
    train_indexer_saving,
)
from kvjax.select.share import seeing_all

_CONFIG = config_flags.DEFINE_config_file("config")

Row = dict[str, Any]


def main(argv: list[str]) -> None:
    del argv
    config = _CONFIG.value
    folder = Path(config.out)
    folder.mkdir(parents=True, exist_ok=True)
    logging.getLogger("absl").setLevel(logging.WARNING)  # orbax tells of every step of a save
    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        use_compilation_cache()
    command = shlex.join(["python", *sys.argv])
    for path in filter(None, (config.text, config.train_text)):
        command = command.replace(path, Path(path).name)  # folders are no part of a result
    stamp = make_stamp(seed=config.seed, command=command)
    shown = {name: Path(config[name]).name for name in ("text", "train_text")}
    write_json(folder / "config.json", config.to_dict() | shown)
    write_json(folder / "stamp.json", stamp)
    bench = Bench(config, folder)
    rows = []
    with (folder / "metrics.jsonl").open("w", encoding="utf-8") as file:
        for row in bench.rows():
            rows.append(row)
            file.write(json.dumps(row) + "\n")
            file.flush()
            print(_line(row), flush=True)
    write_json(folder / "metrics.json", {"rows": rows, "about": bench.about})
    table = "\n".join([_HEAD, *map(_line, rows)]) + "\n"
    (folder / "table.txt").write_text(table, encoding="utf-8")
    print(f"wrote {folder / 'metrics.json'}, table.txt")


_HEAD = f"{'choice':32} {'recall':>7} {'KL':>8} {'+-':>7} {'tokens':>7} {'MFLOP':>7} {'MB read':>8}"


def _line(row: Row) -> str:
    return (
        f"{row['name']:32} {row['recall']:7.4f} {row['kl']:8.5f} {row['kl_error']:7.5f} "
        f"{row['tokens']:7.0f} {row['attention_mflop']:7.1f} {row['read_mb']:8.3f}"
    )


class Bench:
    """A model, its indexers, and stretches of a text to measure them on."""

    def __init__(self, config: ConfigDict, folder: Path):
        self.config, self.folder = config, folder
        self.model = load_readable(config.model)
        self.layers = len(seeing_all(self.model.config))
        windows = {"k": config.k, "sink": config.sink, "recent": config.recent}
        self.choice = Choice(**windows)
        self.pages = dataclasses.replace(self.choice, page=config.page)
        dense = "D" * min(config.dense, self.layers - 1)
        self.start = dense + "F" * (self.layers - len(dense))
        self.about: Row = {"model": self.model.config.name}

    def rows(self) -> Iterator[Row]:
        """One measurement after the other."""
        config = self.config
        indexers, observed = self.train()
        window = observed[-1]
        recall = np.asarray(recall_matrix(indexers, window, self.choice), np.float64)
        full = max(1, -(-self.start.count("F") // config.every))
        dense = self.start.count("D")
        regular = "D" * dense + periodic_pattern(self.layers - dense, every=config.every, offset=1)
        score = functools.partial(pattern_score, recall)
        greedy = greedy_pattern(full, self.start, score)
        best, _ = best_pattern(recall, full, self.start)
        self.about |= {
            "recall_matrix": recall.round(4).tolist(),
            "greedy": [[pattern, round(value, 4)] for pattern, value in greedy],
        }
        index: dict[str, Any] = {"chooser": by_index, "own": indexers}
        yield self.measure("every layer", self.start, **index)
        yield self.measure("shared, regular", regular, **index)
        yield self.measure("shared, greedy", greedy[-1][0], **index)
        yield self.measure("shared, best", best, **index)
        if config.shared_steps:
            own = self.train_shared(indexers, observed[:-1], best)
            yield self.measure("shared, best, trained", best, chooser=by_index, own=own)
        for whose, by_head in (("", False), (" of each KV head", True)):
            with_pages = {"choice": dataclasses.replace(self.pages, by_head=by_head)}
            tokens = {"choice": dataclasses.replace(self.choice, by_head=by_head)}
            bounds, best = {"chooser": by_page_bounds}, {"chooser": by_attention}
            yield self.measure(f"pages{whose} (Quest)", self.start, **bounds, **with_pages)
            yield self.measure(f"best pages{whose}", self.start, **best, **with_pages)
            yield self.measure(f"best tokens{whose}", self.start, **best, **tokens)
        yield self.measure("best tokens, no dense layer", "F" * self.layers, **best)

    def train(self) -> tuple[Indexer, list[Any]]:
        """Indexers of all layers, and what was observed; its last window is not trained on."""
        config, model = self.config, self.model
        about, text = read_text(config.train_text) if config.train_text else read_docstrings()
        windows = model_windows(
            model, text[config.train_skip :], context=config.context, windows=config.windows + 1
        )
        begun = time.perf_counter()
        observed = observe_windows(
            model.params,
            model.config,
            list(windows),
            rows=config.rows,
            first=config.sink + config.recent + config.k // 2,
            seed=config.seed,
        )
        jax.block_until_ready(observed)
        read = time.perf_counter()
        indexers = init_indexer(
            model.config.d_model,
            layers=self.layers,
            heads=config.heads,
            width=config.width,
            rng=fold(jax.random.key(config.seed), "selection"),
        )
        self.about |= {"train_text": about, "weights": fingerprint(model.params)}
        made = self._fit(indexers, observed[:-1], config.steps, "indexer")
        self.about |= {
            "observe_seconds": round(read - begun, 1),
            "train_seconds": round(time.perf_counter() - read, 1),
        }
        return made, observed

    def train_shared(self, indexers: Indexer, observed: list[Any], pattern: str) -> Indexer:
        """The indexers that stay, trained on for all layers that each serves."""
        full = np.asarray([l for l, letter in enumerate(pattern) if letter == "F"])
        targets = [shared_targets(window, pattern) for window in observed]
        some = jax.tree.map(lambda a: a[full], indexers)
        trained = self._fit(some, targets, self.config.shared_steps, "shared")
        return jax.tree.map(lambda a, new: a.at[full].set(new), indexers, trained)

    def _fit(self, indexers: Indexer, observed: list[Any], steps: int, name: str) -> Indexer:
        config = self.config
        training = IndexTraining(
            steps=steps,
            rows=config.step_rows,
            keys=config.step_keys,
            sink=config.sink,
            recent=config.recent,
            seed=config.seed,
        )
        about = {key: self.about[key] for key in ("model", "train_text", "weights")}
        folder = self.folder / name
        *_, last = train_indexer_saving(indexers, observed, training, folder, about=about)
        self.about[f"{name}_losses"] = np.asarray(last.losses).round(5).tolist()
        return last.indexer

    @functools.cached_property
    def evaluated(self) -> tuple[np.ndarray, Any, jax.Array]:
        """Stretches `[b, n]` of the text, its exact history, and what the exact model makes of the
        stretches."""
        config, model = self.config, self.model
        about, text = read_text(config.text or None)
        self.about["text"] = about
        window = model_windows(model, text[config.skip :], context=config.context, windows=1)[0]
        history = read_exactly(model.params, model.config, jnp.asarray(window))
        stretches = np.stack([window[s : s + config.stretch] for s in config.starts])
        exact = self._pass(stretches, history, None, self.choice)
        return stretches, history, exact.hidden

    def _pass(self, stretches, history, chooser, choice, **options):
        return restricted_pass(
            self.model.params,
            self.model.config,
            stretches,
            chooser=chooser,
            choice=choice,
            history=history,
            starts=tuple(self.config.starts),
            **options,
        )

    def measure(self, name: str, pattern: str, *, chooser, own=None, choice=None) -> Row:
        stretches, history, exact = self.evaluated
        config, width = self.config, exact.shape[-1]
        choice = choice or self.choice
        found = self._pass(stretches, history, chooser, choice, own=own, pattern=pattern)
        pair = exact.reshape(-1, width), found.hidden.reshape(-1, width)
        kl = next_token_kl(self.model.params, self.model.config, *pair)
        means = summary(found.recall.reshape(found.recall.shape[0], -1), kl)
        indexed = chooser is by_index
        keys = self.model.config.kv_heads * self.model.config.head_dim
        bounds = 2 * 2 * keys / config.page if chooser is by_page_bounds else 0  # two vectors, bf16
        sizes = sizes_of(
            self.model.config,
            index_heads=config.heads if indexed else 0,
            index_width=config.width if indexed else 0,
            index_bytes=None if indexed else bounds,
        )
        price = cost(sizes, config.context, k=config.k, pattern=pattern)
        dense = pattern.count("D")
        tokens = (dense * config.context + (self.layers - dense) * config.k) / self.layers
        return {
            "name": name,
            "pattern": pattern,
            **means,
            "tokens": tokens,
            "attention_mflop": (price.attention + price.indexer) / 1e6,
            "read_mb": price.read / 1e6,
        }


if __name__ == "__main__":
    app.run(main)
