"""Reading and writing page slots, contiguous or through a page table, at one layer of the stack."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.cache.state import Cache
from kvjax.core.codec import Array, Code
from kvjax.core.pytree import pytree

LOST = -2  # in the page table: a page was wanted, and none was free


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
        # Zeros where there is no page: another's may hold NaN, which a weight of 0 does not hide.
        at = jnp.where(ids >= 0, ids, cache.page_starts.shape[1])
        read = lambda a, fill: a.at[layer, at].get(mode="fill", fill_value=fill)
        take = lambda a: read(a, 0).swapaxes(1, 2)  # [b, c, h, ...] -> [b, h, c, ...]
        starts = read(cache.page_starts, -1)
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
    packed = cache.packed.at[layer, row].add(due.astype(jnp.int32))
    cache = dataclasses.replace(cache, packed=packed)
    if cache.page_table is None:
        put = lambda a, c: _update(a, c[None, None, :, None], (layer, row, 0, slot), due_here)
        starts = _update(cache.page_starts, start[None, None, None], (layer, row, slot), due_here)
    else:
        cache, own, found = _take_page(cache, layer, row, slot, due_here)
        put = lambda a, c: _update(a, c[None, None], (layer, own), found)
        starts = _update(cache.page_starts, start[None, None], (layer, own), found)
    key, value = jax.tree.map(put, (cache.key_pages, cache.value_pages), code)
    return dataclasses.replace(cache, key_pages=key, value_pages=value, page_starts=starts)


def _take_page(
    cache: Cache, layer: Array | int, row: Array | int, slot: Array, due: Array
) -> tuple[Cache, Array, Array]:
    """The first free page of the pool for a slot of a sequence, which lets go of the one before.

    Where none is free the slot is marked as lost, and so are all that the sequence would fill
    later on this device: what others give back is for those that can still be read.

    Returns:
      The cache, the page, and whether there is one.
    """
    assert cache.page_table is not None
    assert cache.page_readers is not None
    pool = cache.page_readers.shape[1]
    entries = cache.page_table[layer, row]
    old = jnp.where(due & (entries[slot] >= 0), entries[slot], pool)
    readers = cache.page_readers.at[layer, old].add(-1, mode="drop")
    unread = readers.at[layer, old].get(mode="fill", fill_value=1) == 0
    starts = cache.page_starts.at[layer, jnp.where(unread, old, pool)].set(-1, mode="drop")
    free = readers[layer] == 0
    page = free.argmax().astype(jnp.int32)
    found = due & free.any() & ~(entries == LOST).any()
    name = jnp.where(found, page, LOST)[None, None, None]
    changed = dataclasses.replace(
        cache,
        page_starts=starts,
        page_table=_update(cache.page_table, name, (layer, row, slot), due),
        page_readers=readers.at[layer, page].add(found.astype(jnp.int32)),
    )
    return changed, page, found


def with_table(cache: Cache, table: Array) -> Cache:
    """A cache with a pool whose sequences read other pages: those that nobody reads are free."""
    assert cache.page_readers is not None
    layers, pool = cache.page_readers.shape
    index = jnp.where(table >= 0, table + first_pages(cache), pool).reshape(layers, -1)
    rows = jnp.arange(layers)[:, None]
    none = cache.page_readers.at[:].set(0)  # not zeros: a buffer that is given away is to be used
    readers = none.at[rows, index].add(1, mode="drop")
    starts = jnp.where(readers > 0, cache.page_starts, -1)
    return dataclasses.replace(cache, page_table=table, page_readers=readers, page_starts=starts)


def first_pages(cache: Cache) -> np.ndarray:
    """Where in the pool the part begins that an entry of the page table counts in, `[b, n]`."""
    assert cache.page_table is not None
    _, b, n = cache.page_table.shape
    data, shards = pool_parts(cache)
    part = np.arange(b)[:, None] // (b // data) * shards + np.arange(n) // (n // shards)
    return (part * (cache.pool_part or 0)).astype(np.int32)


def pool_parts(cache: Cache) -> tuple[int, int]:
    """In how many parts the pool is, over sequences and over shards: one of each on a device of
    its own, that is inside a `shard_map`."""
    if cache.pool_part is None or cache.page_readers is None:
        return 1, 1
    if cache.page_readers.shape[1] == cache.pool_part:
        return 1, 1
    return cache.page_readers.shape[1] // (cache.pool_part * cache.shards), cache.shards


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
    """Which sequences have outgrown the cache, or lost a page for want of a free one, `[b]` bool:
    their attention reads as NaN."""
    over = cache.length[layer] > cache.most_tokens(layer)
    if cache.page_table is not None:
        lost = (cache.page_table[layer] == LOST).any(-1)
        if cache.shards > 1:  # only the device that had none knows
            lost = jax.lax.psum(lost.astype(jnp.int32), cache.axis) > 0
        over |= lost
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
