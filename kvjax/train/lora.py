"""Low-rank changes of any of a decoder's matrices, and fitting them to answers."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kvjax.core.errors import InputError, known
from kvjax.core.pytree import pytree
from kvjax.core.rng import fold
from kvjax.models.config import ModelConfig
from kvjax.models.decoder import Params
from kvjax.train.adapter import LowRankChange
from kvjax.train.answers import Answers, Example, answers_of, mean_answer_nll

Array = jax.Array

MATRICES = ("wq", "wk", "wv", "wo", "w_gate", "w_up", "w_down")


@pytree
class Lora:
    """By the name of a matrix, its changes per run of layers."""

    changes: dict[str, tuple[LowRankChange, ...]]


def init_lora(params: Params, *, rank: int, rng: Array, matrices: Sequence[str] = MATRICES) -> Lora:
    """Changes that change nothing yet (`up` is zero).

    Raises:
      InputError: a rank under 1 or over the narrowest side of a matrix, matrices of other names.

    Source: LoRA, arXiv 2106.09685.
    """
    strange = set(matrices) - set(MATRICES)
    if strange or not matrices:
        raise InputError(
            "matrices",
            got=", ".join(sorted(strange)) or "none",
            expected=f"some of {known(MATRICES)}",
            fix="name those",
        )
    run = params.runs[0]
    most = min(size for name in matrices for size in getattr(run, name).shape[1:])
    if not 1 <= rank <= most:
        raise InputError(
            "rank", got=rank, expected=f"1 to {most}, the narrowest side", fix="choose such a rank"
        )

    def change(name: str, i: int) -> LowRankChange:
        layers, rows, columns = getattr(params.runs[i], name).shape
        down = jax.random.normal(fold(rng, name, i), (layers, rows, rank)) / rows**0.5
        return LowRankChange(down, jnp.zeros((layers, rank, columns)))

    return Lora({n: tuple(change(n, i) for i in range(len(params.runs))) for n in matrices})


def with_lora(lora: Lora, params: Params) -> Params:
    """The weights with the changes added; same shapes and dtypes.

    Example:
      >>> params = with_lora(last.lora, model.params)  # doctest: +SKIP
    """
    runs = []
    for i, run in enumerate(params.runs):
        changed = {
            name: (getattr(run, name) + c[i].down @ c[i].up).astype(getattr(run, name).dtype)
            for name, c in lora.changes.items()
        }
        runs.append(dataclasses.replace(run, **changed))
    return dataclasses.replace(params, runs=tuple(runs))


@dataclasses.dataclass(frozen=True)
class Fitting:
    """How to fit.

    Args:
      steps: of Adam, `batch` examples each. rate: its highest; it rises over the first tenth and
        falls to 0 as a cosine.
      rank: of the changes. seed: for the order of examples and the start.
    """

    steps: int = 100
    rate: float = 2e-3
    rank: int = 16
    batch: int = 8
    seed: int = 0

    def __post_init__(self):
        for name in ("steps", "rate", "rank", "batch"):
            if not 0 < getattr(self, name) < np.inf:
                raise InputError(
                    name, got=getattr(self, name), expected="above 0", fix="choose such a number"
                )


@dataclasses.dataclass(frozen=True)
class Fitted:
    """After a step: what is learned, the number of the step from 1, and its loss in nats."""

    lora: Lora
    step: int
    loss: float


def fit(
    params: Params, config: ModelConfig, examples: Sequence[Example], fitting: Fitting
) -> Iterator[Fitted]:
    """Lowers the mean negative log-likelihood of the answers, given their prompts.

    Yields:
      What is learned after every step.
    Raises:
      InputError: no examples, empty ones; a loss that is not finite.

    Example:
      >>> *_, last = fit(model.params, model.config, examples, Fitting())  # doctest: +SKIP
    """
    whole = answers_of(examples)
    rng = fold(jax.random.key(fitting.seed), "lora")
    lora = init_lora(params, rank=fitting.rank, rng=rng)
    moments = _optimizer(fitting).init(lora)
    draw, order = np.random.default_rng(fitting.seed), np.zeros(0, np.int64)
    for step in range(1, fitting.steps + 1):
        while len(order) < fitting.batch:
            order = np.concatenate([order, draw.permutation(len(examples))])
        some, order = order[: fitting.batch], order[fitting.batch :]
        batch = jax.tree.map(lambda a, some=some: a[some], whole)
        lora, moments, loss = _step(params, config, fitting, lora, moments, batch)
        if not np.isfinite(loss):
            raise InputError(
                f"step {step}",
                got=f"a loss of {float(loss)}",
                expected="a finite one",
                fix="lower the rate",
            )
        yield Fitted(lora, step, float(loss))


def _optimizer(fitting: Fitting) -> optax.GradientTransformation:
    warm = max(1, fitting.steps // 10)
    rate = optax.warmup_cosine_decay_schedule(
        fitting.rate / (warm + 1), fitting.rate, warm, fitting.steps + 1
    )
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))


@functools.partial(jax.jit, static_argnames=("config", "fitting"))
def _step(params, config, fitting: Fitting, lora: Lora, moments: Any, batch: Answers):
    def loss(lora):
        return mean_answer_nll(with_lora(lora, params), config, batch).mean()

    value, gradients = jax.value_and_grad(loss)(lora)
    updates, moments = _optimizer(fitting).update(gradients, moments, lora)
    return optax.apply_updates(lora, updates), moments, value
