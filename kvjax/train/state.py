"""A training on disk: saved as it goes, resumed bit for bit, and loaded to be used."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from kvjax.checkpoint import Saver, mark, peek, restore
from kvjax.core.errors import InputError
from kvjax.generate.plan import Plan
from kvjax.models.decoder import Params
from kvjax.models.fingerprint import fingerprint
from kvjax.train.adapter import Adapter
from kvjax.train.distill import Progress, Training, start_training, train


def train_saving(
    plan: Plan,
    params: Params,
    windows: Sequence[np.ndarray],
    training: Training,
    folder: str | os.PathLike,
    *,
    every: int = 10,
    say: Callable[[str], None] = lambda message: None,
) -> Iterator[Progress]:
    """`train`, saved into a folder every so many steps and at its end.

    Called again after a kill it goes on from what was saved, to the same result bit for bit.

    Args:
      every: steps between two saves. say: is told what was resumed.
    Yields:
      As `train`, from where it goes on; the last one again where all was done.
    Raises:
      InputError: as `train`; a folder with another training, or a damaged one.
    """
    if every < 1:
        raise InputError("every", got=every, expected="1 step or more", fix="save less often")
    about = _about(plan, params, training) | {"text": mark([np.asarray(w) for w in windows])}
    like = jax.eval_shape(lambda: start_training(plan, params, training))
    found = restore(folder, like, about=about)
    start: Progress | None = None
    if found is not None:
        start = found[0]
        say(f"{int(start.step)} of {training.steps} steps are there, in {folder}")
        if int(start.step) == training.steps:
            yield start
            return
    with Saver(folder) as saver:
        for progress in train(plan, params, windows, training, progress=start):
            done = int(progress.step)
            if done % every == 0 or done == training.steps:
                saver.save(progress, about=about)
            yield progress


def load_adapter(folder: str | os.PathLike, plan: Plan, params: Params) -> Adapter:
    """What a training has learned so far, to be used as `adapt` and `adapt_plan` do.

    Args:
      plan, params: those that it was trained with.
    Raises:
      InputError: no training there, one of another model or method, a damaged file.

    Example:
      >>> adapter = load_adapter("runs/qat", plan, model.params)  # doctest: +SKIP
      >>> plan, params = adapt_plan(adapter, plan), adapt(adapter, params)  # doctest: +SKIP
    """
    found = peek(folder)
    if found is None or "training" not in found[1]:
        raise InputError(
            str(folder),
            got="no training",
            expected="a folder that `kvjax tune --qat` wrote",
            fix="train first, or name another folder",
        )
    training = Training(**found[1]["training"])
    about = _about(plan, params, training)
    for name, own in about.items():
        if found[1].get(name) != own:
            raise InputError(
                f"training in {folder}",
                got=f"{name} {found[1].get(name)}",
                expected=f"{own}",
                fix="load it with the model and the method that it was trained with",
            )
    like = jax.eval_shape(lambda: start_training(plan, params, training))
    again = restore(folder, like)
    assert again is not None
    return again[0].adapter


def _about(plan: Plan, params: Params, training: Training) -> dict[str, Any]:
    return {
        "model": plan.config.name,
        "weights": fingerprint(params),
        "method": plan.methods[0].name,
        "codec": mark(plan.methods),
        "layout": dataclasses.asdict(plan.methods[0].layout),
        "training": dataclasses.asdict(training),
    }
