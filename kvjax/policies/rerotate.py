"""Keys moved to other positions after RoPE."""

from __future__ import annotations

import jax.numpy as jnp

from kvjax.core.codec import Array
from kvjax.core.errors import InputError


def rerotate(key: Array, old_positions: Array, new_positions: Array, frequencies: Array) -> Array:
    """`R(new - old) k`: the key as if its token had stood at another position.

    For methods that count positions inside the cache (StreamingLLM, FINCH, InfiniPot). Rotate from
    the first key each time: a key that is turned again and again drifts.

    Args:
      key: `[..., s, d]` after RoPE of the pairs (i, i + d / 2).
      old_positions, new_positions: `[..., s]`.
      frequencies: `[d / 2]` radians per position.
    Returns:
      `[..., s, d]` float32.
    Raises:
      InputError: frequencies that do not fit the keys.

    Source: arXiv 2309.17453, 3.2.

    Example:
      >>> import jax.numpy as jnp
      >>> k = jnp.array([[1.0, 0.0]])
      >>> rerotate(k, jnp.array([5]), jnp.array([7]), jnp.array([jnp.pi / 4])).round(3) + 0.0
      Array([[0., 1.]], dtype=float32)
    """
    d = key.shape[-1]
    if 2 * frequencies.shape[-1] != d:
        raise InputError(
            "frequencies",
            got=f"{frequencies.shape[-1]} for {d} channels",
            expected=f"{d // 2}",
            fix="give one for each rotated pair",
        )
    moved = (new_positions - old_positions).astype(jnp.float32)[..., None]
    angles = moved * frequencies  # [..., s, d / 2]
    return turn(key, jnp.cos(angles), jnp.sin(angles))


def turn(x: Array, cos: Array, sin: Array) -> Array:
    """The pairs (i, i + d / 2) of `x: [..., d]` turned, or mapped by any means of turns; `cos` and
    `sin` broadcast to `[..., d / 2]`. In float32.

    Example:
      >>> import jax.numpy as jnp
      >>> turn(jnp.array([1.0, 0.0]), jnp.array([0.0]), jnp.array([1.0]))
      Array([0., 1.], dtype=float32)
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
