"""From scores to a choice of tokens or pages, with static shapes."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kvjax.core.codec import Array
from kvjax.core.errors import InputError
from kvjax.core.pytree import pytree

EMPTY = -1  # in a choice: no token


def choose_tokens(
    scores: Array,
    position: Array,
    k: int,
    *,
    sink: int = 0,
    recent: int = 0,
    count: Array | int | None = None,
) -> Array:
    """The k tokens with the highest scores among those that a query sees, its own included.

    The first `sink` tokens and the newest `recent` ones are always among them, and count. Of equal
    scores the older token is chosen.

    Args:
      scores: `[..., t]`, of the tokens at positions 0 to t - 1.
      position: `[...]` int32, of the query: it sees no token after it; -1 sees none.
      k: how many; at most t are returned.
      count: `[...]`, where fewer than k are wanted; None is k.
    Returns:
      Positions `[..., min(k, t)]` int32, best first; -1 where there are no more tokens.
    Raises:
      InputError: a k that does not hold the tokens that always stay.

    Example:
      >>> import jax.numpy as jnp
      >>> scores = jnp.array([0.0, 3.0, 1.0, 3.0, 9.0])
      >>> choose_tokens(scores, jnp.int32(3), 3, sink=1)
      Array([0, 1, 3], dtype=int32)
      >>> choose_tokens(scores, jnp.int32(1), 3)
      Array([ 1,  0, -1], dtype=int32)
    """
    if k < max(1, sink + recent):
        raise InputError(
            "k",
            got=k,
            expected=f"{max(1, sink + recent)} or more: {sink} of the sink and {recent} recent "
            "tokens are always chosen",
            fix="choose more tokens, or make the windows smaller",
        )
    t = scores.shape[-1]
    at, own = jnp.arange(t), jnp.asarray(position)[..., None]
    always = (at < sink) | (own - at < recent)
    # Not -inf or inf, which scores may be: what is always chosen comes before all, unseen last.
    finite = jnp.nan_to_num(scores.astype(jnp.float32), nan=-1e37, posinf=1e37, neginf=-1e37)
    ranked = jnp.where(always, jnp.inf, jnp.clip(finite, -1e37, 1e37))
    best, chosen = jax.lax.top_k(jnp.where(at <= own, ranked, -jnp.inf), min(k, t))
    real = best > -jnp.inf
    if count is not None:
        real &= jnp.arange(chosen.shape[-1]) < jnp.asarray(count)[..., None]
    return jnp.where(real, chosen, EMPTY).astype(jnp.int32)


def mask_of(chosen: Array, t: int) -> Array:
    """Which of t tokens are in a choice: positions `[..., k]` -> bool `[..., t]`.

    Example:
      >>> import jax.numpy as jnp
      >>> mask_of(jnp.array([2, -1]), 4)
      Array([False, False,  True, False], dtype=bool)
    """
    flat = chosen.reshape(-1, chosen.shape[-1])
    rows = jnp.arange(flat.shape[0])[:, None]
    at = jnp.where(flat >= 0, flat, t)
    mask = jnp.zeros((flat.shape[0], t), bool).at[rows, at].set(True, mode="drop")
    return mask.reshape(*chosen.shape[:-1], t)


@pytree
class PageBounds:
    """The range of the keys of each page by channel, `[..., n, d]` each: it bounds their logits.

    As side data it costs two vectors a page: `2 / p` of exact keys.
    """

    low: Array
    high: Array


def page_bounds(keys: Array, real: Array | None = None) -> PageBounds:
    """Bounds of pages of keys `[..., n, p, d]`; `real: [..., n, p]` hides slots without a token.

    Of a page without any, low is inf and high -inf.

    Source: Quest, arXiv 2406.10774. From the decoded keys of a packed page the bound holds for the
    logits that attention will compute.
    """
    seen = jnp.ones((), bool) if real is None else real[..., None]
    low = jnp.where(seen, keys, jnp.inf).min(-2)
    high = jnp.where(seen, keys, -jnp.inf).max(-2)
    return PageBounds(low, high)


def page_logits(q: Array, bounds: PageBounds) -> Array:
    """The highest logit that a page could hold, `[..., g, n]`, for queries `[..., g, d]`.

    sum_c max(q_c low_c, q_c high_c), as two products; -inf for a page without tokens.

    Example:
      >>> import jax.numpy as jnp
      >>> bounds = page_bounds(jnp.array([[[1.0, -2.0], [0.0, 3.0]]]))
      >>> page_logits(jnp.array([[1.0, -1.0]]), bounds)
      Array([[3.]], dtype=float32)
    """
    product = lambda a, b: jnp.einsum("...gd,...nd->...gn", a, b)
    empty = (bounds.low > bounds.high).any(-1)  # [..., n]
    low, high = (jnp.where(empty[..., None], 0, a) for a in (bounds.low, bounds.high))
    most = product(jnp.maximum(q, 0), high) + product(jnp.minimum(q, 0), low)
    return jnp.where(empty[..., None, :], -jnp.inf, most)


def page_scores(bound_logits: Array, visible: Array) -> Array:
    """One score per page for all heads of a layer: the mean over heads of a softmax over pages.

    Args:
      bound_logits: `[..., heads, n]`. visible: bool, broadcasts to `[..., 1, n]`.
    Returns:
      `[..., n]`.
    """
    logits = jnp.where(visible, bound_logits, -jnp.inf)
    top = jnp.maximum(logits.max(-1, keepdims=True), -1e30)
    weights = jnp.exp(logits - top)
    return (weights / jnp.maximum(weights.sum(-1, keepdims=True), 1e-30)).mean(-2)


def tokens_of_pages(pages: Array, page: int, *, first: int = 0) -> Array:
    """The positions of all tokens of chosen pages `[..., c]` (-1: none), `[..., c * page]`.

    Args:
      first: position where page 0 begins.

    Example:
      >>> import jax.numpy as jnp
      >>> tokens_of_pages(jnp.array([1, -1]), 2, first=4)
      Array([ 6,  7, -1, -1], dtype=int32)
    """
    tokens = first + pages[..., None] * page + jnp.arange(page)
    return jnp.where(pages[..., None] >= 0, tokens, EMPTY).reshape(*pages.shape[:-1], -1)
