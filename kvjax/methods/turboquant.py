"""TurboQuant: random rotation, then the optimal scalar codebook for one sphere coordinate."""

from __future__ import annotations

import math
from typing import Literal

import jax

from kvjax.codecs import QJL, Codebook, Normalized, Outliers, Residual, rotated
from kvjax.codecs.linear import Rotation
from kvjax.codecs.normalized import Gain
from kvjax.core.codec import Codec
from kvjax.core.errors import InputError
from kvjax.core.method import Method
from kvjax.core.rng import fold

Sketch = Literal["orthogonal", "gaussian"]


def turboquant(
    bits: float,
    head_dim: int,
    *,
    rng: jax.Array,
    residual: Literal["qjl"] | None = None,
    rotation: Rotation = "hadamard",
    gain: Gain = "none",
    sketch: Sketch = "gaussian",
) -> Method:
    """TurboQuant for keys and values.

        mse (residual=None):   x = |x| u;  c = nearest Lloyd-Max level of each coordinate of R u
        prod (residual="qjl"): keys keep b - 1 bits of that, and QJL signs of what is left over:
                               <q, x_hat> is unbiased; values stay mse at b bits
        2.5, 3.5, ...:         the quarter of the channels with most energy has one bit more, and
                               each part its own rotation, norm and codebook

    Args:
      bits: 1 to 8; a half adds outlier channels. With the 16-bit norm the true rate is
        `bits + 16 / head_dim`; `Method.describe` tells.
      head_dim: dimension of a key or value.
      rng: for rotations and sketches; never the key that made test data.
      rotation: "haar" (dense, as in the paper) or "hadamard" (the same error, cheaper).
      gain: see `Normalized`.
      sketch: rows of the QJL sketch, "gaussian" as in the paper's Algorithm 2, or "orthogonal" as
        in its released code (2.7 times less variance).

    Source: TurboQuant, arXiv 2504.19874.
    Differs from the paper: rotation is a randomized Hadamard transform by default; the outlier
    channels are chosen per page (the released code: once per prompt, keys only), and the codebook
    of a sub-vector is the one of its own dimension (the released code scales by 1/sqrt(128)
    everywhere). "2.5 bits" is (3 + 3 * 2) / 4 = 2.25 in codes, and 2.5 with two norms at
    head_dim 128.

    Example:
      >>> import jax
      >>> turboquant(3, 64, rng=jax.random.key(0), residual="qjl").name
      'turboquant-prod-3'
    """
    if residual not in (None, "qjl"):
        raise InputError("residual", got=repr(residual), expected="None or 'qjl'", fix="name one")
    if bits * 2 != int(bits * 2) or not 1 <= bits <= 8:
        raise InputError(
            "bits", got=bits, expected="1 to 8 in steps of a half", fix="choose such a width"
        )
    side = lambda name: _mse(bits, head_dim, fold(rng, name), rotation, gain)
    if residual is None:
        return Method(side("key"), side("value"), name=f"turboquant-{bits:g}")
    if bits != int(bits):
        raise InputError(
            "bits", got=bits, expected="whole bits with a residual", fix="drop the half or the qjl"
        )
    key = _prod(int(bits), head_dim, fold(rng, "key"), rotation, sketch)
    return Method(key, side("value"), name=f"turboquant-prod-{bits:g}")


def _mse(bits: float, d: int, rng: jax.Array, rotation: Rotation, gain: Gain) -> Codec:
    def part(size: int, width: int, name: str) -> Codec:
        inner = Normalized(Codebook.lloyd_max(size, width), gain=gain)
        return rotated(rotation, size, inner, rng=fold(rng, "rotation", name))

    low = math.floor(bits)
    if bits == low:
        return part(d, low, "all")
    count = d // 4
    return Outliers(part(count, low + 1, "outliers"), part(d - count, low, "rest"), count)


def _prod(bits: int, d: int, rng: jax.Array, rotation: Rotation, sketch: Sketch) -> Codec:
    qjl = QJL.random(d, rng=fold(rng, "sketch"), kind=sketch)
    if bits == 1:
        return qjl
    first = Normalized(Codebook.lloyd_max(d, bits - 1))
    return rotated(rotation, d, Residual(first, qjl), rng=fold(rng, "rotation", "all"))
