"""Rotation and lattice codes: eight channels together."""

from __future__ import annotations

import jax

from kvjax.codecs import E8, Normalized, Residual, rotated
from kvjax.codecs.linear import Rotation
from kvjax.codecs.normalized import Gain
from kvjax.core.codec import Codec
from kvjax.core.errors import InputError
from kvjax.core.method import Method
from kvjax.core.rng import fold


def e8(
    bits: int,
    head_dim: int,
    *,
    rng: jax.Array,
    rotation: Rotation = "hadamard",
    gain: Gain = "least_squares",
) -> Method:
    """TurboQuant with the `E8` lattice in place of the scalar codebook.

    Args:
      bits: 2, or 4 for a second lattice code on what the first left over.
      gain: see `Normalized`.

    Source: E8P of QuIP# (arXiv 2402.04396), there for weights.
    Differs from the paper: on cached keys and values, with one length per token; see `E8`.

    Example:
      >>> import jax
      >>> e8(2, 64, rng=jax.random.key(0)).name
      'e8-2'
    """
    if bits not in (2, 4):
        raise InputError("e8 bits", got=bits, expected="2 or 4", fix="trellis takes 1 to 5")

    def side(name: str) -> Codec:
        std = head_dim**-0.5
        leaf = E8(std) if bits == 2 else Residual(E8(std), E8(0.3 * std))
        inner = Normalized(leaf, gain=gain)
        return rotated(rotation, head_dim, inner, rng=fold(rng, name, "rotation"))

    return Method(side("key"), side("value"), name=f"e8-{bits}")
