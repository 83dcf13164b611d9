"""One sequence as the continuation of another: shared prefixes in a paged cache."""

from __future__ import annotations

import dataclasses

import jax

from kvjax.cache.state import Cache
from kvjax.core.codec import Array


def fork(cache: Cache, source: Array | int, target: Array | int) -> Cache:
    """Makes sequence `target` a copy of `source`, in every layer.

    In a paged cache the packed pages are shared: only the page table, the exact window and the
    counters are copied, and no page of the pool is used. That is safe, since a page is written
    once and never again; each sequence then grows into pages of its own. In a contiguous cache
    the pages are copied.

    Args:
      source, target: indices on the batch axis; what `target` held is forgotten.

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
    copy = lambda a: a.at[:, target].set(a[:, source])
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
