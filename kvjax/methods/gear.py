"""GEAR: what a quantizer leaves over, as a thin product and a few exact numbers."""

from __future__ import annotations

from typing import Literal

import jax

from kvjax.codecs import LowRank, Residual, Sparse, Uniform
from kvjax.core.codec import Codec
from kvjax.core.method import Method
from kvjax.core.rng import fold


def gear(
    bits: int,
    head_dim: int,
    *,
    rng: jax.Array,
    rank: int = 4,
    group: int = 64,
    outliers: int = 2,
    left: Codec | None = None,
) -> Method:
    """Integers as KIVI groups them, plus a factorization of their error, plus sparse outliers.

        x_hat = quantized(x without outliers) + A B^T + outliers

    page by page and per head; outliers of keys along tokens, of values along channels, as the
    grids of the quantizer lie.

    Args:
      bits: of the quantizer. rank: of the factors; 0 leaves them out.
      group: see `kivi`; pages are a multiple of it.
      outliers: numbers kept of each value token and of each key channel of a page, even; 0 leaves
        them out. Two are 3 % of 64.
      left: codec of the tokens' factor; None is bf16.

    Source: GEAR, arXiv 2403.05527; with `outliers=0` its GEAR-L.
    Differs from the paper: a page has factors and outliers of its own, where GEAR factors a whole
      prompt once (rank 4) and every chunk of new tokens after it (rank 2): short pages pay more
      bits for them. See `LowRank` and `Sparse`.

    Example:
      >>> method = gear(2, 64, rng=jax.random.key(0))
      >>> method.name, method.key.count, method.value.axis
      ('gear-2', 2, 'channels')
    """

    def side(name: str, axis: Literal["tokens", "channels"]) -> Codec:
        whole = axis == "channels" and head_dim % group
        codec: Codec = Uniform(bits, axis=axis, group=None if whole else group)
        if rank:
            start = fold(rng, "start", name)
            codec = Residual(codec, LowRank.random(head_dim, rank, rng=start, left=left))
        if outliers:
            codec = Sparse(codec, outliers, axis)
        return codec

    name = f"gear-{bits}" if outliers else f"gear-l-{bits}"
    return Method(side("key", "tokens"), side("value", "channels"), name=name)


def gear_coded(bits: int, head_dim: int, *, rng: jax.Array) -> Method:
    """GEAR-L with the tokens' factor at 4 bits, of which rank 4 takes a quarter of the bytes.

    Ours; the paper's factors are 16-bit numbers.

    Example:
      >>> gear_coded(2, 64, rng=jax.random.key(0)).key.second.left.bits
      4
    """
    left = Uniform(4, axis="tokens", group=64)
    method = gear(bits, head_dim, rng=rng, outliers=0, left=left)
    return Method(method.key, method.value, name=f"gear-l4-{bits}")
