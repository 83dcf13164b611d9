"""Polar coordinates of the pairs that RoPE turns: for keys, without a rotation of ours."""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal

import jax.numpy as jnp

from kvjax.codecs.polar import midpoints, sector, select
from kvjax.codecs.uniform import check_page
from kvjax.core.codec import Array, Codec
from kvjax.core.errors import InputError
from kvjax.core.pytree import pytree, static
from kvjax.core.storage import narrow, widen
from pallas_kernels import planes


@pytree
class PolarPairsCode:
    """Words of the radii and of the angles; r_hat = (words) * scale + low, pair by pair."""

    radius_words: tuple[Array, ...]
    angle_words: tuple[Array, ...]
    scale: Array
    low: Array


@pytree
class PolarPairs(Codec):
    """Pairs of channels that RoPE turns together, as a radius and an angle. For keys.

        (x_j, x_k) = r (cos theta, sin theta)
        r:      integers of `radius_bits`, min/max over the tokens of a page, per pair
        theta:  the midpoint of one of `2**angle_bits` equal cells of [0, 2 pi)

    `(radius_bits + angle_bits) / 2` bits per value, and a scale and minimum per pair and page. No
    rotation: a channel that is an outlier has a partner that is none, and RoPE spreads the two
    over a ring, with radii that vary little along the tokens.

    Args:
      radius_bits, angle_bits: 1 to 8.
      pairing: "halves" pairs channel i with i + d / 2, as Hugging Face's RoPE does; "adjacent"
        pairs 2 i with 2 i + 1.
      scale_dtype: of scale and minimum; beyond its range they become infinite.

    Source: PolarQuant, arXiv 2502.00527.
    Differs from the paper: of which we had the abstract and the setting, not the details. Ours are
    the page as the group of tokens that shares a scale, a minimum beside the scale (radii far from
    zero then lose no levels), and decoding by selects where the paper looks up query products.

    Example:
      >>> import jax.numpy as jnp
      >>> codec = PolarPairs(radius_bits=4, angle_bits=2)
      >>> codec.decode(codec.encode(jnp.full((16, 2), 3.0)))[0].round(2)
      Array([3., 3.], dtype=float32)
    """

    radius_bits: int = static(default=4)
    angle_bits: int = static(default=4)
    pairing: Literal["halves", "adjacent"] = static(default="halves")
    scale_dtype: jnp.dtype = static(default=jnp.dtype("float16"))
    transposed: bool = static(default=False)

    def __post_init__(self):
        object.__setattr__(self, "scale_dtype", jnp.dtype(self.scale_dtype))
        if not {self.radius_bits, self.angle_bits} <= set(planes.PLANES):
            raise InputError(
                "bits",
                got=f"{self.radius_bits} of radius, {self.angle_bits} of angle",
                expected="1 to 8 each",
                fix="choose such widths",
            )
        if self.pairing not in ("halves", "adjacent"):
            raise InputError(
                "pairing", got=repr(self.pairing), expected="'halves' or 'adjacent'", fix="name one"
            )

    def check(self, head_dim: int, page: int) -> None:
        check_page(page, self.radius_bits)
        check_page(page, self.angle_bits)
        if head_dim % 2:
            raise InputError(
                "head_dim", got=head_dim, expected="an even number", fix="pairs need two channels"
            )

    def transpose_planes(self) -> PolarPairs:
        return dataclasses.replace(self, transposed=True)

    def encode(self, x: Array, positions: Array | None = None) -> PolarPairsCode:
        x = x.astype(jnp.float32)
        halves = self.pairing == "halves"
        a, b = jnp.split(x, 2, axis=-1) if halves else (x[..., ::2], x[..., 1::2])
        r = jnp.hypot(a, b)  # [..., t, d / 2]
        levels = 2**self.radius_bits - 1
        low = narrow(r.min(-2), self.scale_dtype)  # [..., d / 2]
        scale = narrow((r.max(-2) - r.min(-2)) / levels, self.scale_dtype)
        steps = _rows(widen(scale))
        codes = jnp.round((r - _rows(widen(low))) / jnp.where(steps == 0, 1, steps))
        codes = jnp.clip(codes, 0, levels).astype(jnp.uint32)
        angles = sector(a, b, self.angle_bits)
        pack = functools.partial(planes.pack, transposed=self.transposed)
        return PolarPairsCode(
            pack(codes, self.radius_bits), pack(angles, self.angle_bits), scale, low
        )

    def decode(self, code: PolarPairsCode) -> Array:
        unpack = functools.partial(planes.unpack, transposed=self.transposed)
        r = unpack(code.radius_words, self.radius_bits).astype(jnp.float32)
        r = r * _rows(widen(code.scale)) + _rows(widen(code.low))  # [..., t, d / 2]
        codes, angles = unpack(code.angle_words, self.angle_bits), midpoints(self.angle_bits)
        a, b = (r * select(f(angles), codes) for f in (jnp.cos, jnp.sin))
        if self.pairing == "halves":
            return jnp.concatenate([a, b], -1)
        return jnp.stack([a, b], -1).reshape(*r.shape[:-1], 2 * r.shape[-1])


def _rows(a: Array) -> Array:
    """One per channel, `[..., d]`, against `[..., t, d]`."""
    return a[..., None, :]
