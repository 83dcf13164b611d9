"""Prompts with their answers, as arrays, and how likely a model finds the answers."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.core.errors import InputError
from kvjax.core.pytree import pytree
from kvjax.models.causal import causal_attend
from kvjax.models.config import ModelConfig, layer_runs
from kvjax.models.decoder import Params, decode_layers, logits

Array = jax.Array

STEP = 16  # widths are multiples of it, so that few are compiled; so many are predicted at a time


@dataclasses.dataclass(frozen=True)
class Example:
    """Token ids of a prompt and of its answer, for one model."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


@pytree
class Answers:
    """Examples side by side, padded with zeros.

    Attributes:
      tokens: `[n, t]` int32, prompt and answer. lengths: `[n]`, real ones.
      at: `[n, a]`, positions that predict a token of the answer. target: `[n, a]`, that token.
      real: `[n, a]` bool.
    """

    tokens: Array
    lengths: Array
    at: Array
    target: Array
    real: Array


def answers_of(examples: Sequence[Example]) -> Answers:
    """Examples as arrays of the least width that is a multiple of 16.

    Raises:
      InputError: no examples, or one without a prompt or an answer.
    """
    empty = [i for i, e in enumerate(examples) if not (e.prompt and e.answer)]
    if empty or not examples:
        raise InputError(
            "examples",
            got=f"number {empty[0]} without a prompt or an answer" if empty else "none",
            expected="one or more, each with both",
            fix="leave out what is empty",
        )
    up = lambda n: -(-n // STEP) * STEP
    n = len(examples)
    width = up(max(len(e.prompt) + len(e.answer) for e in examples))
    most = up(max(len(e.answer) for e in examples))
    tokens = np.zeros((n, width), np.int32)
    at, target = np.zeros((2, n, most), np.int32)
    real = np.zeros((n, most), bool)
    for i, e in enumerate(examples):
        tokens[i, : len(e.prompt) + len(e.answer)] = e.prompt + e.answer
        at[i, : len(e.answer)] = len(e.prompt) - 1 + np.arange(len(e.answer))
        target[i, : len(e.answer)] = e.answer
        real[i, : len(e.answer)] = True
    lengths = np.array([len(e.prompt) + len(e.answer) for e in examples], np.int32)
    return Answers(*map(jnp.asarray, (tokens, lengths, at, target, real)))


def mean_answer_nll(params: Params, config: ModelConfig, batch: Answers) -> Array:
    """Mean negative log-likelihood of each answer's tokens given what comes before, `[n]` nats."""
    runs = layer_runs(config)
    positions = jnp.broadcast_to(jnp.arange(batch.tokens.shape[1]), batch.tokens.shape)
    attend = causal_attend(runs, positions, batch.lengths)
    caches = (None,) * len(runs)
    hidden, _, _ = decode_layers(params, config, batch.tokens, positions, attend, caches)
    here = jnp.take_along_axis(hidden, batch.at[..., None], 1)  # [n, a, D]

    @jax.checkpoint
    def some(part):  # logits take [n, 16, V], however long the answers are
        here, target = part
        scores = jax.nn.log_softmax(logits(params, config, here))
        return jnp.take_along_axis(scores, target[..., None], 2)[..., 0]

    cut = lambda a: jnp.moveaxis(a.reshape(len(a), -1, STEP, *a.shape[2:]), 1, 0)
    found = jax.lax.map(some, (cut(here), cut(batch.target)))  # [a / 16, n, 16]
    found = jnp.moveaxis(found, 0, 1).reshape(batch.target.shape)
    return -jnp.where(batch.real, found, 0.0).sum(1) / batch.real.sum(1)


def perplexities(
    params: Params, config: ModelConfig, examples: Sequence[Example], *, together: int = 8
) -> np.ndarray:
    """Perplexity of each answer, `[n]` float64: `exp` of its mean negative log-likelihood.

    Args:
      together: examples per call; of all of them one shape is compiled.
    Raises:
      InputError: as `answers_of`.
    """
    whole = answers_of(examples)
    fill = -len(examples) % together
    padded = jax.tree.map(lambda a: jnp.concatenate([a, a[:1].repeat(fill, 0)]), whole)
    blocks = jax.tree.map(lambda a: a.reshape(-1, together, *a.shape[1:]), padded)
    nll = _all_nll(params, config, blocks)
    return np.exp(np.asarray(nll, np.float64).reshape(-1)[: len(examples)])


@functools.partial(jax.jit, static_argnames="config")
def _all_nll(params, config, blocks):
    return jax.lax.map(lambda batch: mean_answer_nll(params, config, batch), blocks)
