"""Attention over the chosen tokens of a packed cache: only the pages that hold one are read."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kvjax.attention.page_scan import Chunk, page_scan
from kvjax.cache.attend import CHUNK_TOKENS, in_reach
from kvjax.cache.pages import overflow, page_slots
from kvjax.cache.shapes import check_shapes
from kvjax.cache.state import Cache
from kvjax.codecs import View
from kvjax.core.codec import Array
from kvjax.core.errors import InputError
from kvjax.core.layout import Layout
from kvjax.core.method import Method
from kvjax.core.partial import Partial, dense_partial


class ChosenPages(NamedTuple):
    """The page slots that hold a chosen token, of each sequence.

    Attributes:
      slots: `[b, m]` int32, rising, then -1. m is the number of chosen tokens, or of slots if that
        is less.
      wanted: `[b, m, p]` bool, which tokens of these pages are chosen.
      used: `[b]`, how many there are.
    """

    slots: Array
    wanted: Array
    used: Array


def attend_chosen(
    method: Method,
    cache: Cache,
    q: Array,
    chosen: Array,
    *,
    layer: Array | int = 0,
    scale: float | None = None,
) -> Array:
    """Attention of one new query per sequence over sink, recent window and chosen packed tokens.

    What the cache keeps exact is always attended to, chosen or not. With all tokens chosen it is
    `cache.attend`. The codes read are those of the pages with a chosen token: at most one page per
    chosen token, however long the history.

    Args:
      q: `[b, h, g, d]`; its token is the last one appended.
      chosen: `[b, k]` int32 positions in any order, -1 for none; one choice for all heads.
      layer: index on the layer axis of the cache.
      scale: factor on the logits; None is `d ** -0.5`.
    Returns:
      `[b, h, g, d]` in q's dtype. NaN for a sequence that outgrew the capacity.
    Raises:
      InputError: shapes that differ from the cache's; a cache whose history a policy has thinned.

    Example:
      >>> import jax, jax.numpy as jnp, kvjax
      >>> method = kvjax.methods.get("int8", head_dim=64)
      >>> cache = kvjax.init(method, capacity=256, kv_heads=2, head_dim=64)
      >>> kv = jax.random.normal(jax.random.key(0), (1, 2, 64))
      >>> cache = jax.jit(kvjax.append)(method, cache, kv, kv)
      >>> jax.jit(attend_chosen)(method, cache, kv[:, :, None], jnp.array([[0, -1]])).shape
      (1, 2, 1, 64)
    """
    check_shapes(cache, layer, q=q)
    _check_choice(cache, chosen)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    queries = q.astype(jnp.float32) * scale
    layout = method.layout
    position = cache.length[layer] - 1  # [b]
    boundary = layout.sink + layout.page * cache.packed[layer]  # [b]

    k, v = cache.window_key[layer], cache.window_value[layer]
    at = cache.window_positions[layer]  # [b, w]
    exact = (at < layout.sink) | (at >= boundary[:, None])
    exact &= (at >= 0) & in_reach(at, position[:, None], cache.window)
    view = method.value if isinstance(method.value, View) else None
    if view is not None:  # as in `cache.attend`: values are read in the keys
        method, v = dataclasses.replace(method, value=view.through(method.key)), k

    pages = chosen_pages(layout, cache, chosen, layer)
    packed = _packed(method, cache, queries, layer, position, boundary, pages)
    if cache.axis is not None:
        packed = packed.merge_axis(cache.axis)
    seen = dense_partial(queries, k, v, exact[:, None, None]).merge(packed)
    out = seen.out if view is None else view.of_key(seen.out)
    bad = overflow(cache, layer)[:, None, None, None]
    return jnp.where(bad, jnp.nan, out).astype(q.dtype)


def chosen_pages(layout: Layout, cache: Cache, chosen: Array, layer: Array | int) -> ChosenPages:
    """Where the chosen tokens `[b, k]` are: the slots of their pages, each once.

    Tokens that are not packed, or on another device, are left out. Nothing here is as long as the
    history.
    """
    b, k = chosen.shape
    n, p = page_slots(cache), layout.page
    m = min(k, n)
    number = (chosen - layout.sink) // p
    here = (chosen >= layout.sink) & (number < cache.packed[layer][:, None])
    if cache.shards > 1:
        here &= number % cache.shards == jax.lax.axis_index(cache.axis)
    # Slots of a sliding window are used in turn: a page that was overwritten is gone.
    slot = number // cache.shards % n
    start = _starts(cache, layer, jnp.where(here, slot, 0))
    here &= start == layout.sink + number * p
    place = jnp.where(here, slot * p + (chosen - layout.sink) % p, n * p)
    place = jnp.sort(place, -1)  # tokens of a page lie together, those that are not here last
    real = place < n * p
    slot = place // p
    new = real & (slot != jnp.pad(slot, ((0, 0), (1, 0)), constant_values=-1)[:, :-1])
    rank = jnp.cumsum(new, -1) - 1  # [b, k]
    rows = jnp.arange(b)[:, None]
    slots = jnp.full((b, m), -1, jnp.int32)
    slots = slots.at[rows, jnp.where(new, rank, m)].set(slot.astype(jnp.int32), mode="drop")
    wanted = jnp.zeros((b, m, p), bool)
    wanted = wanted.at[rows, jnp.where(real, rank, m), place % p].set(True, mode="drop")
    return ChosenPages(slots, wanted, new.sum(-1))


def _packed(method, cache, q, layer, position, boundary, pages: ChosenPages) -> Partial:
    page = method.layout.page
    m = pages.slots.shape[1]
    together = max(1, min(m, CHUNK_TOKENS // page))
    pad = ((0, 0), (0, -m % together))
    slots = jnp.pad(pages.slots, pad, constant_values=-1)
    wanted = jnp.pad(pages.wanted, (*pad, (0, 0)))

    def read(i):
        take = lambda a: jax.lax.dynamic_slice_in_dim(a, i * together, together, 1)
        own = take(slots)  # [b, c]
        key, value = _gather(cache, layer, own)
        starts = jnp.where(own >= 0, _starts(cache, layer, own), -1)
        positions = starts[..., None] + jnp.arange(page)
        positions = jnp.where(take(wanted), positions, -1)[:, None]  # [b, 1, c, p]
        if isinstance(method.value, View):
            value = method.value.of_code(key)
        return Chunk(key, value, positions)

    def visible(positions):  # [b, 1, c, p] -> [b, 1, c, 1, p]
        at = positions[..., None, :]
        row, edge = (a[:, None, None, None, None] for a in (position, boundary))
        return (at >= 0) & (at < edge) & in_reach(at, row, cache.window)

    chunks = -(-pages.used.max() // together)
    return page_scan(method.key, method.value, read, chunks, q, visible)


def _gather(cache: Cache, layer: Array | int, slots: Array):
    """Codes of page slots `[b, c]`, leaves `[b, h, c, ...]`; zeros where the slot is -1."""
    if cache.page_table is None:
        rows = jnp.arange(slots.shape[0])[:, None]
        index = jnp.where(slots >= 0, slots, page_slots(cache))
        take = lambda a: a.at[layer, rows, :, index].get(mode="fill", fill_value=0)
    else:
        ids = _entries(cache, layer, slots)
        index = jnp.where(ids >= 0, ids, cache.page_starts.shape[1])
        take = lambda a: a.at[layer, index].get(mode="fill", fill_value=0)
    pages = (cache.key_pages, cache.value_pages)
    return jax.tree.map(lambda a: take(a).swapaxes(1, 2), pages)  # [b, c, h, ...] before


def _starts(cache: Cache, layer: Array | int, slots: Array) -> Array:
    """Position of the first token of page slots `[b, c]`, -1 where there is no page."""
    if cache.page_table is None:
        return jnp.take_along_axis(cache.page_starts[layer], slots, 1)
    ids = _entries(cache, layer, slots)
    ids = jnp.where(ids >= 0, ids, cache.page_starts.shape[1])
    return cache.page_starts.at[layer, ids].get(mode="fill", fill_value=-1)


def _entries(cache: Cache, layer: Array | int, slots: Array) -> Array:
    assert cache.page_table is not None
    ids = jnp.take_along_axis(cache.page_table[layer], jnp.maximum(slots, 0), 1)
    return jnp.where(slots >= 0, ids, -1)


def _check_choice(cache: Cache, chosen: Array) -> None:
    b = cache.length.shape[1]
    fits = chosen.ndim == 2 and chosen.shape[0] == b and chosen.shape[1] > 0
    if not fits or not jnp.issubdtype(chosen.dtype, jnp.integer):
        raise InputError(
            "chosen",
            got=f"{chosen.dtype} of shape {chosen.shape}",
            expected=f"integers of shape ({b}, k), k of 1 or more: positions for each sequence",
            fix="choose with `choose_tokens`",
        )
    if cache.kept is not None:
        raise InputError(
            "cache",
            got="a history that a policy has thinned",
            expected="one with all its tokens, alike in all heads",
            fix="use `kvjax.attend`, or do not evict what is to be chosen from",
        )
