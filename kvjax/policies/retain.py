"""Which slots stay: budgets among the tokens of a head, of a layer, or of all layers."""

from __future__ import annotations

from typing import Literal

import jax.numpy as jnp

from kvjax.core.codec import Array
from kvjax.policies.policy import EMPTY

Compete = Literal["head", "layer", "model"]

_SURE = 1e30  # added to the score of what must stay
_FLOOR = 1e20  # added to the score of what a head is sure of


def keep(
    score: Array,
    real: Array,
    protected: Array,
    budgets: Array,
    *,
    compete: Compete = "head",
    floor: float = 0.2,
    most: int,
) -> Array:
    """Which slots stay, bool `[l, b, h, s]`.

    Args:
      score: `[l, b, h, s]` float32, larger stays; ties go to the lower slot.
      real: slots that hold a token. protected: slots that stay in any case, first of all.
      budgets: `[l]` int32, tokens per head (their mean where heads compete).
      compete: among whom a token must be one of the best: its "head"; its "layer", whose heads
        share h times the budget (Ada-KV, arXiv 2407.11550); the "model", whose layers share all
        (KVzip, arXiv 2505.23416).
      floor: share of its budget that each head fills with its own best where heads compete.
      most: tokens that a head can hold; more than the budget only matters where heads compete.
    Returns:
      The mask. It holds min(budget, tokens) slots per head, or h times that in a layer, or the sum
      of all, unless `most` binds for so many heads that there is nobody left to give to.

    Example:
      >>> import jax.numpy as jnp
      >>> score = jnp.array([[[[3.0, 2.0, 1.0], [9.0, 8.0, 7.0]]]])  # two heads
      >>> all_ = jnp.ones(score.shape, bool)
      >>> keep(score, all_, ~all_, jnp.array([2]), compete="layer", floor=0.0, most=3).sum(-1)
      Array([[[1, 3]]], dtype=int32)
    """
    layers, b, h, s = score.shape
    score = jnp.where(real, score, EMPTY)
    score = jnp.where(protected & real, _SURE + jnp.clip(score, -_FLOOR, _FLOOR), score)
    own = _rank(score)
    if compete == "head":
        return real & (own < jnp.minimum(budgets, most)[:, None, None, None])
    least = jnp.floor(floor * budgets).astype(jnp.int32)[:, None, None, None]
    sure = (own < least) & (score < _FLOOR)
    score = jnp.where(sure, _FLOOR + jnp.clip(score, -1e10, 1e10), score)
    score = jnp.where(real & (own < most), score, EMPTY)
    if compete == "layer":
        rank = _rank(score.reshape(layers, b, h * s)).reshape(score.shape)
        return real & (own < most) & (rank < h * budgets[:, None, None, None])
    flat = score.transpose(1, 0, 2, 3).reshape(b, layers * h * s)
    rank = _rank(flat).reshape(b, layers, h, s).transpose(1, 0, 2, 3)
    return real & (own < most) & (rank < h * budgets.sum())


def whole_pages(score: Array, wanted: Array, page: int, pages: Array | int) -> Array:
    """Trims what heads hold to whole pages, so that together they fill a pool exactly.

    Each head gets its number of full pages; pages left over go to the heads with the longest
    remainders. A head that gets none for its remainder drops that, lowest scores first.

    Args:
      score: `[..., h, s]`; h heads (of one layer or of all) share the pool. wanted: what they would
        hold. page: tokens per page. pages: the pool's pages.
    Returns:
      bool `[..., h, s]`.
    """
    counts = wanted.sum(-1)  # [..., h]
    full = jnp.minimum(counts // page, pages)
    rest = counts - full * page
    spare = jnp.maximum(pages - full.sum(-1, keepdims=True), 0)
    extra = (_rank(rest.astype(jnp.float32)) < spare) & (rest > 0)
    rank = _rank(jnp.where(wanted, score, EMPTY))
    return wanted & (rank < ((full + extra) * page)[..., None])


def _rank(score: Array) -> Array:
    """0 for the largest of the last axis; ties in order of index."""
    order = jnp.argsort(-score, axis=-1, stable=True)
    return jnp.argsort(order, axis=-1)
