"""Shapes of what goes into a cache, checked before anything is traced into it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

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


def check_values(real: Array, **arrays: Array) -> None:
    """Raises `InputError` for NaN or infinity, where values are known: outside jit.

    Inside, a page with such a token reads as the codec says (see `Normalized`), mostly as NaN.

    Args:
      real: `[b]` or `[b, t]` bool, the tokens that count; arrays lead with the same axes.
    """
    for name, a in arrays.items():
        if isinstance(a, jax.core.Tracer) or isinstance(real, jax.core.Tracer) or not a.size:
            continue
        finite = np.isfinite(np.asarray(a, np.float32)).reshape(*real.shape, -1).all(-1)
        bad = (np.asarray(real) & ~finite).reshape(len(real), -1).any(-1)
        if bad.any():
            raise InputError(
                name,
                got=f"NaN or infinity in sequence {int(bad.argmax())}",
                expected="finite numbers",
                fix="look for what made them: packed, they would spoil a whole page",
            )


def check_room(cache: Cache, layer: Array | int, length: Array) -> None:
    """Raises `InputError` where sequences would outgrow the cache, outside jit; inside, they read
    as NaN.

    Args:
      length: `[b]`, tokens that each would hold; 0 where nothing is added.
    """
    most = cache.most_tokens(layer)
    if any(isinstance(a, jax.core.Tracer) for a in (length, most)) or length.size == 0:
        return
    over = np.asarray(length) > np.asarray(most)
    if over.any():
        row = int(over.argmax())
        raise InputError(
            "cache",
            got=f"token {int(length[row])}",
            expected=f"at most {int(most[row])} tokens",
            fix="init it with a larger capacity",
        )
