"""What `hadamard` computes, in plain jnp: butterflies."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

Array = jax.Array


def hadamard_reference(x: Array, signs: Array | None = None) -> Array:
    """As `hadamard`: `[..., d]` float32, d a power of two.

    Example:
      >>> import jax.numpy as jnp
      >>> hadamard_reference(jnp.array([1.0, 0.0, 0.0, 3.0])).tolist()
      [2.0, -1.0, -1.0, 2.0]
    """
    *lead, d = x.shape
    y = x.astype(jnp.float32) if signs is None else x.astype(jnp.float32) * signs
    width = 1
    while width < d:
        pairs = y.reshape(*lead, d // (2 * width), 2, width)
        low, high = pairs[..., 0, :], pairs[..., 1, :]
        y = jnp.stack([low + high, low - high], -2).reshape(*lead, d)
        width *= 2
    return y / math.sqrt(d)
