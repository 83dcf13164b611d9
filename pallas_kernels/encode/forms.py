"""What a page is turned into: a transform of its channels, then one of two kinds of codes."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array
GAINS = ("none", "norm", "unbiased", "least_squares")

_static: Any = functools.partial(dataclasses.field, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dense:
    """`y = A x` with `matrix` A `[d, d]`."""

    matrix: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Walsh:
    """`y = H (signs * x) / sqrt(d)` with signs `[d]` of +1 and -1, or None."""

    signs: Array | None = None


Transform = Dense | Walsh | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Levels:
    """Codes of `u = y / |y|`, each coordinate's the index of the level nearest to it.

    With `u_hat = levels[codes]` the scale of a token is

        none:           |y|
        norm:           |y| / |u_hat|
        unbiased:       |y| / <u, u_hat>
        least_squares:  |y| <u, u_hat> / |u_hat|^2

    Attributes:
      levels: `[2**bits]` float32, sorted and symmetric about 0: only the upper half is read.
      bits: 1 to 4.
      gain: one of `GAINS`.
      scale_dtype: of the scales; those of bf16 are kept as their bits, in uint16.
    """

    levels: Array
    bits: int = _static()
    gain: str = _static(default="none")
    scale_dtype: str = _static(default="bfloat16")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Grid:
    """Whole numbers, with a scale and a zero point per token (and per `group` channels of it).

        code = round((y - zero) / scale),   zero = min y,   scale = (max y - min y) / (2**bits - 1)

    Attributes:
      bits: 1 to 8.
      group: channels that share a scale, a power of two; None for all.
      clip: share of the range kept, around its middle, in (0, 1]; values outside saturate.
    """

    bits: int = _static()
    group: int | None = _static(default=None)
    clip: float = _static(default=1.0)
    scale_dtype: str = _static(default="float16")


class Encoded(NamedTuple):
    """Codes of pages.

    Attributes:
      words: as `planes.pack` gives them, one array per plane width.
      scale: `[..., t]` (Levels), or `[..., t, groups]` (Grid).
      zero: as scale (Grid), or None (Levels).
    """

    words: tuple[Array, ...]
    scale: Array
    zero: Array | None


def narrow(x: Array, dtype: str) -> Array:
    """x as it is kept: the bits of a bf16 number as uint16, other dtypes as they are."""
    if jnp.dtype(dtype) == jnp.bfloat16:
        return jax.lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16)
    return x.astype(dtype)


def kept_dtype(dtype: str) -> jnp.dtype:
    """The dtype of `narrow(x, dtype)`."""
    return jnp.dtype(jnp.uint16 if jnp.dtype(dtype) == jnp.bfloat16 else dtype)
