"""The text part of experiments/long_context.py: a real model reads a book through its cache."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.codecs import Dense
from kvjax.core.layout import Layout
from kvjax.core.method import Method
from kvjax.evals.fidelity import Scores, summarize
from kvjax.generate import Plan, check_finite, forward_block, init_caches, make_plan
from kvjax.models.config import ModelConfig
from kvjax.models.decoder import Params, logits

Row = dict[str, Any]
Stretch = tuple[int, int]  # positions from the first to before the second


def stretches(ends: Sequence[int], size: int) -> list[Stretch]:
    """Positions that are compared: `size` before the last token of each of these contexts.

    Example:
      >>> stretches((64, 256), 32)
      [(31, 63), (223, 255)]
    """
    return [(end - 1 - size, end - 1) for end in ends]


def exact_method(layout: Layout) -> Method:
    """Keys and values as float32: the model itself, through the same code."""
    return Method(Dense("float32"), Dense("float32"), layout, name="exact")


def hidden_at(
    plan: Plan, params: Params, tokens: np.ndarray, wanted: Sequence[Stretch], block: int, dtype
) -> np.ndarray:
    """The last hidden states `[stretches, size, D]` of a model that reads `tokens: [t]`.

    Only the caches, one block and what is asked for are ever in memory.
    """
    caches = init_caches(plan, batch=1, capacity=len(tokens), dtype=dtype)
    kept: list[list[np.ndarray]] = [[] for _ in wanted]
    for first in range(0, len(tokens), block):
        part = jnp.asarray(tokens[None, first : first + block])
        hidden, caches, finite = _read(plan, params, caches, part)
        check_finite(finite)
        for found, (start, stop) in zip(kept, wanted, strict=True):
            here = slice(max(start - first, 0), max(stop - first, 0))
            if here.start < block and here.stop > 0:
                found.append(np.asarray(hidden[0, here], np.float32))
    return np.stack([np.concatenate(found) for found in kept])


@functools.partial(jax.jit, donate_argnames="caches")
def _read(plan: Plan, params: Params, caches, tokens: jax.Array):
    return forward_block(plan, params, caches, tokens)


def exact_hidden(
    params: Params,
    config: ModelConfig,
    tokens: np.ndarray,
    wanted: Sequence[Stretch],
    *,
    layout: Layout,
    block: int,
    path: Path,
) -> np.ndarray:
    """Of the exact model; kept in `path`, so that a rerun need not read it all again."""
    if path.exists():
        return np.load(path)
    plan = make_plan(config, exact_method(layout))
    hidden = hidden_at(plan, params, tokens, wanted, block, jnp.float32)
    partial = path.with_suffix(".partial.npy")
    np.save(partial, hidden)
    os.replace(partial, path)  # whole or not at all
    return hidden


def compare(
    params: Params,
    config: ModelConfig,
    tokens: np.ndarray,
    wanted: Sequence[Stretch],
    hidden: np.ndarray,
    reference: np.ndarray,
) -> Row:
    """KL and perplexity over all stretches, and of each."""
    score = jax.jit(functools.partial(_scores, config=config))
    found, by_position = [], []
    for (start, stop), ours, full in zip(wanted, hidden, reference, strict=True):
        following = jnp.asarray(tokens[start + 1 : stop + 1])
        one = jax.device_get(score(params, following, jnp.asarray(ours), jnp.asarray(full)))
        found.append(one)
        kept = dict(summarize([one]))
        by_position.append({"start": start, "stop": stop, **kept})
    return {**dict(summarize(found)), "by_position": by_position}


def _scores(params: Params, following, ours, full, *, config: ModelConfig) -> Scores:
    ours, full = (jax.nn.log_softmax(logits(params, config, a)) for a in (ours, full))
    pick = lambda lp: -jnp.take_along_axis(lp, following[:, None], 1)[:, 0]
    kl = (jnp.exp(full) * (full - ours)).sum(-1)
    return Scores(kl, pick(ours), pick(full), full.argmax(-1) == ours.argmax(-1))


def mean_of(rows: Sequence[Row], name: str) -> float:
    """Mean of what stretches have, for tables."""
    return math.fsum(row[name] for row in rows) / len(rows)
