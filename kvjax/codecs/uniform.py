"""Integers on a uniform grid, with a scale and a zero point per group: int8 down to 1 bit.

Use it alone as the naive baseline, per channel for keys (KIVI), or under a rotation. For rotated,
normalized vectors `Codebook` has less error at the same bits.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax.numpy as jnp

from kvjax.core.codec import Array, Codec, matmul, matmul_t
from kvjax.core.errors import InputError
from kvjax.core.pytree import pytree, static
from pallas_kernels import planes


@pytree
class UniformCode:
    """x = (words) * scale + zero, group by group; zero is None for a symmetric grid."""

    words: tuple[Array, ...]
    scale: Array
    zero: Array | None


@pytree
class Uniform(Codec):
    """Affine quantization to `2**bits` levels.

        c = round((x - zero) / scale),   x_hat = c * scale + zero,   c in [0, 2**bits)

    with `zero = min`, `scale = (max - min) / (2**bits - 1)` over a group (asymmetric), or the
    grid `scale * (c - (2**bits - 1) / 2)` with `scale = 2 max|x| / (2**bits - 1)` (symmetric).

    Args:
      bits: 1 to 8.
      axis: what a group runs along. "channels": each token has a scale per `group` channels;
        "tokens": each channel has a scale per `group` tokens of the page.
      group: length of a group; None takes the whole axis.
      clip: share of the range kept, in (0, 1]; values outside saturate.
      symmetric: no zero point, levels mirrored about 0.
      scale_dtype: dtype of scale and zero, counted in the true bits.

    Source: the common affine quantizer; per-channel keys are KIVI's (arXiv 2402.02750).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> x = jax.random.normal(jax.random.key(0), (16, 64))
      >>> codec = Uniform(bits=8)
      >>> bool(jnp.abs(codec.decode(codec.encode(x)) - x).max() < 0.02)
      True
    """

    bits: int = static(default=8)
    axis: Literal["channels", "tokens"] = static(default="channels")
    group: int | None = static(default=None)
    clip: float = static(default=1.0)
    symmetric: bool = static(default=False)
    scale_dtype: jnp.dtype = static(default=jnp.dtype("float16"))
    transposed: bool = static(default=False)

    def __post_init__(self):
        object.__setattr__(self, "scale_dtype", jnp.dtype(self.scale_dtype))
        if self.bits not in planes.PLANES:
            raise InputError(
                "bits", got=self.bits, expected="a whole number, 1 to 8", fix="choose such a width"
            )
        if self.group is not None and self.group < 1:
            raise InputError(
                "group", got=self.group, expected="1 or more, or None", fix="None takes all"
            )
        if self.axis not in ("channels", "tokens"):
            raise InputError(
                "axis", got=self.axis, expected="'channels' or 'tokens'", fix="name one of them"
            )
        if not 0 < self.clip <= 1:
            raise InputError("clip", got=self.clip, expected="in (0, 1]", fix="1 keeps the range")

    def check(self, head_dim: int, page: int) -> None:
        check_page(page, self.bits)
        length = head_dim if self.axis == "channels" else page
        if self.group is not None and length % self.group:
            raise InputError(
                f"group of {self.axis}",
                got=f"{self.group} on {length}",
                expected=f"a divisor of {length}",
                fix="choose another group, page or codec",
            )

    def transpose_planes(self) -> Uniform:
        return dataclasses.replace(self, transposed=True)

    def encode(self, x: Array, positions: Array | None = None) -> UniformCode:
        x = self._grouped(x.astype(jnp.float32))  # [..., t, n, w] or [..., n, w, d]
        along = -1 if self.axis == "channels" else -2
        levels = 2**self.bits - 1
        if self.symmetric:
            half = jnp.abs(x).max(along, keepdims=True) * self.clip
            scale = self._stored(2 * half / levels)
            zero = None
            low = -scale * (levels / 2)
        else:
            lo, hi = x.min(along, keepdims=True), x.max(along, keepdims=True)
            middle, half = (hi + lo) / 2, (hi - lo) / 2 * self.clip
            scale = self._stored(2 * half / levels)
            low = zero = self._stored(middle - half)
        codes = jnp.round((x - low) / jnp.where(scale == 0, 1, scale))
        codes = self._ungrouped(jnp.clip(codes, 0, levels)).astype(jnp.uint32)  # [..., t, d]
        words = planes.pack(codes, self.bits, transposed=self.transposed)
        store = lambda a: a.squeeze(along).astype(self.scale_dtype)
        return UniformCode(words, store(scale), None if zero is None else store(zero))

    def decode(self, code: UniformCode) -> Array:
        along = -1 if self.axis == "channels" else -2
        scale, low = (jnp.expand_dims(a, along) for a in self._scale_and_low(code))
        return self._ungrouped(self._grouped(self._codes(code)) * scale + low)

    def logits(self, prepared: Array, code: UniformCode) -> Array:
        if not self._foldable(code):
            return super().logits(prepared, code)
        q, (scale, low) = prepared, self._scale_and_low(code)
        if self.axis == "channels":  # per token: scale the logits
            by_codes = matmul_t(q, self._codes(code))  # [..., g, t]
            return by_codes * scale.swapaxes(-1, -2) + q.sum(-1)[..., None] * low.swapaxes(-1, -2)
        # per channel: scale the query, once per page
        return matmul_t(q * scale, self._codes(code)) + matmul_t(q, low)

    def accumulate(self, p: Array, code: UniformCode) -> Array:
        if not self._foldable(code) or self.axis == "tokens":
            return super().accumulate(p, code)
        scale, low = (a.swapaxes(-1, -2) for a in self._scale_and_low(code))  # [..., 1, t]
        return matmul(p * scale, self._codes(code)) + (p * low).sum(-1, keepdims=True)

    def _codes(self, code: UniformCode) -> Array:
        codes = planes.unpack(code.words, self.bits, transposed=self.transposed)
        return codes.astype(jnp.float32)

    def _stored(self, a: Array) -> Array:
        """As the decoder will see it: codes are chosen for the rounded scale and zero."""
        return a.astype(self.scale_dtype).astype(jnp.float32)

    def _scale_and_low(self, code: UniformCode) -> tuple[Array, Array]:
        scale = code.scale.astype(jnp.float32)
        if code.zero is None:
            return scale, -scale * ((2**self.bits - 1) / 2)
        return scale, code.zero.astype(jnp.float32)

    def _foldable(self, code: UniformCode) -> bool:
        """One group on the axis, so that scales leave the inner loop."""
        return code.scale.shape[-1 if self.axis == "channels" else -2] == 1

    def _grouped(self, x: Array) -> Array:
        *lead, t, d = x.shape
        if self.axis == "channels":
            width = self.group or d
            return x.reshape(*lead, t, d // width, width)
        width = self.group or t
        return x.reshape(*lead, t // width, width, d)

    def _ungrouped(self, x: Array) -> Array:
        *lead, a, b, c = x.shape
        return x.reshape(*lead, a, b * c) if self.axis == "channels" else x.reshape(*lead, a * b, c)


def check_page(page: int, bits: int) -> None:
    """Raises `InputError` unless a page of codes fills whole words."""
    if not planes.fits(page, bits):
        raise InputError(
            "page",
            got=f"{page} tokens for {bits}-bit codes",
            expected="whole 16-bit words in each token plane",
            fix="use a page that is a multiple of 16",
        )
