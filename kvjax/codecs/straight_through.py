"""Gradients through a code: rounding counts as the identity, everything else as what it is."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kvjax.core.codec import Array, Codec


def straight_through(codec: Codec, x: Array, positions: Array | None = None) -> Array:
    """The reconstruction of `x: [..., t, d]`, with gradients.

        value:     decode(encode(x))
        d / dx:    the identity
        d / codec: through `decode` with the codes held fixed (levels, means, inverse transforms)

    Scales and norms are part of the code, so they are held fixed too.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from kvjax.codecs import Codebook
      >>> x = jax.random.normal(jax.random.key(0), (16, 8))
      >>> book = Codebook.lloyd_max(None, 2)
      >>> error = lambda book: ((straight_through(book, x) - x) ** 2).mean()
      >>> jax.grad(error)(book).levels.shape
      (4,)
    """
    fixed = jax.lax.stop_gradient(codec)
    code = jax.lax.stop_gradient(fixed.encode(jax.lax.stop_gradient(x), positions))
    x = x.astype(jnp.float32)
    return codec.decode(code) + (x - jax.lax.stop_gradient(x))
