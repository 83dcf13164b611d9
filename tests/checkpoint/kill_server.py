"""Imports once and forks a process per line of its stdin, for tests that kill them.

A line is "JOB FOLDER"; the answers are "pid N", what the job prints, and "ended STATUS".
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint  # noqa: F401  here, so that what is forked has it
import tensorstore  # noqa: F401

import kvjax
from kvjax.checkpoint import Saver, peek, restore
from kvjax.generate import make_plan
from kvjax.generate.resume import generate_saving, prefill_saving
from kvjax.models.load import load

TINY = Path(__file__).parents[1] / "models" / "tiny" / "llama"
LONG = bool(os.environ.get("KVJAX_LONG_CHECKS"))
LAST, LONGEST = (30, 800) if LONG else (10, 250)  # enough saves for all kills
LAYOUT = kvjax.Layout(sink=2, recent=16, page=16)


def say(*words: object) -> None:
    sys.stdout.write(" ".join(map(str, words)) + "\n")  # in one piece
    sys.stdout.flush()


class Telling(Saver):
    """Says when it begins to save, and what surely counts."""

    def save(self, state, *, about=None):
        self.wait()  # as `save` itself does
        found = peek(self.folder)
        say("counts", -1 if found is None else progress(found[1]))
        say("saving", progress(about))
        return super().save(state, about=about)


def progress(about) -> int:
    return about["n"] if "n" in about else about["read"] + about["made"]


def digest(tree) -> str:
    found = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        found.update(np.asarray(jax.random.key_data(leaf) if key else leaf).tobytes())
    return found.hexdigest()


def state(n: int):
    """Arrays and files of several sizes."""
    rng = np.random.default_rng(n)
    return {f"{size}": rng.integers(0, 2**16, size, np.uint16) for size in (3, 1000, 2**18)}


def job_save(folder: str) -> None:
    """Saves states one after the other, from where an earlier run was."""
    found = restore(folder, state(0))
    n = -1
    if found is not None:
        n = found[1]["n"]
        say("resumed", n)
        assert digest(found[0]) == digest(state(n)), n
    with Telling(folder) as saver:
        while n < LAST:
            n += 1
            saver.save(state(n), about={"n": n})
    say("result", digest(restore(folder, state(0))[0]))


def job_prefill(folder: str) -> None:
    model = load(TINY)
    plan, prompts, params = model_parts(model)
    with Telling(folder) as saver:
        options = {"every": 32, "max_new": 8, "block": 32, "report": say}
        say("result", digest(prefill_saving(plan, params, prompts, saver, **options)))


def job_generate(folder: str) -> None:
    model = load(TINY)
    plan, prompts, params = model_parts(model)
    options = {"temperature": 0.9, "rng": jax.random.key(3), "report": say}
    with Telling(folder) as saver:
        options |= {"max_new": 32, "every": 8, "block": 32}
        say("result", digest(generate_saving(plan, params, prompts, saver, **options)))


def model_parts(model):
    method = kvjax.methods.get("turboquant-3", head_dim=16, layout=LAYOUT)
    draw = np.random.default_rng(2)
    prompts = [draw.integers(3, model.config.vocab_size, n).tolist() for n in (LONGEST, 90)]
    config = dataclasses.replace(model.config, max_positions=2048)
    return make_plan(config, method), prompts, model.params


def main() -> None:
    for line in sys.stdin:
        job, folder = line.split()
        child = os.fork()
        if child == 0:
            status = 1
            try:
                globals()[f"job_{job}"](folder)
                status = 0
            except BaseException as error:
                say("error", type(error).__name__, error)
            finally:
                os._exit(status)
        say("pid", child)
        say("ended", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


if __name__ == "__main__":
    main()
