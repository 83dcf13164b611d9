"""Budgets of layers by their sensitivity: more tokens where blockwise prefill moves keys more."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.core.errors import InputError, known


def layer_budgets(
    similarity: Sequence[float] | np.ndarray,
    per_layer: int,
    alpha: float,
    *,
    formula: Literal["paper", "code"] = "paper",
    least: int = 1,
    most: int | None = None,
) -> tuple[int, ...]:
    """Tokens that each layer keeps, `per_layer` on average.

    With s_l = 1 - similarity_l and L layers,

        paper:  M_l = s_l^alpha / sum_j s_j^alpha * L M,   rounded to whole tokens of sum L M
        code:   M_l = max(floor(w_l L M / sum w), max(1, M // 4)),
                w_l = (1 - (similarity_l - min) / (max - min))^alpha,   of a sum above L M

    Equal layers get equal budgets, and `alpha` 0 means that all do.

    Args:
      similarity: `[l]` mean cosines from `key_similarity`, -1 to 1.
      per_layer: M, tokens per layer and KV head.
      alpha: how strongly sensitivity counts; the paper finds 2 to 4 best, its scripts use 1.1 to
        1.3 with "code".
      formula: "paper" or "code"; the released code has one of its own.
      least, most: bounds of any layer, for "paper"; what one layer may not take or give, the
        others do in proportion. A layer can use no more than the conversation has.

    Raises:
      InputError: similarities that are none, a negative alpha, bounds without a solution.

    Example:
      >>> layer_budgets([0.9, 0.8, 0.9], 100, 1.0)
      (75, 150, 75)
      >>> layer_budgets([0.9, 0.8, 0.9], 100, 1.0, most=120)
      (90, 120, 90)

    Source: EpiCache (arXiv 2509.17396), equations 8 to 10, and the code released with it. Differs
    from the paper: whole tokens by largest remainder, and bounds; the first alone changes no
    budget by a token or more.
    """
    sigma = _checked(similarity, per_layer, alpha)
    if formula == "code":
        return _released(sigma, per_layer, alpha)
    if formula != "paper":
        raise InputError(
            "formula", got=formula, expected=known(("paper", "code")), fix="choose one of them"
        )
    return _whole(layer_shares(sigma, per_layer, alpha, least=least, most=most))


def layer_shares(
    similarity: Sequence[float] | np.ndarray,
    per_layer: float,
    alpha: float,
    *,
    least: float = 0,
    most: float | None = None,
) -> np.ndarray:
    """The paper's budgets before they are rounded, float64 `[l]` of sum `L per_layer`."""
    sigma = _checked(similarity, per_layer, alpha)
    total = per_layer * len(sigma)
    top = total if most is None else min(most, total)
    if not 0 <= least <= per_layer <= top:
        raise InputError(
            "bounds of a layer",
            got=f"{least} to {top}",
            expected=f"a range with {per_layer}, the average, in it",
            fix="lower `least`, raise `most` or change the budget",
        )
    weights = np.maximum(1 - sigma, 0) ** alpha
    if not weights.any():
        weights = np.ones_like(weights)
    if (weights / weights.sum() * total).min() >= least and weights.max() * total <= (
        top * weights.sum()
    ):
        return weights / weights.sum() * total
    weights = np.maximum(weights / weights.max(), 1e-12)  # a layer that moves nothing can take
    low, high = 0.0, 2 * total / weights.min()
    for _ in range(200):  # clip(scale w) sums to more as the scale grows: bisection finds L M
        scale = (low + high) / 2
        short = np.clip(scale * weights, least, top).sum() < total
        low, high = (scale, high) if short else (low, scale)
    return np.clip(high * weights, least, top)


def key_similarity(k_full: jax.Array, k_block: jax.Array, window: int = 1) -> jax.Array:
    """Mean cosine of each layer between keys of full and of blockwise prefill, float32 `[l]`.

    Args:
      k_full, k_block: `[l, ..., t, d]`, keys of the same tokens as a cache holds them.
      window: tokens per vector: 1 compares keys of d channels (paper), 100 compares stretches of
        100 keys as one vector (code). A shorter last stretch counts like the others.

    Raises:
      InputError: shapes that differ, a window below 1.

    Example:
      >>> k = jnp.ones((2, 3, 8, 4))
      >>> key_similarity(k, k.at[1].multiply(-2.0)).tolist()
      [1.0, -1.0]

    Source: EpiCache (arXiv 2509.17396), equation 8.
    """
    if k_full.shape != k_block.shape or k_full.ndim < 3 or 0 in k_full.shape:
        raise InputError(
            "keys",
            got=f"{k_full.shape} and {k_block.shape}",
            expected="the same [l, ..., t, d] twice",
            fix="take the keys of one document in both ways",
        )
    if window < 1:
        raise InputError("window", got=window, expected="1 or more", fix="use 1, or 100")
    return _mean_cosine(k_full, k_block, window)


@functools.partial(jax.jit, static_argnames="window")
def _mean_cosine(k_full: jax.Array, k_block: jax.Array, window: int) -> jax.Array:
    l, t, d = k_full.shape[0], *k_full.shape[-2:]
    pad = -t % window  # zeros, which change no cosine of a stretch that has tokens

    def stretches(k: jax.Array) -> jax.Array:
        k = jnp.pad(k.astype(jnp.float32).reshape(l, -1, t, d), ((0, 0), (0, 0), (0, pad), (0, 0)))
        return k.reshape(l, -1, window * d)

    a, b = stretches(k_full), stretches(k_block)
    norms = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)
    return jnp.mean((a * b).sum(-1) / jnp.where(norms > 0, norms, 1), axis=-1)


def _checked(similarity, per_layer: float, alpha: float) -> np.ndarray:
    sigma = np.asarray(similarity, np.float64)
    if sigma.ndim != 1 or not len(sigma) or not (np.abs(sigma) <= 1 + 1e-5).all():
        raise InputError(
            "similarity",
            got=f"shape {sigma.shape}, values {sigma.ravel()[:8].tolist()}",
            expected="one mean cosine per layer, -1 to 1",
            fix="take them from key_similarity",
        )
    for name, value, low in (("per_layer", per_layer, 1), ("alpha", alpha, 0)):
        if not low <= value < np.inf:
            raise InputError(name, got=value, expected=f"{low} or more", fix="raise it")
    return sigma


def _released(sigma: np.ndarray, per_layer: int, alpha: float) -> tuple[int, ...]:
    span = sigma.max() - sigma.min()
    if alpha == 0 or span == 0:
        return (per_layer,) * len(sigma)
    weights = (1 - (sigma - sigma.min()) / span) ** alpha
    shares = weights * (per_layer * len(sigma)) / weights.sum()
    return tuple(max(int(share), max(1, per_layer // 4)) for share in shares)


def _whole(shares: np.ndarray) -> tuple[int, ...]:
    """Rounded down, the tokens left over to the largest remainders, ties to the first layer."""
    floors = np.floor(shares + 1e-9).astype(int)
    left = round(shares.sum()) - int(floors.sum())
    order = np.argsort(floors - shares, kind="stable")
    floors[order[:left]] += 1
    return tuple(int(m) for m in floors)
