"""Caches full of random tokens, without reading any: what a step costs does not depend on text."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from kvjax.cache import Cache
from kvjax.cache.pages import page_slots
from kvjax.cache.update import slot_positions
from kvjax.core.codec import Array, Codec
from kvjax.core.errors import InputError
from kvjax.core.method import Method
from kvjax.core.rng import fold
from kvjax.core.storage import narrow_like

DRAWN = 32  # pages of each side that are drawn and encoded; slots choose among them


@functools.partial(jax.jit, static_argnames=("like", "length", "scale"))
def _fill(method: Method, rng: Array, *, like: _Static, length: int, scale: float) -> Cache:
    empty: Cache = like.cache
    layout = method.layout
    layers, b, h, w, d = empty.window_key.shape
    packed, n = int(layout.packed_pages(length)), page_slots(empty)

    def pages(codec: Codec, name: str):
        drawn = scale * jax.random.normal(fold(rng, name, "pages"), (DRAWN, h, 1, layout.page, d))
        positions = jnp.broadcast_to(jnp.arange(layout.page), (DRAWN, 1, 1, layout.page))
        code = codec.encode(drawn, positions)
        # one drawn page for each slot of a head: leaves [DRAWN, h, 1, ...] -> [l, b, h, n, ...]
        at = jax.random.randint(fold(rng, name, "slots"), (layers, b, h, n), 0, DRAWN)
        heads = jnp.arange(h)[None, None, :, None]
        return jax.tree.map(lambda a: a[at, heads, 0], code)

    def window(name: str) -> Array:
        x = scale * jax.random.normal(fold(rng, name), (1, 1, h, w, d))
        return jnp.broadcast_to(narrow_like(x, empty.window_key), (layers, b, h, w, d))

    full = lambda shape, number: jnp.full(shape, number, jnp.int32)
    lengths = full((b,), length)
    slots = jnp.arange(n)
    starts = jnp.where(slots < packed, layout.sink + layout.page * slots, -1)
    return dataclasses.replace(
        empty,
        window_key=window("window key"),
        window_value=window("window value"),
        window_positions=jnp.broadcast_to(slot_positions(layout, empty, lengths), (layers, b, w)),
        key_pages=pages(method.key, "key"),
        value_pages=pages(method.value, "value"),
        page_starts=jnp.broadcast_to(starts.astype(jnp.int32), (layers, b, n)),
        length=full((layers, b), length),
        packed=full((layers, b), packed),
    )


@dataclasses.dataclass(frozen=True, eq=False)
class _Static:
    """Shapes of a cache as a static argument."""

    cache: Cache


def random_cache(
    method: Method, like: Cache, length: int, *, rng: Array, scale: float = 1.0
) -> Cache:
    """The cache as if `length` normal tokens had been appended to every sequence.

    Args:
      like: an empty cache of the method, or its `jax.eval_shape`; full attention, no pool.
      scale: standard deviation of keys and values.
    Raises:
      InputError: a cache with a sliding window or a pool, or too small for the length.

    Example:
      >>> import kvjax
      >>> method = kvjax.methods.get("int8", head_dim=16)
      >>> make = lambda: kvjax.init(method, capacity=512, kv_heads=1, head_dim=16)
      >>> cache = random_cache(method, jax.eval_shape(make), 300, rng=jax.random.key(0))
      >>> int(cache.length[0, 0]), int(cache.packed[0, 0])
      (300, 3)
    """
    if like.window is not None or like.page_table is not None or not 0 < length <= like.capacity:
        raise InputError(
            "random cache",
            got=f"{length} tokens for a capacity of {like.capacity}, window {like.window}",
            expected="1 token to the capacity, contiguous pages that see everything",
            fix="leave out the window and the pool, or raise the capacity",
        )
    return _fill(method, rng, like=_Static(like), length=length, scale=scale)
