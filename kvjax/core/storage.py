"""Floats as they are kept: bf16 as its 16 bits.

XLA on a CPU has no bf16 of its own. It turns an update of a bf16 buffer into one of a float32 copy
of the whole buffer, and converts elements three times slower than integers shift. So bf16 numbers
are kept as `uint16`, on every backend: same bytes, same values, and updates stay in place.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array


def narrow(x: Array, dtype) -> Array:
    """`x` as it is kept: the bits of a bf16 number as `uint16`, other dtypes as they are.

    Example:
      >>> import jax.numpy as jnp
      >>> narrow(jnp.ones(2), jnp.bfloat16)
      Array([16256, 16256], dtype=uint16)
    """
    dtype = jnp.dtype(dtype)
    if dtype == jnp.bfloat16:
        return jax.lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16)
    return x.astype(dtype)


def widen(kept: Array) -> Array:
    """What `narrow` kept, as float32: the inverse, up to rounding.

    Example:
      >>> import jax.numpy as jnp
      >>> widen(narrow(jnp.ones(2), jnp.bfloat16))
      Array([1., 1.], dtype=float32)
    """
    if kept.dtype == jnp.uint16:  # a bf16 number is the upper half of a float32
        return jax.lax.bitcast_convert_type(kept.astype(jnp.uint32) << 16, jnp.float32)
    return kept.astype(jnp.float32)


def kept_dtype(dtype) -> jnp.dtype:
    """The dtype of `narrow(x, dtype)`."""
    dtype = jnp.dtype(dtype)
    return jnp.dtype(jnp.uint16) if dtype == jnp.bfloat16 else dtype


def narrow_like(x: Array, kept: Array) -> Array:
    """`x` as `kept` is kept: uint16 are the bits of bf16.

    Example:
      >>> import jax.numpy as jnp
      >>> narrow_like(jnp.ones(1), narrow(jnp.zeros(1), jnp.bfloat16))
      Array([16256], dtype=uint16)
    """
    return narrow(x, jnp.bfloat16 if kept.dtype == jnp.uint16 else kept.dtype)
