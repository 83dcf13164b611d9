"""Rotation and trellis codes: the least error of the data-oblivious methods."""

from __future__ import annotations

import jax

from kvjax.codecs import Normalized, Trellis, rotated
from kvjax.codecs.linear import Rotation
from kvjax.codecs.normalized import Gain
from kvjax.core.codec import Codec
from kvjax.core.method import Method
from kvjax.core.rng import fold


def trellis(
    bits: int,
    head_dim: int,
    *,
    rng: jax.Array,
    rotation: Rotation = "hadamard",
    gain: Gain = "least_squares",
) -> Method:
    """TurboQuant with `Trellis` in place of the scalar codebook: at equal bits, 60 % of its error
    at 2 bits and 48 % at 4.

    On a CPU encoding takes 300 to 1200 times as long, decoding 1.3 to 1.7 times; see `kvjax
    distortion`.

    Args:
      bits: 1 to 5.
      gain: see `Normalized`.

    Source: the trellis is QTIP's (arXiv 2406.11235), there for weights.
    Differs from the paper: on cached keys and values, with one length per token; see `Trellis`.

    Example:
      >>> import jax
      >>> trellis(2, 64, rng=jax.random.key(0)).name
      'trellis-2'
    """

    def side(name: str) -> Codec:
        inner = Normalized(Trellis(bits, std=head_dim**-0.5), gain=gain)
        return rotated(rotation, head_dim, inner, rng=fold(rng, name, "rotation"))

    return Method(side("key"), side("value"), name=f"trellis-{bits}")
