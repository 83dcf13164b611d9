"""Ways to choose what a block of queries reads, for measurements on exact keys."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from kvjax.core.codec import Array
from kvjax.core.errors import InputError
from kvjax.models.causal import masked_softmax
from kvjax.select.choose import (
    choose_tokens,
    mask_of,
    page_bounds,
    page_logits,
    page_scores,
    tokens_of_pages,
)
from kvjax.select.index_cache import pack_keys, unpack_keys
from kvjax.select.indexer import Indexer, index_keys, index_queries, index_scores


@dataclasses.dataclass(frozen=True)
class Choice:
    """How much is chosen.

    Args:
      k: tokens that a query reads, those that are always chosen included.
      sink, recent: tokens that are always chosen.
      page: None, or choose whole pages of so many tokens: `k / page` of them.
      by_head: a choice for each KV head, by its own query heads; else one for the layer. As many
        bytes are read. For measurements: `attend_chosen` reads one choice.
    """

    k: int = 256
    sink: int = 4
    recent: int = 64
    page: int | None = None
    by_head: bool = False

    def __post_init__(self):
        if self.page is not None and (self.page < 1 or self.k % self.page):
            raise InputError(
                "page",
                got=f"{self.page}, and {self.k} tokens to choose",
                expected="a page that divides them",
                fix="choose whole pages",
            )


# x [s, D], q [s, h, g, d] (scaled) and positions [s] of queries -> which tokens they read,
# [c, s, t], c the KV heads with `by_head`, else 1.
Rows = Callable[[Array, Array, Array], Array]
# What a layer has of all tokens, x [t, D] and k [t, h, d], and what is its own, to its `Rows`.
Chooser = Callable[[Array, Array, Any, Choice], Rows]


def by_index(x: Array, k: Array, own: Indexer, choice: Choice) -> Rows:
    """The tokens that the indexer of the layer ranks highest, by keys in 8 bits."""
    del k
    if choice.by_head:
        raise InputError(
            "choice",
            got="by_head, with an indexer of the layer",
            expected="one choice for the layer",
            fix="leave by_head out, or choose by attention or page bounds",
        )
    keys = unpack_keys(*pack_keys(index_keys(own, x, jnp.arange(x.shape[0]))))

    def rows(x, q, at):
        del q
        return _top(index_scores(*index_queries(own, x, at), keys), at, choice)[None]

    return rows


def by_attention(x: Array, k: Array, own: Any, choice: Choice) -> Rows:
    """The tokens, or pages, with the most attention of all heads together: no other choice recalls
    more."""
    del x, own

    def rows(x, q, at):
        del x
        mass = attention_weights(q, k, at).mean(1)  # [h, s, t]
        mass = mass if choice.by_head else mass.mean(0, keepdims=True)
        if choice.page is None:
            return _top(mass, at, choice)
        return _top_pages(mass.reshape(*mass.shape[:2], -1, choice.page).sum(-1), at, choice)

    return rows


def by_page_bounds(x: Array, k: Array, own: Any, choice: Choice) -> Rows:
    """The pages whose keys could have the highest logits.

    Source: Quest, arXiv 2406.10774, whose heads choose for themselves. Differs from the paper:
    heads that share a choice, of a layer or with `by_head` of a group, go by the mean of a softmax
    of the bounds; the current page and those of the windows always count.
    """
    del x, own
    assert choice.page is not None
    page: int = choice.page
    t, h, d = k.shape
    n = t // page
    bounds = page_bounds(jnp.moveaxis(k.reshape(n, page, h, d), 2, 0))  # [h, n, d]

    def rows(x, q, at):
        del x
        s, _, g, _ = q.shape
        logits = page_logits(jnp.moveaxis(q, 0, 1).reshape(h, s * g, d), bounds)  # [h, s * g, n]
        logits = logits.reshape(h, s, g, n)
        if not choice.by_head:
            logits = jnp.moveaxis(logits, 0, 1).reshape(1, s, h * g, n)
        # The bounds of the page that is being filled know tokens to come; it is chosen anyway.
        whole = (jnp.arange(n) + 1) * page <= at[:, None] + 1  # [s, n]
        return _top_pages(page_scores(logits, whole[:, None]), at, choice)

    return rows


def attention_weights(q: Array, k: Array, at: Array, window: int | None = None) -> Array:
    """Exact attention `[h, g, s, t]` of queries `[s, h, g, d]` at positions `at: [s]`."""
    scores = jnp.einsum("shgd,thd->hgst", q, k, preferred_element_type=jnp.float32)
    distance = at[:, None] - jnp.arange(k.shape[0])
    seen = distance >= 0
    return masked_softmax(scores, seen if window is None else seen & (distance < window))


def _top(scores: Array, at: Array, choice: Choice) -> Array:
    chosen = choose_tokens(scores, at, choice.k, sink=choice.sink, recent=choice.recent)
    return mask_of(chosen, scores.shape[-1])


def _top_pages(scores: Array, at: Array, choice: Choice) -> Array:
    assert choice.page is not None
    page = choice.page
    sink = -(-choice.sink // page)
    recent = 1 + -(-max(choice.recent - 1, 0) // page)
    pages = choose_tokens(scores, at // page, choice.k // page, sink=sink, recent=recent)
    t = scores.shape[-1] * page
    return mask_of(tokens_of_pages(pages, page), t) & (jnp.arange(t) <= at[:, None])
