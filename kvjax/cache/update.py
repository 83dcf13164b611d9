"""Writing the cache: one token at a time (`append`), or a block with its attention (`extend`)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from kvjax.attention.encode_kernel import encode_page
from kvjax.cache.attend import attend_rows
from kvjax.cache.pages import write_page
from kvjax.cache.shapes import check_counts, check_room, check_shapes, check_values, values_kept
from kvjax.cache.state import Cache
from kvjax.codecs import View
from kvjax.core.codec import Array
from kvjax.core.errors import InputError
from kvjax.core.layout import Layout
from kvjax.core.method import Method
from kvjax.core.storage import narrow_like

Tokens = Callable[[Array, Array], tuple[Array, Array]]  # rows [m], positions [m, p] -> [m, h, p, d]


def append(
    method: Method,
    cache: Cache,
    k: Array,
    v: Array | None,
    *,
    layer: Array | int = 0,
    active: Array | None = None,
) -> Cache:
    """Adds one token to every sequence; encodes a page when one has become old enough.

    Never `vmap` this over batch or heads: the loop around the encoder would run for all of them
    whenever it runs for one.

    Args:
      k, v: `[b, h, d]`, keys after RoPE. v may be None where values are a view of the keys.
      active: `[b]` bool; sequences that are False stay as they are. None is all.
    Raises:
      InputError: shapes that differ from the cache's; outside jit also a full cache or pool (under
        jit the sequence that outgrew it reads as NaN), and numbers that are not finite; outside of
        their mesh, pages that are dealt to several devices.
    """
    v = values_kept(method, cache, k, v)
    check_shapes(cache, layer, k=k, v=v)
    layout = method.layout
    active = jnp.ones(k.shape[0], bool) if active is None else jnp.asarray(active)
    check_counts("active", active, k.shape[0], most=1)
    active = active.astype(bool)
    check_values(active, k=k, v=v)
    position = cache.length[layer]
    check_room(cache, layer, jnp.where(active, position + 1, 0), layout)
    slot = jnp.where(active, window_slot(layout, cache, position), cache.window_key.shape[3])
    rows = jnp.arange(k.shape[0])
    put = lambda a, new: a.at[layer, rows, :, slot].set(narrow_like(new, a), mode="drop")
    cache = dataclasses.replace(
        cache,
        window_key=put(cache.window_key, k),
        window_value=put(cache.window_value, v),
        window_positions=cache.window_positions.at[layer, rows, slot].set(position, mode="drop"),
        length=cache.length.at[layer].add(active.astype(jnp.int32)),
    )
    exact = cache.window_key[layer], cache.window_value[layer]
    tokens = lambda rows, positions: _take(exact, rows, window_slot(layout, cache, positions))
    return _encode_due(method, cache, layer, tokens)


def _encode_due(method: Method, cache: Cache, layer: Array | int, tokens: Tokens) -> Cache:
    """Encodes every page whose tokens have all become old enough, and no other.

    `layout.encode_batch` sequences at a time, those with most waiting pages first; most steps have
    none, and do nothing here.
    """
    layout = method.layout
    together = min(layout.encode_batch, cache.length.shape[1])

    def waiting(cache):  # [b]
        return layout.packed_pages(cache.length[layer]) - cache.packed[layer]

    def encode_some(cache):
        due, rows = jax.lax.top_k(waiting(cache), together)  # [m]
        starts = layout.sink + layout.page * cache.packed[layer, rows]  # [m]
        positions = starts[:, None] + jnp.arange(layout.page)  # [m, p]
        k, v = (a[:, :, None] for a in tokens(rows, positions))  # [m, h, 1, p, d], as kept
        encode = functools.partial(encode_page, method, positions=positions[:, None, None])
        view = isinstance(method.value, View)
        code = encode(method.key, k), () if view else encode(method.value, v)
        for i in range(together):
            one = jax.tree.map(lambda a, i=i: a[i, :, 0], code)
            cache = write_page(cache, layer, rows[i], one, starts[i], due[i] > 0)
        return cache

    return jax.lax.while_loop(lambda c: (waiting(c) > 0).any(), encode_some, cache)


def extend(
    method: Method,
    cache: Cache,
    q: Array,
    k: Array,
    v: Array | None,
    *,
    layer: Array | int = 0,
    count: Array | None = None,
    scale: float | None = None,
) -> tuple[Array, Cache]:
    """Adds a block of tokens, with the attention of their queries.

    Each query sees what it would see had its token been appended alone: exact tokens where they
    would still be exact, packed pages where they would be packed. The result is that of t calls of
    `append` and `attend`, at the price of one; the peak is the cache and one block.

    Args:
      q: `[b, t, h, g, d]`. k, v: `[b, t, h, d]`, as for `append`.
      count: `[b]` int32, how many of the t tokens of each sequence are real (they come first).
      scale: factor on the logits; None is `d ** -0.5`.
    Returns:
      Outputs `[b, t, h, g, d]` (rows past `count` are meaningless) and the new cache.
    Raises:
      InputError: shapes that differ from the cache's; a block longer than a page where the cache
        keeps a sliding window only; what `append` refuses, and counts beyond 0 to t outside jit.
    """
    v = values_kept(method, cache, k, v)
    check_shapes(cache, layer, tokens=k.shape[1:2], q=q, k=k, v=v)
    layout = method.layout
    b, t, h, g, d = q.shape
    if cache.window is not None and t > layout.page:
        raise InputError(
            "block",
            got=f"{t} tokens",
            expected=f"at most a page of {layout.page} in a layer with a sliding window",
            fix="use smaller blocks",
        )
    scale = d**-0.5 if scale is None else scale
    count = jnp.full((b,), t, jnp.int32) if count is None else jnp.asarray(count)
    check_counts("count", count, b, most=t)
    before = cache.length[layer]  # [b]
    check_room(cache, layer, jnp.where(count > 0, before + count, 0), layout)
    offsets = jnp.arange(t)
    check_values(offsets < count[:, None], q=q, k=k, v=v)
    positions = before[:, None] + offsets  # [b, t]
    real = jnp.where(offsets < count[:, None], positions, -1)

    join = lambda window, block: jnp.concatenate(
        [window[layer], narrow_like(block.swapaxes(1, 2), window)], 2
    )
    exact = (
        join(cache.window_key, k),  # [b, h, w + t, d]
        join(cache.window_value, v),
        jnp.concatenate([cache.window_positions[layer], real], 1),  # [b, w + t]
    )
    cache = _absorb(method, cache, layer, exact[:2], before, before + count)
    rows = jnp.repeat(positions, g, axis=1)  # [b, t * g]
    out = attend_rows(
        method,
        cache,
        q.astype(jnp.float32).transpose(0, 2, 1, 3, 4).reshape(b, h, t * g, d) * scale,
        layer,
        position=rows,
        boundary=layout.sink + layout.page * layout.packed_pages(rows + 1),
        exact=exact,
    )
    return out.reshape(b, h, t, g, d).transpose(0, 2, 1, 3, 4).astype(q.dtype), cache


def prefill(
    method: Method,
    cache: Cache,
    k: Array,
    v: Array | None,
    *,
    q: Array | None = None,
    layer: Array | int = 0,
    block: int | None = None,
    scale: float | None = None,
) -> tuple[Array | None, Cache]:
    """Adds t tokens block by block: `extend` in a scan, so that no step sees the whole history.

    Args:
      k, v: `[b, t, h, d]`, as for `append`. q: `[b, t, h, g, d]` if the outputs are wanted.
      block: tokens per step; None is a page. A t that it does not divide ends in a shorter block.
    Returns:
      Outputs `[b, t, h, g, d]` or None, and the cache: the same as after t calls of `append`.
    Raises:
      InputError: what `extend` refuses; a block under 1.
    """
    if block is not None and block < 1:
        raise InputError("block", got=block, expected="1 token or more", fix="None is a page")
    v = values_kept(method, cache, k, v)
    arrays = {"k": k, "v": v} if q is None else {"k": k, "v": v, "q": q}
    check_shapes(cache, layer, tokens=k.shape[1:2], **arrays)
    check_values(jnp.ones(k.shape[:2], bool), **arrays)
    if not k.shape[1]:
        return q, cache
    check_room(cache, layer, cache.length[layer] + k.shape[1], method.layout)
    t, block = k.shape[1], min(block or method.layout.page, k.shape[1])
    whole = t - t % block
    queries = k[:, :, :, None] if q is None else q

    def split(a):  # [b, t, ...] -> [n, b, block, ...]
        return a[:, :whole].reshape(a.shape[0], whole // block, block, *a.shape[2:]).swapaxes(0, 1)

    def one(cache, inputs):
        out, cache = extend(method, cache, *inputs, layer=layer, scale=scale)
        return cache, None if q is None else out

    cache, outs = jax.lax.scan(one, cache, (split(queries), split(k), split(v)))
    parts = [] if q is None else [outs.swapaxes(0, 1).reshape(q.shape[0], whole, *q.shape[2:])]
    if whole < t:
        rest = (a[:, whole:] for a in (queries, k, v))
        out, cache = extend(method, cache, *rest, layer=layer, scale=scale)
        parts.append(out)
    return (None if q is None else jnp.concatenate(parts, 1)), cache


def _absorb(method, cache: Cache, layer, exact, before: Array, after: Array) -> Cache:
    """The cache after a block: pages that are due are encoded, the window is refilled.

    Args:
      exact: keys and values `[b, h, w + t, d]` of the window before, then the block.
      before, after: `[b]`, tokens in the cache before and after the block.
    """
    layout, width = method.layout, cache.window_key.shape[3]

    def tokens(rows, positions):  # [m], [m, s] -> [m, h, s, d]
        past = before[rows][:, None]
        slots = window_slot(layout, cache, positions)
        index = jnp.where(positions < past, slots, width + positions - past)
        return _take(exact, rows, jnp.clip(index, 0, exact[0].shape[2] - 1))

    put = lambda a, new: jax.lax.dynamic_update_index_in_dim(a, new, layer, 0)
    cache = dataclasses.replace(cache, length=put(cache.length, after))
    cache = _encode_due(method, cache, layer, tokens)
    slots = slot_positions(layout, cache, after)  # [b, w]
    key, value = tokens(jnp.arange(after.shape[0]), jnp.maximum(slots, 0))
    return dataclasses.replace(
        cache,
        window_key=put(cache.window_key, key),
        window_value=put(cache.window_value, value),
        window_positions=put(cache.window_positions, slots),
    )


def _take(exact: tuple[Array, Array], rows: Array, index: Array) -> tuple[Array, Array]:
    """Tokens `index: [m, s]` of the sequences `rows: [m]`, `[m, h, s, d]` each of K and V."""
    k, v = (jnp.take_along_axis(a[rows], index[:, None, :, None], 2) for a in exact)
    return k, v


def window_slot(layout: Layout, cache: Cache, position: Array) -> Array:
    """The window slot of a token: sink slots first, then the ring."""
    ring = cache.window_key.shape[3] - layout.sink
    return jnp.where(
        position < layout.sink, position, layout.sink + (position - layout.sink) % ring
    )


def slot_positions(layout: Layout, cache: Cache, length: Array) -> Array:
    """Which position each window slot holds once `length` tokens are in: `[b, w]`, -1 if none."""
    ring = cache.window_key.shape[3] - layout.sink
    sink = jnp.arange(layout.sink)[None]
    last = length[:, None] - 1 - layout.sink  # newest ring token, counted from the sink's end
    slot = jnp.arange(ring)[None]
    recent = layout.sink + last - (last - slot) % ring
    empty = (last < 0) | (recent < layout.sink)
    sink, recent = jnp.where(sink < length[:, None], sink, -1), jnp.where(empty, -1, recent)
    return jnp.concatenate([sink, recent], 1).astype(jnp.int32)
