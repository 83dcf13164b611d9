"""No compression: the page in a plain float dtype. The baseline, and the leaf of exact parts."""

from __future__ import annotations

import jax.numpy as jnp

from kvjax.core.codec import Array, Codec
from kvjax.core.pytree import pytree, static
from kvjax.core.storage import narrow, widen


@pytree
class Dense(Codec):
    """Keeps vectors as `dtype`; bf16 as its bits (see `core.storage`).

    Example:
      >>> import jax.numpy as jnp
      >>> codec = Dense(jnp.bfloat16)
      >>> codec.decode(codec.encode(jnp.full((4, 8), 1.5)))[0, 0]
      Array(1.5, dtype=float32)
    """

    dtype: jnp.dtype = static(default=jnp.dtype("bfloat16"))

    def __post_init__(self):
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype))

    def encode(self, x: Array, positions: Array | None = None) -> Array:
        return narrow(x, self.dtype)

    def decode(self, code: Array) -> Array:
        return widen(code)
