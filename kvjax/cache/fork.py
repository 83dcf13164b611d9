"""Sequences of a cache as others: forked, taken out, put back."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.cache.state import Cache
from kvjax.core.codec import Array
from kvjax.core.errors import InputError


def fork(cache: Cache, source: Array | int, target: Array | int) -> Cache:
    """Makes sequence `target` a copy of `source`, in every layer.

    In a paged cache the packed pages are shared: only the page table, the exact window and the
    counters are copied, and no page of the pool is used. That is safe, since a page is written
    once and never again; each sequence then grows into pages of its own. In a contiguous cache
    the pages are copied.

    Args:
      source, target: indices on the batch axis; what `target` held is forgotten.
    Raises:
      InputError: outside jit, indices that it has not.

    Example:
      >>> import jax, kvjax
      >>> layout = kvjax.Layout(sink=0, recent=16, page=16, pool=8)
      >>> method = kvjax.methods.get("int8", head_dim=32, layout=layout)
      >>> cache = kvjax.init(method, capacity=64, kv_heads=1, head_dim=32, batch=2)
      >>> kv = jax.numpy.ones((2, 1, 32))
      >>> for _ in range(40):
      ...     cache = kvjax.append(method, cache, kv, kv, active=jax.numpy.array([True, False]))
      >>> int(fork(cache, 0, 1).length[0, 1])
      40
    """
    _check_rows(cache, source, target)
    copy = lambda a: a.at[:, target].set(a[:, source])
    if cache.kept is not None:
        return put(cache, jnp.atleast_1d(target), take(cache, jnp.atleast_1d(source)))
    shared = cache.page_table is not None
    pages = (
        {}
        if shared
        else {
            "key_pages": jax.tree.map(copy, cache.key_pages),
            "value_pages": jax.tree.map(copy, cache.value_pages),
            "page_starts": copy(cache.page_starts),
        }
    )
    return dataclasses.replace(
        cache,
        window_key=copy(cache.window_key),
        window_value=copy(cache.window_value),
        window_positions=copy(cache.window_positions),
        page_table=copy(cache.page_table) if shared else None,
        length=copy(cache.length),
        packed=copy(cache.packed),
        **pages,
    )


def take(cache: Cache, rows: Array) -> Cache:
    """The cache of some of its sequences, in every layer; traced rows will do.

    Pages that come from a pool stay there and are shared: only who reads which is copied.

    Args:
      rows: `[n]` int32, indices on the batch axis; one may come twice.
    Raises:
      InputError: a cache whose new pages come from a pool; outside jit, rows that it has not.

    Example:
      >>> import kvjax
      >>> method = kvjax.methods.get("int8", head_dim=32)
      >>> cache = kvjax.init(method, capacity=64, kv_heads=1, head_dim=32, batch=3)
      >>> take(cache, jnp.array([2, 0])).length.shape
      (1, 2)
    """
    _check_contiguous(cache)
    _check_rows(cache, rows)
    return _by_sequence(cache, lambda a: a[:, rows])


def put(cache: Cache, rows: Array, part: Cache) -> Cache:
    """`cache` with sequences `rows` as in `part`, which was taken from it (and may have grown).

    Raises:
      InputError: as `take`.
    """
    _check_contiguous(cache)
    _check_rows(cache, rows)
    return _by_sequence(cache, lambda a, new: a.at[:, rows].set(new), part)


def _by_sequence(cache: Cache, change, *others: Cache) -> Cache:
    """`change` on every leaf that leads with `[l, b]`; leaves of pools and layers as they are."""
    kept, parts = cache.kept, [other.kept for other in others]
    changed = jax.tree.map(change, *(dataclasses.replace(c, kept=None) for c in (cache, *others)))
    if kept is None:
        return changed
    fields = ["most"] + ([] if kept.table is None else ["table"])
    fields += ["key", "value", "positions", "bias"] if kept.table is None else []
    new = {
        name: jax.tree.map(change, getattr(kept, name), *(getattr(p, name) for p in parts))
        for name in fields
    }
    return dataclasses.replace(changed, kept=dataclasses.replace(kept, **new))


def _check_rows(cache: Cache, *rows: Array | int) -> None:
    """Where rows are known, outside jit: jax would take the nearest one, and put nothing."""
    batch = cache.length.shape[1]
    for index in rows:
        if isinstance(index, jax.core.Tracer):
            continue
        known = np.asarray(index)
        if known.size and not -batch <= known.min() <= known.max() < batch:
            raise InputError(
                "rows",
                got=known.tolist(),
                expected=f"sequences 0 to {batch - 1}",
                fix="take indices on the batch axis of this cache",
            )


def _check_contiguous(cache: Cache) -> None:
    if cache.page_table is not None:
        raise InputError(
            "cache",
            got="pages in a pool that sequences grow into",
            expected="pages of each sequence's own",
            fix="use fork, or a layout without a pool",
        )
