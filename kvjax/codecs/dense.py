"""No compression: the page in a plain float dtype. The baseline, and the leaf of exact parts."""

from __future__ import annotations

import jax.numpy as jnp

from kvjax.core.codec import Array, Codec
from kvjax.core.pytree import pytree, static


@pytree
class Dense(Codec):
    """Keeps vectors as `dtype`.

    Example:
      >>> import jax.numpy as jnp
      >>> Dense(jnp.bfloat16).encode(jnp.ones((1, 1, 1, 4, 8))).dtype
      dtype(bfloat16)
    """

    dtype: jnp.dtype = static(default=jnp.dtype("bfloat16"))

    def __post_init__(self):
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype))

    def encode(self, x: Array, positions: Array | None = None) -> Array:
        return x.astype(self.dtype)

    def decode(self, code: Array) -> Array:
        return code.astype(jnp.float32)
