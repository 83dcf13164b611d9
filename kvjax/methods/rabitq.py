"""RaBitQ: a random rotation, an integer grid, and the scale that fits each vector best."""

from __future__ import annotations

import jax

from kvjax.codecs import Codebook, Normalized, rotated
from kvjax.codecs.linear import Rotation
from kvjax.core.codec import Codec
from kvjax.core.method import Method
from kvjax.core.rng import fold


def rabitq(
    bits: int,
    head_dim: int,
    *,
    rng: jax.Array,
    search: int = 33,
    rotation: Rotation = "haar",
) -> Method:
    """Codes on the grid `i - (2^bits - 1) / 2`, with the rescaling of largest cosine, unbiased.

    One bit is sign quantization (any rescaling gives the same code); more bits are the extended
    form. Estimates are `<q, x_hat> = |x| <q, u_hat> / <u, u_hat>`, one scalar per token.

    Args:
      bits: 1 to 8.
      search: rescalings tried per token, from half to one and a half times the best fixed one.

    Source: arXiv 2405.12497 (one bit), arXiv 2409.09913 (extended).
    Differs from the paper: the rescaling is the best of `search` values, not of all critical ones
    (the error is the same to a per cent); the scalar is bf16, not float32.

    Example:
      >>> import jax
      >>> rabitq(4, 64, rng=jax.random.key(0)).name
      'rabitq-4'
    """

    def side(name: str) -> Codec:
        tries = 1 if bits == 1 else search
        grid = Codebook.uniform(head_dim, bits)
        inner = Normalized(grid, gain="unbiased", search=tries, spread=0.5)
        return rotated(rotation, head_dim, inner, rng=fold(rng, name, "rotation"))

    return Method(side("key"), side("value"), name=f"rabitq-{bits}")
