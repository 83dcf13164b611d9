"""Sequences of a cache as others: forked, taken out, put back."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from kvjax.cache.pages import pool_parts, with_table
from kvjax.cache.state import Cache
from kvjax.core.codec import Array
from kvjax.core.errors import InputError


def fork(cache: Cache, source: Array | int, target: Array | int) -> Cache:
    """Makes sequence `target` a copy of `source`, in every layer.

    In a paged cache the packed pages are shared: only the page table, the exact window and the
    counters are copied, and no page of the pool is used. That is safe, since a page is written
    once and not again while somebody reads it; each sequence then grows into pages of its own. In
    a contiguous cache the pages are copied.

    Args:
      source, target: indices on the batch axis, `[]` or `[n]`; what `target` held is forgotten,
        and pages that nobody else reads are free again. One source goes to all targets.
    Raises:
      InputError: no indices, or several sources that are not one for each target; outside jit,
        indices that it has not; sequences of devices that do not share a pool (under jit, where
        indices are not known, any of several such devices).

    Example:
      >>> import jax, kvjax
      >>> layout = kvjax.Layout(sink=0, recent=16, page=16, pool=8)
      >>> method = kvjax.methods.get("int8", head_dim=32, layout=layout)
      >>> cache = kvjax.init(method, capacity=64, kv_heads=1, head_dim=32, batch=2)
      >>> kv = jax.numpy.ones((2, 1, 32))
      >>> active = jax.numpy.array([True, False])
      >>> cache = jax.jit(kvjax.append)(method, cache, kv, kv, active=active)
      >>> int(fork(cache, 0, 1).length[0, 1])
      1
    """
    source, target = (check_rows(cache, rows) for rows in (source, target))
    if source.size not in (1, target.size):
        raise InputError(
            "fork",
            got=f"{source.size} sources for {target.size} targets",
            expected="one source, or one for each target",
            fix="give them in pairs",
        )
    if cache.page_table is None:
        return put(cache, target, take(cache, source))
    _check_same_part(cache, source, target)
    source, target = source.reshape(-1), target.reshape(-1)
    copy = lambda a: a.at[:, target].set(a[:, source])
    changed = dataclasses.replace(
        cache,
        window_key=copy(cache.window_key),
        window_value=copy(cache.window_value),
        window_positions=copy(cache.window_positions),
        length=copy(cache.length),
        packed=copy(cache.packed),
    )
    return with_table(changed, copy(cache.page_table))


def take(cache: Cache, rows: Array | int) -> Cache:
    """The cache of some of its sequences, in every layer; traced rows will do.

    Pages that come from a pool stay there and are shared: only who reads which is copied.

    Args:
      rows: `[]` or `[n]`, indices on the batch axis; one may come twice.
    Raises:
      InputError: a cache whose new pages come from a pool; no indices; outside jit, rows that it
        has not.

    Example:
      >>> import jax.numpy as jnp
      >>> import kvjax
      >>> method = kvjax.methods.get("int8", head_dim=32)
      >>> cache = kvjax.init(method, capacity=64, kv_heads=1, head_dim=32, batch=3)
      >>> take(cache, jnp.array([2, 0])).length.shape
      (1, 2)
    """
    _check_contiguous(cache)
    index = check_rows(cache, rows).reshape(-1)
    return _by_sequence(cache, lambda a: a[:, index])


def put(cache: Cache, rows: Array | int, part: Cache) -> Cache:
    """`cache` with sequences `rows` as in `part`, which was taken from it (and may have grown).

    Raises:
      InputError: as `take`.
    """
    _check_contiguous(cache)
    index = check_rows(cache, rows).reshape(-1)
    return _by_sequence(cache, lambda a, new: a.at[:, index].set(new), part)


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


def check_rows(cache: Cache, rows: Array | int) -> Array:
    """Indices `[]` or `[n]` as an array, of numpy unless they are of jax. Those that are not there
    are told where rows are known, outside jit: jax would take the nearest one, and put nothing."""
    batch = cache.length.shape[1]
    index: Array = rows if isinstance(rows, jax.Array) else np.asarray(rows)  # type: ignore
    if not index.size:
        index = index.astype(np.int32)
    if index.dtype.kind not in "iu" or index.ndim > 1:
        raise InputError(
            "rows",
            got=f"{index.dtype} of shape {index.shape}",
            expected="one index on the batch axis, or a list of them",
            fix="take whole numbers",
        )
    if isinstance(index, jax.core.Tracer) or not index.size:
        return index
    known = np.asarray(index)
    if not -batch <= known.min() <= known.max() < batch:
        raise InputError(
            "rows",
            got=known.tolist(),
            expected=f"sequences 0 to {batch - 1}",
            fix="take indices on the batch axis of this cache",
        )
    return index


def _check_same_part(cache: Cache, source: Array | int, target: Array | int) -> None:
    """Pages are shared on one device only."""
    parts = pool_parts(cache)[0]
    if parts == 1:
        return
    batch = cache.length.shape[1]
    if any(isinstance(rows, jax.core.Tracer) for rows in (source, target)):
        got = "sequences that are not known under jit"
    else:
        part = lambda rows: np.asarray(rows) % batch // (batch // parts)
        if (part(source) == part(target)).all():
            return
        got = f"sequences {np.asarray(source).tolist()} and {np.asarray(target).tolist()}"
    raise InputError(
        "fork",
        got=got,
        expected=f"both in one of the {parts} parts of {batch // parts} that share a pool",
        fix="name such sequences outside jit, or read the prefix again",
    )


def _check_contiguous(cache: Cache) -> None:
    if cache.page_table is not None:
        raise InputError(
            "cache",
            got="pages in a pool that sequences grow into",
            expected="pages of each sequence's own",
            fix="use fork, or a layout without a pool",
        )
