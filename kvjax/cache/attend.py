"""Reading the cache: exact softmax over sink, recent window and packed pages."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from kvjax.attention.packed_kernel import attend_pages, backend
from kvjax.attention.page_scan import Chunk, page_scan
from kvjax.cache.kept import attend_kept
from kvjax.cache.pages import overflow, page_slots, pages_here, read_chunk, row_pages_here
from kvjax.cache.shapes import check_shapes
from kvjax.cache.state import Cache
from kvjax.codecs import View
from kvjax.core.codec import Array
from kvjax.core.method import Method
from kvjax.core.partial import Partial, dense_partial

CHUNK_TOKENS = 512  # tokens unpacked at a time by the page scan


def attend(
    method: Method,
    cache: Cache,
    q: Array,
    *,
    layer: Array | int = 0,
    scale: float | None = None,
) -> Array:
    """Attention of one new query per sequence over all that has been appended.

    Args:
      q: `[b, h, g, d]`, g query heads per KV head; its token is the last one appended.
      layer: index on the layer axis of the cache.
      scale: factor on the logits; None is `d ** -0.5`.
    Returns:
      `[b, h, g, d]` in q's dtype. NaN for a sequence that outgrew the capacity; zeros for one that
      holds nothing.

    Example:
      >>> import jax, kvjax
      >>> method = kvjax.methods.get("int8", head_dim=64)
      >>> cache = kvjax.init(method, capacity=256, kv_heads=2, head_dim=64)
      >>> kv = jax.random.normal(jax.random.key(0), (1, 2, 64))
      >>> cache = jax.jit(kvjax.append)(method, cache, kv, kv)
      >>> kvjax.attend(method, cache, kv[:, :, None]).shape
      (1, 2, 1, 64)
    """
    check_shapes(cache, layer, q=q)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    position = cache.length[layer] - 1  # [b]
    boundary = method.layout.sink + method.layout.page * cache.packed[layer]
    out = attend_rows(
        method,
        cache,
        q.astype(jnp.float32) * scale,
        layer,
        position=position[:, None].repeat(q.shape[2], 1),
        boundary=boundary[:, None].repeat(q.shape[2], 1),
        exact=(cache.window_key[layer], cache.window_value[layer], cache.window_positions[layer]),
        kernel=backend(method, group=q.shape[2]),
    )
    return out.astype(q.dtype)


def attend_rows(
    method: Method,
    cache: Cache,
    q: Array,
    layer: Array | int,
    *,
    position: Array,
    boundary: Array,
    exact: tuple[Array, Array, Array],
    kernel: str | None = None,
) -> Array:
    """Attention of any rows, each with its own position and its own view of what is packed.

    Args:
      q: `[b, h, r, d]` float32, scaled.
      position, boundary: `[b, r]`; a row sees tokens up to its position, packed ones from the sink
        up to its boundary and exact ones elsewhere.
      exact: keys and values `[b, h, s, d]` and positions `[b, s]` (-1: no token); values that are
        a view of the keys are read there.
      kernel: what the fused kernel runs as, where all rows stand at one position that sees every
        packed page; None is the page scan.
    """
    layout = method.layout
    k, v, at = exact
    view = method.value if isinstance(method.value, View) else None
    if view is not None:  # what is not of the values is cleared at the end
        method, v = dataclasses.replace(method, value=view.through(method.key)), k
    at = at[:, None]  # [b, 1, s]
    unpacked = (at < layout.sink) | (at >= boundary[..., None])
    mask = unpacked & (at >= 0) & in_reach(at, position[..., None], cache.window)  # [b, r, s]
    if kernel is None:
        packed = _packed(method, cache, q, layer, position, boundary)
    else:
        packed = _packed_kernel(method, cache, q, layer, position[:, 0], kernel)
    if cache.axis is not None:  # pages are on one device, windows and what was kept on every one
        packed = packed.merge_axis(cache.axis)
    if cache.kept is not None:
        packed = packed.merge(attend_kept(method, cache.kept, q, layer, CHUNK_TOKENS))
    seen = dense_partial(q, k, v, mask[:, None]).merge(packed)
    bad = overflow(cache, layer)[:, None, None, None]
    return jnp.where(bad, jnp.nan, seen.out if view is None else view.of_key(seen.out))


def _packed(method, cache, q, layer, position, boundary) -> Partial:
    layout, slots = method.layout, page_slots(cache)
    count = max(1, min(slots, CHUNK_TOKENS // layout.page))

    def read(i):
        chunk = read_chunk(cache, layer, i * count, count)
        starts = chunk.starts[..., None]  # [b, c, 1]
        positions = jnp.where(starts < 0, -1, starts + jnp.arange(layout.page))
        view = isinstance(method.value, View)
        value = method.value.of_code(chunk.key) if view else chunk.value
        return Chunk(chunk.key, value, positions[:, None])

    def visible(positions):  # [b, 1, c, p] -> [b, 1, c, r, p]
        at = positions[..., None, :]
        row, edge = (a[:, None, None, :, None] for a in (position, boundary))
        return (at >= 0) & (at < edge) & in_reach(at, row, cache.window)

    chunks = -(-pages_here(cache, layer) // count)
    return page_scan(method.key, method.value, read, chunks, q, visible)


def _packed_kernel(method, cache, q, layer, position, kernel: str) -> Partial:
    return attend_pages(
        method,
        (cache.key_pages, cache.value_pages),
        q,
        method.layout.page * row_pages_here(cache, layer),
        layer=layer,
        backend=kernel,
        table=None if cache.page_table is None else cache.page_table[layer],
        starts=cache.page_starts,
        position=position,
        window=cache.window,
    )


def in_reach(at: Array, row: Array, window: int | None) -> Array:
    seen = at <= row
    return seen if window is None else seen & (row - at < window)
