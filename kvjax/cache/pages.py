"""Reading and writing page slots, contiguous or through a page table, at one layer of the stack."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from kvjax.cache.state import Cache
from kvjax.core.codec import Array, Code
from kvjax.core.pytree import pytree


@pytree
class Chunk:
    """Some pages of every sequence: code leaves `[b, h, c, ...]`, starts `[b, c]` (-1 hides)."""

    key: Code
    value: Code
    starts: Array


def read_chunk(cache: Cache, layer: Array | int, first: Array, count: int) -> Chunk:
    """Page slots `first .. first + count - 1`; where that runs over the end, the last `count`
    slots, with those before `first` hidden."""
    n = page_slots(cache)
    begin = jnp.minimum(first, n - count)
    fresh = begin + jnp.arange(count) >= first  # [c]
    if cache.page_table is None:
        take = lambda a: _slice(a, (layer, 0, 0, begin), (None, None, None, count))[0]
        starts = _slice(cache.page_starts, (layer, 0, begin), (None, None, count))[0]
    else:
        ids = _slice(cache.page_table, (layer, 0, begin), (None, None, count))[0]  # [b, c]
        at = jnp.maximum(ids, 0)
        take = lambda a: a[layer, at].swapaxes(1, 2)  # [b, c, h, ...] -> [b, h, c, ...]
        starts = jnp.where(ids >= 0, cache.page_starts[layer, at], -1)
    key, value = jax.tree.map(take, (cache.key_pages, cache.value_pages))
    return Chunk(key, value, jnp.where(fresh, starts, -1))


def write_page(
    cache: Cache, layer: Array | int, row: Array | int, code: tuple[Code, Code], due: Array
) -> Cache:
    """Puts the next page of sequence `row` in its slot, where `due`; else leaves all as it is.

    Args:
      code: key and value codes of the page, leaves `[h, ...]`.
      due: bool scalar.
    """
    page_index = cache.packed[layer, row]
    slot = page_index % page_slots(cache)
    page = _page_tokens(cache, page_index)
    if cache.page_table is None:
        where = (layer, row, 0, slot)
        put = lambda a, c: _update(a, c[None, None, :, None], where, due)
        starts = _update(cache.page_starts, page[None, None, None], (layer, row, slot), due)
        table, used = None, None
    else:
        fresh = jnp.minimum(cache.pool_used[layer], cache.page_starts.shape[1] - 1)
        put = lambda a, c: _update(a, c[None, None], (layer, fresh), due)
        starts = _update(cache.page_starts, page[None, None], (layer, fresh), due)
        table = _update(cache.page_table, fresh[None, None, None], (layer, row, slot), due)
        used = cache.pool_used.at[layer].add(due.astype(jnp.int32))
    key, value = jax.tree.map(put, (cache.key_pages, cache.value_pages), code)
    return _replace(
        cache,
        key_pages=key,
        value_pages=value,
        page_starts=starts,
        page_table=table,
        pool_used=used,
        packed=cache.packed.at[layer, row].add(due.astype(jnp.int32)),
    )


def page_slots(cache: Cache) -> int:
    """Page slots of one sequence."""
    table = cache.page_starts if cache.page_table is None else cache.page_table
    return table.shape[-1]


def _page_tokens(cache: Cache, page_index: Array) -> Array:
    raise NotImplementedError


def _slice(a: Array, start: tuple, size: tuple) -> Array:
    """`dynamic_slice` from `start`: one element of the layer axis, `size` of the next (None: all)."""
    start = [*start, *[0] * (a.ndim - len(start))]
    size = [1, *[a.shape[i] if i >= len(size) or size[i] is None else size[i] for i in range(1, a.ndim)]]
    return jax.lax.dynamic_slice(a, start, size)


def _update(a: Array, value: Array, start: tuple, due: Array) -> Array:
    start = [*start, *[0] * (a.ndim - len(start))]
    value = value.reshape(*value.shape, *[1] * (a.ndim - value.ndim)).astype(a.dtype)
    old = jax.lax.dynamic_slice(a, start, value.shape)
    return jax.lax.dynamic_update_slice(a, jnp.where(due, value, old), start)


def _replace(cache: Cache, **changes: Any) -> Cache:
    import dataclasses

    return dataclasses.replace(cache, **changes)
