"""OSCAR's integers: each token clipped at an order statistic of its magnitudes, then an affine grid
with a zero point that is not rounded.

Use it under a rotation, at 2 bits, where the outermost values of a token would waste the range.
For rotated vectors `Normalized(Codebook)` has less error at 2 bits: 0.116, where clips of 0.96 and
0.92 have 0.156 and 0.127.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from kvjax.codecs.uniform import check_page
from kvjax.core.codec import Array, Codec, matmul, matmul_t
from kvjax.core.errors import InputError
from kvjax.core.pytree import pytree, static
from pallas_kernels import planes

Rule = Literal["min_max", "lloyd_max"]

# The released "Lloyd-Max": the thresholds of the optimum for standard normal values, and an even
# grid in place of its levels, as wide as the outermost two before the gain.
_THRESHOLDS = (-0.98107, 0.0, 0.98107)
_SPAN = 3.0191


@pytree
class ClippedCode:
    """x_hat = (words - zero) * scale, group by group; scale and zero are `[..., t, n]`."""

    words: tuple[Array, ...]
    scale: Array
    zero: Array


@pytree
class ClippedUniform(Codec):
    """Affine quantization of each token to `2**bits` levels, after clipping.

        limit = sort(|x|)[int(clip * d)]  over all channels,   x <- clamp(x, -limit, limit)
        s = (max - min) / (2**bits - 1),   z = -min / s        over a group, z not rounded
        c = floor(x / s + z + 1/2),        x_hat = (c - z) s

    The rule "lloyd_max" (2 bits) replaces the last two lines, with mean and std over a group, by

        c = how many of -0.98107, 0, 0.98107 lie below (x - mean) / std
        s = gain 3.0191 / 3 std,   z = 3/2 - mean / s

    whose levels, 0.584 and 1.751 std at the usual gain, are not the optimum's (0.453 and 1.510).

    Zero vectors come back as exact zeros, and constant groups (s = 0) as their value. So does, as
    its middle, a group whose range is so far from zero that z no longer resolves a step: beyond
    2048 steps in float16. NaN or infinity in a vector makes that vector NaN, and no other. In
    float16 a scale beyond 65504 reads as infinite or NaN.

    Args:
      bits: 1 to 8.
      clip: which order statistic limits a token, in (0, 1]; 1 does not clip. OSCAR: 0.96 for keys,
        0.92 or 0.96 for values.
      group: channels that share a scale; None takes all of them.
      rule: "min_max" or "lloyd_max".
      gain: stretch of the levels of "lloyd_max"; "min_max" has none.
      scale_dtype: "float16" (the 2.28 bits of the paper) or "float32" (the released setting, 0.25
        bits more at 128 channels).

    Source: OSCAR, arXiv 2605.17757, and its released kernels.
    Differs from the paper: "min_max" codes are chosen for scale and zero as they are stored, which
    is the same in float32; constant groups are exact (the released script: s of at least 1e-8).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> x = jax.random.normal(jax.random.key(0), (16, 128))
      >>> codec = ClippedUniform(2, clip=0.96)
      >>> round(float(((codec.decode(codec.encode(x)) - x) ** 2).mean()), 2)
      0.16
    """

    bits: int = static(default=2)
    clip: float = static(default=0.96)
    group: int | None = static(default=None)
    rule: Rule = static(default="min_max")
    gain: float = static(default=1.16)
    scale_dtype: jnp.dtype = static(default=jnp.dtype("float16"))
    transposed: bool = static(default=False)

    def __post_init__(self):
        object.__setattr__(self, "scale_dtype", jnp.dtype(self.scale_dtype))
        wrong = lambda what, got, expected, fix: InputError(
            what, got=got, expected=expected, fix=fix
        )
        if self.rule not in get_args(Rule):
            raise wrong("rule", repr(self.rule), f"one of {get_args(Rule)}", "name one of them")
        if self.rule == "lloyd_max" and self.bits != 2:
            raise wrong("bits", self.bits, "2 for lloyd_max", "use Codebook for other widths")
        if self.bits not in planes.PLANES:
            raise wrong("bits", self.bits, "a whole number, 1 to 8", "choose such a width")
        if not 0 < self.clip <= 1:
            raise wrong("clip", self.clip, "in (0, 1]", "1 does not clip")
        if self.group is not None and self.group < 1:
            raise wrong("group", self.group, "1 or more, or None", "None takes all channels")
        if not 0 < self.gain < 4:
            raise wrong("gain", self.gain, "between 0 and 4", "1.16 is OSCAR's")
        if self.scale_dtype not in (jnp.float16, jnp.float32):
            raise wrong("scale_dtype", self.scale_dtype, "float16 or float32", "use one of them")

    def check(self, head_dim: int, page: int) -> None:
        check_page(page, self.bits)
        if self.group is not None and head_dim % self.group:
            raise InputError(
                "group of channels",
                got=f"{self.group} on {head_dim}",
                expected=f"a divisor of {head_dim}",
                fix="choose another group",
            )

    def transpose_planes(self) -> ClippedUniform:
        return dataclasses.replace(self, transposed=True)

    def encode(self, x: Array, positions: Array | None = None) -> ClippedCode:
        x = self._grouped(self._clipped(x.astype(jnp.float32)))  # [..., t, n, w]
        lo, hi = x.min(-1, keepdims=True), x.max(-1, keepdims=True)
        middle, levels = (lo + hi) / 2, 2**self.bits - 1
        if self.rule == "min_max":
            scale, zero, flat = self._stored(_divide(hi - lo, levels), 0, lo, middle)
            codes = jnp.clip(jnp.floor(x / _nonzero(scale) + zero + 0.5), 0, levels)
        else:
            mean, std = x.mean(-1, keepdims=True), x.std(-1, keepdims=True)
            scale, zero, flat = self._stored(_SPAN / 3 * self.gain * std, 1.5, mean, middle)
            z = (x - mean) / _nonzero(std)
            codes = sum(((z > t).astype(jnp.float32) for t in _THRESHOLDS), jnp.zeros_like(z))
        codes = jnp.where(flat | jnp.isnan(x), 0, codes)
        codes = self._ungrouped(codes).astype(jnp.uint32)  # [..., t, d]
        words = planes.pack(codes, self.bits, transposed=self.transposed)
        keep = lambda a: a[..., 0].astype(self.scale_dtype)
        return ClippedCode(words, keep(scale), keep(zero))

    def decode(self, code: ClippedCode) -> Array:
        scale, zero = (a[..., None] for a in _side(code))  # [..., t, n, 1]
        return self._ungrouped((self._grouped(self._codes(code)) - zero) * scale)

    def logits(self, prepared: Array, code: ClippedCode) -> Array:
        if code.scale.shape[-1] > 1:
            return super().logits(prepared, code)
        scale, zero = (a.swapaxes(-1, -2) for a in _side(code))  # [..., 1, t]
        by_codes = matmul_t(prepared, self._codes(code))  # [..., g, t]
        return (by_codes - prepared.sum(-1, keepdims=True) * zero) * scale

    def accumulate(self, p: Array, code: ClippedCode) -> Array:
        if code.scale.shape[-1] > 1:
            return super().accumulate(p, code)
        scale, zero = (a.swapaxes(-1, -2) for a in _side(code))  # [..., 1, t]
        p = p * scale
        return matmul(p, self._codes(code)) - (p * zero).sum(-1, keepdims=True)

    def _clipped(self, x: Array) -> Array:
        d = x.shape[-1]
        count = max(d - int(self.clip * d), 1)  # sorted from above, index int(clip d) is this one
        size = jnp.abs(x)
        largest = size.max(-1, keepdims=True)
        limit = largest if count == 1 else jax.lax.top_k(size, count)[0][..., -1:]
        limit = jnp.where(jnp.isfinite(largest), limit, jnp.nan)  # or infinity would be clipped
        return jnp.clip(x, -limit, limit)

    def _stored(self, step: Array, offset: float, at: Array, middle: Array) -> tuple[Array, ...]:
        """Scale, zero and where there is no step: levels so that `at` has the code `offset`.

        Both are rounded as the decoder will see them. Where no step is left of them, code 0 becomes
        the middle, exactly.
        """
        kept = lambda a: a.astype(self.scale_dtype).astype(jnp.float32)
        scale = kept(step)
        zero = offset - at / _nonzero(scale)
        flat = (scale == 0) | (jnp.abs(zero) > 2 / float(jnp.finfo(self.scale_dtype).eps))
        return jnp.where(flat, kept(middle), scale), jnp.where(flat, -1, kept(zero)), flat

    def _codes(self, code: ClippedCode) -> Array:
        codes = planes.unpack(code.words, self.bits, transposed=self.transposed)
        return codes.astype(jnp.float32)

    def _grouped(self, x: Array) -> Array:
        *lead, d = x.shape
        width = self.group or d
        return x.reshape(*lead, d // width, width)

    def _ungrouped(self, x: Array) -> Array:
        *lead, n, width = x.shape
        return x.reshape(*lead, n * width)


def _side(code: ClippedCode) -> tuple[Array, Array]:
    return code.scale.astype(jnp.float32), code.zero.astype(jnp.float32)


def _nonzero(a: Array) -> Array:
    return jnp.where(a == 0, 1, a)


def _divide(a: Array, by: int) -> Array:
    """`a / by`, rounded once: XLA turns division by a constant into a product with its rounded
    inverse, which is off by a last bit for a third of the values. This divisor is no constant."""
    return a / (by + 0 * a)
