"""Reading and writing page slots, contiguous or through a page table, at one layer of the stack."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from kvjax.cache.state import Cache
from kvjax.core.codec import Array, Code
from kvjax.core.pytree import pytree


@pytree
class Chunk:
    """Some page slots of every sequence.

    Attributes:
      key, value: codes, leaves `[b, h, c, ...]`.
      starts: `[b, c]` int32, position of each page's first token, -1 where the slot is to be
        skipped.
    """

    key: Code
    value: Code
    starts: Array


def read_chunk(cache: Cache, layer: Array | int, first: Array | int, count: int) -> Chunk:
    """Slots `first .. first + count - 1`. Where that runs over the end, the last `count` slots,
    with those before `first` marked to be skipped (they were read before)."""
    begin = jnp.minimum(first, page_slots(cache) - count)
    if cache.page_table is None:
        take = lambda a: _slice(a, (layer, 0, 0, begin), {3: count})[0]
        starts = _slice(cache.page_starts, (layer, 0, begin), {2: count})[0]
    else:
        ids = _slice(cache.page_table, (layer, 0, begin), {2: count})[0]  # [b, c]
        at = jnp.maximum(ids, 0)
        take = lambda a: a[layer, at].swapaxes(1, 2)  # [b, c, h, ...] -> [b, h, c, ...]
        starts = jnp.where(ids >= 0, cache.page_starts[layer, at], -1)
    key, value = jax.tree.map(take, (cache.key_pages, cache.value_pages))
    unread = begin + jnp.arange(count) >= first
    return Chunk(key, value, jnp.where(unread, starts, -1))


def write_page(
    cache: Cache,
    layer: Array | int,
    row: Array | int,
    code: tuple[Code, Code],
    start: Array,
    due: Array,
) -> Cache:
    """Puts a page of sequence `row` in its next slot where `due`; else leaves all as it is.

    The old content is read and written back rather than kept by a branch around the whole cache:
    so the buffers stay where they are.

    Args:
      code: key and value codes of the page, leaves `[h, ...]`.
      start: position of the page's first token. due: bool scalar.
    """
    page = cache.packed[layer, row]
    if cache.shards > 1:  # everyone encodes, the owner keeps
        due_here = due & (page % cache.shards == jax.lax.axis_index(cache.axis))
    else:
        due_here = due
    slot = page // cache.shards % page_slots(cache)
    changes: dict[str, Any] = {"packed": cache.packed.at[layer, row].add(due.astype(jnp.int32))}
    if cache.page_table is None or cache.pool_used is None:
        put = lambda a, c: _update(a, c[None, None, :, None], (layer, row, 0, slot), due_here)
        changes["page_starts"] = _update(
            cache.page_starts, start[None, None, None], (layer, row, slot), due_here
        )
    else:  # the next free page of the pool; running out is seen by `overflow`, never hidden
        free = cache.pool_used[layer]
        put = lambda a, c: _update(a, c[None, None], (layer, free), due)
        changes["page_starts"] = _update(cache.page_starts, start[None, None], (layer, free), due)
        changes["page_table"] = _update(
            cache.page_table, free[None, None, None], (layer, row, slot), due
        )
        changes["pool_used"] = cache.pool_used.at[layer].add(due.astype(jnp.int32))
    key, value = jax.tree.map(put, (cache.key_pages, cache.value_pages), code)
    return dataclasses.replace(cache, key_pages=key, value_pages=value, **changes)


def page_slots(cache: Cache) -> int:
    """Page slots of one sequence; those on this device, inside a `shard_map`."""
    table = cache.page_starts if cache.page_table is None else cache.page_table
    return table.shape[-1]


def pages_here(cache: Cache, layer: Array | int) -> Array:
    """Page slots in use, of the longest sequence: all come before those that are not."""
    return row_pages_here(cache, layer).max()


def row_pages_here(cache: Cache, layer: Array | int) -> Array:
    """Page slots in use by each sequence, `[b]`."""
    packed = cache.packed[layer]
    if cache.shards > 1:
        packed = (packed + cache.shards - 1 - jax.lax.axis_index(cache.axis)) // cache.shards
    return jnp.minimum(packed, page_slots(cache))


def overflow(cache: Cache, layer: Array | int) -> Array:
    """Which sequences have outgrown the cache, `[b]` bool: their attention reads as NaN."""
    over = cache.length[layer] > cache.most_tokens(layer)
    if cache.pool_used is not None:
        over |= cache.pool_used[layer] > cache.page_starts.shape[1]
    return over


def _slice(a: Array, start: tuple, sizes: dict[int, int]) -> Array:
    """`dynamic_slice` of one layer: whole axes but for `sizes`."""
    size = [1, *(sizes.get(i, a.shape[i]) for i in range(1, a.ndim))]
    return jax.lax.dynamic_slice(a, _starts(a, start), size)


def _update(a: Array, value: Array, start: tuple, due: Array) -> Array:
    old = jax.lax.dynamic_slice(a, _starts(a, start), value.shape)
    new = jnp.where(due, value.astype(a.dtype), old)
    return jax.lax.dynamic_update_slice(a, new, _starts(a, start))


def _starts(a: Array, start: tuple) -> list[Array]:
    return [jnp.asarray(s, jnp.int32) for s in (*start, *[0] * (a.ndim - len(start)))]
