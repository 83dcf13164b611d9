"""Do episodes remember a conversation better than one evicted cache of the same bytes?

Question: how far the answers to questions about a long conversation move (KL of the gold answers
          to the full exact cache) when the cache keeps a quarter of its tokens: one cache under
          each policy, or a cache per episode with the question routed to one of them; with codes
          underneath; and what routing costs against an oracle and against chance.
Command:  python experiments/conversations.py --config=configs/conversations.py \\
            --config.data=locomo10.json
          (a tiny run, half a minute: --config=configs/conversations.py:tiny)
          Only the picture and the tables, from what is there: --plot_only
Cost:     on two CPU cores a minute for a single cache and 2048 tokens of SmolLM2, five for four
          episodes, besides compiling; compiled programs are kept.
Expected: see docs/results-log.md.

A line of metrics.jsonl per conversation, case and code, as soon as it is made; a rerun into the
same folder skips what is there. Lines hold numbers of questions, never their words. A cache is read
once, and each question goes on from a copy of it.

Writes config.json, stamp.json, metrics.jsonl, tables.txt and conversations.png into `config.out`.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import jax
from absl import app, flags
from conversations_bench import Bench
from conversations_cases import Case, made_up, parse_case
from conversations_report import conversations_png, print_tables
from frontier_cases import read_rows
from ml_collections import ConfigDict, config_flags

from kvjax.calibrate.names import check_name
from kvjax.cli.compare import write_json
from kvjax.cli.options import use_compilation_cache
from kvjax.core.errors import InputError, known
from kvjax.episodes import Conversation, read
from kvjax.evals.conversations import HOWS
from kvjax.evals.stamp import make_stamp
from kvjax.evals.text import load_readable

_CONFIG = config_flags.DEFINE_config_file("config")
_PLOT_ONLY = flags.DEFINE_bool("plot_only", False, "Measure nothing: redraw what is there.")


def main(argv: list[str]) -> None:
    del argv
    config = _CONFIG.value
    folder = Path(config.out)
    if _PLOT_ONLY.value:
        report(folder)
        return
    cases = check(config)
    talks = conversations(config)
    folder.mkdir(parents=True, exist_ok=True)
    command = shlex.join(["python", *sys.argv])
    for path in filter(None, (config.data, config.calibration)):
        command = command.replace(path, Path(path).name)  # folders are no part of a result
    stamp = make_stamp(seed=config.seed, command=command)
    shown = {"data": Path(config.data).name, "calibration": Path(config.calibration).name}
    write_json(folder / "config.json", config.to_dict() | shown)
    write_json(folder / "stamp.json", stamp)
    if jax.config.jax_compilation_cache_dir is None:
        use_compilation_cache()
    bench = Bench(load_readable(config.model), config, folder, stamp)
    failures = [failure for one in talks for failure in bench.run(one, cases)]
    report(folder)
    print("".join(f"not measured: {failure}\n" for failure in failures), end="")


def check(config: ConfigDict) -> list[Case]:
    """The cases of a config.

    Raises:
      InputError: an unknown case, method, route or embedder.
    """
    for name in config.methods:
        check_name(name, calibration=config.calibration or None)
    for what, name, of in (
        ("route", config.route, HOWS),
        ("embedder", config.embedder, ("minilm", "model")),
    ):
        if name not in of:
            raise InputError(what, got=repr(name), expected=known(of), fix="name one of them")
    if missing := sorted(set(config.coded) - set(config.cases)):
        raise InputError(
            "coded", got=", ".join(missing), expected="some of the cases", fix="add it to them"
        )
    return [parse_case(name) for name in config.cases]


def report(folder: Path) -> None:
    """Tables and the picture, of all lines in a folder."""
    rows = read_rows(folder / "metrics.jsonl")
    (folder / "tables.txt").write_text(print_tables(rows), encoding="utf-8")
    (folder / "conversations.png").write_bytes(conversations_png(rows))
    print(f"wrote {folder / 'metrics.jsonl'}, tables.txt, conversations.png")


def conversations(config: ConfigDict) -> list[Conversation]:
    """Those named, of the file; without one, made-up ones of these names."""
    names = list(config.conversations)
    if not config.data:
        return [made_up(name, seed=i) for i, name in enumerate(names)]
    found = {one.name: one for one in read(config.data)}
    if missing := [name for name in names if name not in found]:
        raise InputError(
            "conversations", got=", ".join(missing), expected=known(found), fix="name these"
        )
    return [found[name] for name in names]


if __name__ == "__main__":
    app.run(main)
