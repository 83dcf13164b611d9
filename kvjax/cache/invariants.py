"""What holds of every sound cache, checked on the host."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from kvjax.cache.pages import LOST, first_pages
from kvjax.cache.state import Cache
from kvjax.cache.update import slot_positions
from kvjax.core.errors import InputError
from kvjax.core.method import Method


def invariants(method: Method, cache: Cache) -> list[str]:
    """What is broken in a cache, one line each; nothing if it is sound.

    For tests and long runs: it copies the counters and tables, not the codes. What is checked:

    - a sequence has packed as many pages as its length allows;
    - window slots hold the positions that `length` tokens leave there;
    - page slots are in use, and start where they should, just as far as pages are packed (after
      an eviction slots may also be empty, of windows and of pages);
    - each page of a pool has as many readers as entries of the page table name it, and those that
      nobody reads have no start.

    Args:
      cache: of one device, or of a mesh as a whole.
    Raises:
      InputError: the part of a device, inside a `shard_map`.

    Example:
      >>> import kvjax
      >>> method = kvjax.methods.get("int8", head_dim=32)
      >>> invariants(method, kvjax.init(method, capacity=64, kv_heads=1, head_dim=32))
      []
    """
    if cache.page_readers is not None and cache.page_readers.shape[1] < (cache.pool_part or 0):
        raise InputError(
            "cache",
            got="the part of one device",
            expected="a whole cache",
            fix="call it outside of `shard_map`",
        )
    return [
        f"layer {layer}: {line}"
        for layer in range(cache.length.shape[0])
        for check in (_windows, _page_slots, _readers)
        for line in check(method, cache, layer)
    ]


def _windows(method: Method, cache: Cache, layer: int) -> Iterator[str]:
    length, packed = np.asarray(cache.length[layer]), np.asarray(cache.packed[layer])
    for row in np.flatnonzero(packed != method.layout.packed_pages(length)):
        yield f"sequence {row} has packed {packed[row]} pages at length {length[row]}"
    held = np.asarray(cache.window_positions[layer])
    wrong = held != np.asarray(slot_positions(method.layout, cache, cache.length[layer]))
    if cache.kept is not None:
        wrong &= held >= 0
    for row in np.flatnonzero(wrong.any(1)):
        yield f"sequence {row} has other positions in its window than length {length[row]} leaves"


def _page_slots(method: Method, cache: Cache, layer: int) -> Iterator[str]:
    """Against where `write_page` puts pages."""
    layout, packed = method.layout, np.asarray(cache.packed[layer])
    starts = np.asarray(cache.page_starts[layer])
    table = None if cache.page_table is None else np.asarray(cache.page_table[layer])
    slots = (starts if table is None else table).shape[1] // cache.shards  # of a device
    if table is not None:
        at = np.where(table < 0, 0, table + first_pages(cache))
        if at.max() >= len(starts):
            yield f"the page table names page {at.max()} of {len(starts)}"
            return
        starts = np.where(table < 0, table, starts[at])
    want = np.full(starts.shape, -1)
    for row, count in enumerate(packed):
        page = np.arange(max(0, count - slots * cache.shards), count)
        place = page % cache.shards * slots + page // cache.shards % slots
        want[row, place] = layout.sink + layout.page * page
    wrong = (starts != want) & ~((starts == LOST) & (want >= 0))
    if cache.kept is not None:
        wrong &= starts >= 0
    for row, slot in np.argwhere(wrong):
        yield f"slot {slot} of sequence {row} starts at {starts[row, slot]}, not {want[row, slot]}"


def _readers(method: Method, cache: Cache, layer: int) -> Iterator[str]:
    del method
    if cache.page_table is None or cache.page_readers is None:
        return
    table, readers = np.asarray(cache.page_table[layer]), np.asarray(cache.page_readers[layer])
    at = (table + first_pages(cache))[table >= 0]
    named = np.bincount(at, minlength=len(readers))[: len(readers)]
    for page in np.flatnonzero(named != readers):
        yield f"page {page} counts {readers[page]} readers, and {named[page]} name it"
    starts = np.asarray(cache.page_starts[layer])
    for page in np.flatnonzero((readers == 0) & (starts >= 0)):
        yield f"page {page} is free and starts at {starts[page]}"
