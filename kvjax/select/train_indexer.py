"""Training indexers against the attention of the model itself, all layers at once."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kvjax.checkpoint import Saver, mark, restore
from kvjax.core.codec import Array
from kvjax.core.errors import InputError
from kvjax.core.pytree import pytree
from kvjax.select.indexer import Indexer, index_keys, index_queries, index_scores
from kvjax.select.observe import Observed
from kvjax.select.share import served


@dataclasses.dataclass(frozen=True)
class IndexTraining:
    """How to train.

    Args:
      steps: of Adam, some queries of one window each. rate: at its highest; it rises over the first
        twentieth and falls to 0 as a cosine.
      rows: queries of a step. keys: tokens that they are compared on, drawn anew in each step; None
        is all of the window.
      sink, recent: tokens that are always chosen: nothing is learned of them.
      seed: of the order of windows and rows.
    """

    steps: int = 300
    rate: float = 3e-3
    rows: int = 64
    keys: int | None = 2048
    sink: int = 4
    recent: int = 64
    seed: int = 0

    def __post_init__(self):
        for name in ("steps", "rate", "rows", "keys"):
            value = getattr(self, name)
            if value is not None and not 0 < value < np.inf:  # NaN neither
                raise InputError(name, got=value, expected="above 0", fix="choose such a number")


@pytree
class IndexProgress:
    """A training between two steps.

    Attributes:
      indexer: of all layers. moments: of Adam. step: int32, steps done.
      losses: `[steps]`, mean over layers, NaN where not done yet.
    """

    indexer: Indexer
    moments: Any
    step: Array
    losses: Array


def index_loss(
    indexer: Indexer,
    x: Array,
    mass: Array,
    rows: Array,
    training: IndexTraining,
    keys: Array | None = None,
) -> Array:
    """What the indexer of one layer misses, mean over queries.

        sum_s p[t, s] log(p[t, s] / (P_t softmax_s I[t, s])),   P_t = sum_s p[t, s]

    over the tokens s that query t sees and that are not chosen anyway; p is the attention, mean
    over heads. It is P_t times the KL of the two distributions over these tokens.

    Args:
      x: `[t, D]`. mass: `[r, t]`. rows: `[r]`. keys: `[m]`, only these tokens; None is all.

    Source: DeepSeek-V3.2's dense warm-up. Differs from it: tokens that are always chosen are left
    out, and a query counts by the attention that is at stake.
    """
    at = jnp.arange(x.shape[0]) if keys is None else keys
    queries = index_queries(indexer, x[rows].astype(jnp.float32), rows)
    scores = index_scores(*queries, index_keys(indexer, x[at].astype(jnp.float32), at))
    own = rows[:, None]
    open_ = (at >= training.sink) & (own - at >= training.recent) & (at <= own)
    p = jnp.where(open_, mass[:, at].astype(jnp.float32), 0.0)
    total = p.sum(-1, keepdims=True)
    guess = jax.nn.log_softmax(jnp.where(open_, scores, -1e30))
    target = jnp.log(jnp.maximum(p, 1e-30) / jnp.maximum(total, 1e-30))
    return jnp.where(open_, p * (target - guess), 0.0).sum(-1).mean()


def start_index_training(indexer: Indexer, training: IndexTraining) -> IndexProgress:
    """The progress before the first step."""
    moments = _optimizer(training).init(_learned(indexer))
    return IndexProgress(indexer, moments, jnp.int32(0), jnp.full((training.steps,), jnp.nan))


def train_indexer(
    indexer: Indexer,
    observed: Sequence[Observed],
    training: IndexTraining,
    *,
    progress: IndexProgress | None = None,
) -> Iterator[IndexProgress]:
    """Lowers `index_loss` of all layers, some queries of a window per step.

    Args:
      indexer: stacked over the layers of `observed`.
      progress: where to go on; None starts anew.
    Yields:
      The progress after every step.
    Raises:
      InputError: nothing observed, other layers, fewer queries than `rows`; a loss that is not
        finite.
    """
    _check(indexer, observed, training)
    if progress is None:
        progress = start_index_training(indexer, training)
    for number in range(int(progress.step), training.steps):
        rng = np.random.default_rng((training.seed, number))
        window = observed[int(rng.integers(len(observed)))]
        rows = rng.choice(len(window.rows), training.rows, replace=False)
        keys = None
        if training.keys is not None and training.keys < window.x.shape[1]:
            keys = np.sort(rng.choice(window.x.shape[1], training.keys, replace=False))
        progress = _step(progress, window, np.sort(rows), keys, training)
        if number % 10 == 0 or number == training.steps - 1:
            loss = float(progress.losses[number])
            if not np.isfinite(loss):
                raise InputError(
                    f"step {number}",
                    got=f"a loss of {loss}",
                    expected="a finite one",
                    fix="lower the rate",
                )
        yield progress


def train_indexer_saving(
    indexer: Indexer,
    observed: Sequence[Observed],
    training: IndexTraining,
    folder: str | os.PathLike,
    *,
    about: dict[str, Any] | None = None,
    every: int = 50,
) -> Iterator[IndexProgress]:
    """`train_indexer`, saved into a folder every so many steps and at its end.

    Called again after a kill it goes on from what was saved.

    Args:
      about: plain data that tells this training from others: model, text.
    Raises:
      InputError: as `train_indexer`; a folder with another training.
    """
    about = {
        **(about or {}),
        "training": dataclasses.asdict(training),
        "start": mark(indexer),
        "rows": mark([w.rows for w in observed]),
    }
    like = jax.eval_shape(lambda: start_index_training(indexer, training))
    found = restore(folder, like, about=about)
    start: IndexProgress | None = None if found is None else found[0]
    if start is not None and int(start.step) == training.steps:
        yield start
        return
    with Saver(folder) as saver:
        for progress in train_indexer(indexer, observed, training, progress=start):
            done = int(progress.step)
            if done % every == 0 or done == training.steps:
                saver.save(progress, about=about)
            yield progress


def shared_targets(observed: Observed, pattern: str) -> Observed:
    """What the indexers of the F layers of a pattern learn from: their own inputs, and the mean
    attention of all layers that each serves.

    Source: IndexCache, arXiv 2603.12201, its training-aware variant.
    """
    groups = served(pattern)
    full = np.asarray(list(groups))
    mean = lambda own: observed.mass[np.asarray(own)].astype(jnp.float32).mean(0)
    mass = jnp.stack([mean(own).astype(observed.mass.dtype) for own in groups.values()])
    return Observed(observed.x[full], mass, observed.rows)


def _learned(indexer: Indexer) -> dict[str, Array]:
    return {name: getattr(indexer, name) for name in ("wq", "wk", "ww", "gain", "bias")}


def _optimizer(training: IndexTraining) -> optax.GradientTransformation:
    warm = max(1, training.steps // 20)
    rate = optax.warmup_cosine_decay_schedule(
        training.rate / (warm + 1), training.rate, warm, training.steps + 1
    )
    return optax.adam(rate, b2=0.98)


@functools.partial(jax.jit, static_argnames="training")
def _step(progress: IndexProgress, window: Observed, rows, keys, training) -> IndexProgress:
    def layer(_, inputs):
        own, x, mass = inputs

        def loss(learned):
            made = dataclasses.replace(own, **learned)
            return index_loss(made, x, mass[rows], window.rows[rows], training, keys)

        return None, jax.value_and_grad(loss)(_learned(own))

    _, (losses, gradients) = jax.lax.scan(layer, None, (progress.indexer, window.x, window.mass))
    learned = _learned(progress.indexer)
    updates, moments = _optimizer(training).update(gradients, progress.moments, learned)
    after: Any = optax.apply_updates(learned, updates)
    return IndexProgress(
        dataclasses.replace(progress.indexer, **after),
        moments,
        progress.step + 1,
        progress.losses.at[progress.step].set(losses.mean()),
    )


def _check(indexer: Indexer, observed: Sequence[Observed], training: IndexTraining) -> None:
    layers, width = indexer.wk.shape[0], indexer.wk.shape[1]
    if not observed:
        raise InputError("observed", got="no windows", expected="one or more", fix="observe some")
    for window in observed:
        if (window.x.shape[0], window.x.shape[2]) != (layers, width):
            raise InputError(
                "observed",
                got=f"{window.x.shape[0]} layers of width {window.x.shape[2]}",
                expected=f"{layers} layers of width {width}, those of the indexer",
                fix="observe the model that the indexer was made for",
            )
        if len(window.rows) < training.rows:
            raise InputError(
                "rows",
                got=f"{len(window.rows)} observed queries",
                expected=f"at least the {training.rows} of a step",
                fix="observe more, or train with fewer",
            )
