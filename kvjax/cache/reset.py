"""Sequences that have ended, emptied for others: their pages go back to the pool."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from kvjax.cache.fork import check_rows
from kvjax.cache.pages import with_table
from kvjax.cache.state import Cache
from kvjax.core.codec import Array
from kvjax.core.errors import InputError


def reset(cache: Cache, rows: Array | int) -> Cache:
    """Empties sequences, in every layer: they are as `init` makes them, and can be filled again.

    With a shared pool nothing but windows, table and counters is touched, and pages that nobody
    else reads are free again. Contiguous pages are cleared (they might hold NaN): with indices
    those of these sequences, with a mask all pages pass through memory once. To be jitted with the
    cache donated; then all is done in place.

    Args:
      rows: indices on the batch axis, `[]` or `[n]`, or a mask `[b]` bool.
    Raises:
      InputError: outside jit, indices that it has not; no indices; a mask of another
        length; a cache of what a policy kept, whose pages were measured for that history.

    Example:
      >>> import jax, kvjax
      >>> method = kvjax.methods.get("int8", head_dim=32, layout=kvjax.Layout(pool=8))
      >>> cache = kvjax.init(method, capacity=512, kv_heads=1, head_dim=32, batch=2)
      >>> kv = jax.numpy.ones((2, 200, 1, 32))
      >>> _, cache = jax.jit(kvjax.prefill)(method, cache, kv, kv)
      >>> int((cache.page_readers == 0).sum())
      4
      >>> cache = reset(cache, 1)
      >>> cache.length.tolist(), int((cache.page_readers == 0).sum())
      ([[200, 0]], 6)
    """
    if cache.kept is not None:
        raise InputError(
            "cache",
            got="what a policy kept of a history",
            expected="a cache without an eviction",
            fix="evict the next history into a cache of its own",
        )
    batch = cache.length.shape[1]
    ended = jnp.asarray(rows)
    if ended.dtype != bool:
        index = check_rows(cache, rows)
        clear = lambda a, empty: a.at[:, index].set(jnp.asarray(empty, a.dtype))
    elif ended.shape == (batch,):
        mask = lambda a: ended.reshape(1, batch, *[1] * (a.ndim - 2))
        clear = lambda a, empty: jnp.where(mask(a), jnp.asarray(empty, a.dtype), a)
    else:
        raise InputError(
            "rows",
            got=f"a mask of shape {ended.shape}",
            expected=f"({batch},), one for each sequence",
            fix="use indices, or a mask over the batch",
        )
    changed = dataclasses.replace(
        cache,
        window_key=clear(cache.window_key, 0),
        window_value=clear(cache.window_value, 0),
        window_positions=clear(cache.window_positions, -1),
        length=clear(cache.length, 0),
        packed=clear(cache.packed, 0),
    )
    if cache.page_table is not None:
        return with_table(changed, clear(cache.page_table, -1))
    pages = (cache.key_pages, cache.value_pages)
    key, value = jax.tree.map(lambda a: clear(a, 0), pages)
    starts = clear(cache.page_starts, -1)
    return dataclasses.replace(changed, key_pages=key, value_pages=value, page_starts=starts)
