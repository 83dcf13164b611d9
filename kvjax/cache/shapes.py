"""Shapes of what goes into a cache, checked before anything is traced into it."""

from __future__ import annotations

import jax.numpy as jnp

from kvjax.cache.state import Cache
from kvjax.core.codec import Array
from kvjax.core.errors import InputError


def check_shapes(
    cache: Cache, layer: Array | int, *, tokens: tuple[int, ...] = (), **arrays: Array
) -> None:
    """Raises `InputError` unless all arrays are floats `[b, *tokens, h, d]` of this cache.

    Args:
      tokens: `(t,)` for blocks, empty for single tokens.
      arrays: by name; "q" has an axis of queries before d.
    """
    layers, b, h, _, d = cache.window_key.shape
    if isinstance(layer, int) and not 0 <= layer < layers:
        raise InputError(
            "layer",
            got=layer,
            expected=f"0 to {layers - 1}",
            fix="init the cache with that many layers",
        )
    for name, a in arrays.items():
        shape = (*a.shape[:-2], a.shape[-1]) if name == "q" else a.shape
        if shape != (b, *tokens, h, d):
            where = f", tokens {tokens[0]}" if tokens else ""
            raise InputError(
                name,
                got=f"shape {a.shape}",
                expected=f"batch {b}{where}, KV heads {h}, "
                + ("queries per KV head, " if name == "q" else "")
                + f"head_dim {d}",
                fix="reshape it, or make the cache for these sizes",
            )
        if not jnp.issubdtype(a.dtype, jnp.floating):
            raise InputError(
                name, got=a.dtype, expected="a floating dtype", fix="cast it before appending"
            )
