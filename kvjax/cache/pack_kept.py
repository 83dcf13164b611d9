"""From a working set to a cache: survivors are encoded, windows refilled, and decoding goes on."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from kvjax.cache.kept import Exact, Kept, encode_pages
from kvjax.cache.state import Cache, init
from kvjax.cache.update import slot_positions
from kvjax.cache.working_set import WorkingSet, exact_tokens
from kvjax.core.codec import Array
from kvjax.core.errors import InputError
from kvjax.core.layout import Layout
from kvjax.core.method import Method
from kvjax.core.storage import narrow
from kvjax.policies.retain import whole_pages


def pages_for(layout: Layout, tokens: int) -> int:
    """Pages for what a head of `tokens` in all keeps besides sink and recent window."""
    return max(1, -(-(tokens - layout.sink - layout.recent) // layout.page))


def packed_region(layout: Layout, positions: Array, length: Array) -> Array:
    """Which tokens `[..., b, h, s]` get packed: those between sink and exact recent window."""
    boundary = layout.sink + layout.page * layout.packed_pages(length)  # [..., b]
    return (positions >= layout.sink) & (positions < boundary[..., None, None])


def pack(
    method: Method,
    tokens: WorkingSet,
    *,
    pages: int,
    pool: tuple[int, ...] | int | None = None,
    stacked: bool = False,
    frequencies: Array | None = None,
    capacity: int,
    tail: int,
    shards: int = 1,
    axis: str | None = None,
) -> Cache:
    """A cache that goes on where the working set ends. Call `evict` first.

    Args:
      pages: page slots of a head (of the fullest one, with a pool).
      pool: None gives every head its `pages`. Otherwise pages are held by those heads that need
        them, and memory is what is stated: pages per layer and sequence, a number for each layer;
        or one number for all layers of a sequence.
      stacked: whether arrays of the method have a leading layer axis.
      frequencies: `[d / 2]`, radians per position, to close the gaps between positions; None
        leaves them.
      capacity: most tokens in all, those seen so far and evicted ones included.
      tail: page slots for tokens to come.
      shards, axis: devices that these are dealt to, and their mesh axis; all have what was kept.
    Raises:
      InputError: a layout with a pool of its own.
    """
    layout = method.layout
    check_no_pool(layout)
    layers, b, h, _, d = tokens.key.shape
    one = jax.tree.map(lambda a: a[0], method) if stacked else method
    dtype = jnp.bfloat16 if tokens.key.dtype == jnp.uint16 else tokens.key.dtype
    room = layout.sink + layout.recent + layout.page * tail
    cache = init(
        one,
        capacity=room,
        kv_heads=h,
        head_dim=d,
        batch=b,
        layers=layers,
        dtype=dtype,
        shards=shards,
        axis=axis,
    )
    wanted = packed_region(layout, tokens.positions, tokens.length)
    if pool is not None:
        wanted = _fill_pool(tokens.score, wanted, layout.page, pool)
    counts = -(-wanted.sum(-1) // layout.page)  # [l, b, h], pages

    def layer_pages(layer):
        of = jax.tree.map(lambda a: a[layer], method) if stacked else method
        held, length = exact_tokens(tokens, layer), tokens.length[layer]
        if frequencies is not None:
            held = held.close_up(length, frequencies)
        slots = slot_positions(layout, cache, length)  # [b, w]
        packed = layout.sink + layout.page * layout.packed_pages(length)[:, None]
        slots = jnp.where((slots >= layout.sink) & (slots < packed), -1, slots)
        windows = tuple(narrow(a, dtype) for a in _window(held, slots))
        page_tokens = held.first(pages * layout.page, wanted[layer])
        return encode_pages(of, page_tokens), windows, slots

    code, windows, slots = jax.lax.map(layer_pages, jnp.arange(layers))
    used = jnp.minimum(counts, pages).max((1, 2))
    packed = layout.packed_pages(tokens.length)
    most = layout.sink + layout.recent + layout.page * (packed + tail + 1) - 1
    table = None
    if pool is not None:
        total = b * (pool if isinstance(pool, int) else sum(pool))
        code, table = _to_pool(code, counts, total)
    key, value, positions, bias = code
    return dataclasses.replace(
        cache,
        window_key=windows[0],
        window_value=windows[1],
        window_positions=slots,
        length=tokens.length,
        packed=packed,
        capacity=capacity,
        kept=Kept(key, value, positions, bias, table, used, most),
    )


def check_no_pool(layout: Layout) -> None:
    """Raises `InputError` for a layout that a working set cannot be packed into."""
    if layout.pool is not None:
        raise InputError(
            "layout",
            got=f"a shared pool of {layout.pool} pages",
            expected="contiguous pages where a policy evicts",
            fix="leave out the pool",
        )


def _window(held: Exact, slots: Array) -> tuple[Array, Array]:
    """Keys and values `[b, h, w, d]` of the tokens at positions `slots: [b, w]`."""
    match = held.positions[:, :, None] == slots[:, None, :, None]  # [b, h, w, s]
    at = match.argmax(-1)[..., None]
    return jnp.take_along_axis(held.key, at, 2), jnp.take_along_axis(held.value, at, 2)


def _fill_pool(score, wanted, page, pool) -> Array:
    if isinstance(pool, int):  # heads of all layers share
        layers, b, h, s = score.shape
        flat = lambda a: a.transpose(1, 0, 2, 3).reshape(b, layers * h, s)
        trimmed = whole_pages(flat(score), flat(wanted), page, pool)
        return trimmed.reshape(b, layers, h, s).transpose(1, 0, 2, 3)
    quota = jnp.asarray(pool, jnp.int32)[:, None, None]
    return whole_pages(score, wanted, page, quota)


def _to_pool(code, counts: Array, total: int):
    """Pages `[l, b, h, n, ...]` that are held, one after the other, and the table to find them."""
    n = code[2].shape[3]
    starts = (jnp.cumsum(counts) - counts.ravel()).reshape(counts.shape)
    held = jnp.arange(n) < counts[..., None]
    table = jnp.where(held, starts[..., None] + jnp.arange(n), -1).astype(jnp.int32)
    at = jnp.where(held, table, total).ravel()

    def place(a):
        empty = jnp.zeros((total, *a.shape[4:]), a.dtype)
        return empty.at[at].set(a.reshape(-1, *a.shape[4:]), mode="drop")

    return jax.tree.map(place, code), table
