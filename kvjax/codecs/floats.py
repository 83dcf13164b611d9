"""Floats of few bits: FP8, and the 4-bit block formats NVFP4 and MXFP4."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax.numpy as jnp

from kvjax.codecs.small_floats import (
    E2M1,
    E4M3,
    FORMATS,
    from_bits,
    scale_from_bits,
    scale_to_bits,
    to_bits,
)
from kvjax.codecs.uniform import check_page
from kvjax.core.codec import Array, Codec
from kvjax.core.errors import InputError
from kvjax.core.pytree import pytree, static
from kvjax.core.storage import narrow, widen
from pallas_kernels import planes


@pytree
class Float8Code:
    """x_hat = (number of the word) * scale; scale is None for plain casts."""

    words: tuple[Array, ...]
    scale: Array | None


@pytree
class Float8(Codec):
    """8-bit floats, as they are or with a scale per token or block of channels.

        x_hat = fp8(x / scale) * scale,   scale = max|x| / largest

    with `largest` 448 in E4M3 (3 bits of mantissa) and 57344 in E5M2 (2 bits). With a scale nothing
    exceeds `largest`; a NaN or infinity makes its group NaN. Unscaled, it is JAX's cast: what is
    too large becomes NaN (E4M3) or infinity (E5M2), and does not saturate in silence.

    Args:
      kind: "e4m3" or "e5m2".
      scaled: keep a scale per group; False casts.
      group: channels that share a scale; None is the whole token.
      scale_dtype: "float32" or "bfloat16". Float16 has less range than the data may have.

    Source: OCP 8-bit floating point specification; arXiv 2209.05433.

    Example:
      >>> import jax.numpy as jnp
      >>> codec = Float8("e4m3")
      >>> codec.decode(codec.encode(jnp.array([[448.0, 3.1]] * 16)))[0]
      Array([448.,   3.], dtype=float32)
    """

    kind: Literal["e4m3", "e5m2"] = static(default="e4m3")
    scaled: bool = static(default=True)
    group: int | None = static(default=None)
    scale_dtype: jnp.dtype = static(default=jnp.dtype("float32"))
    transposed: bool = static(default=False)

    def __post_init__(self):
        object.__setattr__(self, "scale_dtype", jnp.dtype(self.scale_dtype))
        if self.kind not in FORMATS:
            raise InputError(
                "kind", got=repr(self.kind), expected="'e4m3' or 'e5m2'", fix="name one of them"
            )
        if str(self.scale_dtype) not in ("float32", "bfloat16"):
            raise InputError(
                "scale_dtype",
                got=self.scale_dtype,
                expected="float32 or bfloat16",
                fix="float16 would overflow where these floats do not",
            )
        if self.group is not None and (self.group < 1 or not self.scaled):
            raise InputError(
                "group",
                got=f"{self.group} with scaled={self.scaled}",
                expected="1 or more channels that share a scale, or None",
                fix="None takes the whole token",
            )

    def check(self, head_dim: int, page: int) -> None:
        check_page(page, 8)
        _check_block(self.group or head_dim, head_dim)

    def transpose_planes(self) -> Float8:
        return dataclasses.replace(self, transposed=True)

    def encode(self, x: Array, positions: Array | None = None) -> Float8Code:
        form, scale = FORMATS[self.kind], None
        x = x.astype(jnp.float32)
        if self.scaled:
            blocks = _blocks(x, self.group or x.shape[-1])  # [..., t, n, w]
            scale = narrow(jnp.abs(blocks).max(-1) / form.largest, self.scale_dtype)  # [..., t, n]
            x = (blocks / _divisor(widen(scale))).reshape(x.shape)
        words = planes.pack(to_bits(x, form), 8, transposed=self.transposed)
        return Float8Code(words, scale)

    def decode(self, code: Float8Code) -> Array:
        codes = planes.unpack(code.words, 8, transposed=self.transposed)
        x = from_bits(codes, FORMATS[self.kind])
        return x if code.scale is None else _times(x, widen(code.scale))


@pytree
class Float4Code:
    """x_hat = (number of the word) * scale * page_scale; page_scale is None in MXFP4."""

    words: tuple[Array, ...]
    scale: Array
    page_scale: Array | None


@pytree
class Float4(Codec):
    """E2M1 numbers (0, .5, 1, 1.5, 2, 3, 4, 6 and their negatives) with a scale per block.

        nvfp4: blocks of 16, scale E4M3(max|x| / 6 / page_scale), page_scale = max|page| / (6 448)
        mxfp4: blocks of 32, scale 2**(floor(log2 max|x|) - 2), an E8M0 byte

    4.5 bits per value with a float32 per page, and 4.25. Page_scale makes the largest block scale
    448, so scales never overflow. Elements saturate at 6 scales: in nvfp4 what a scale rounded
    down leaves, at most 6.4 (an error of 6 %); in mxfp4 all from 6 to 8 (up to 25 %), which is the
    rule of the specification. In nvfp4, blocks 2**-15 under the largest of their page lose
    precision, for their scales are subnormal, and those 2**-19 under it are zeros.

    A NaN or infinity makes its block NaN (mxfp4), or its page (nvfp4, whose float32 is shared).
    Blocks under 1.2e-38 (mxfp4), and pages under 3.2e-35 (nvfp4), may become zeros.

    Source: NVIDIA's NVFP4; OCP Microscaling Formats (MX) v1.0, section 6.3.
    Differs from the source: page_scale belongs to a page of one head, where NVFP4 has one float32
    for the whole tensor, which a cache that grows does not know in advance.

    Example:
      >>> import jax.numpy as jnp
      >>> codec = Float4("mxfp4")
      >>> codec.decode(codec.encode(jnp.full((16, 32), 2.9)))[0, 0]
      Array(3., dtype=float32)
    """

    kind: Literal["nvfp4", "mxfp4"] = static(default="nvfp4")
    transposed: bool = static(default=False)

    def __post_init__(self):
        if self.kind not in ("nvfp4", "mxfp4"):
            raise InputError(
                "kind", got=repr(self.kind), expected="'nvfp4' or 'mxfp4'", fix="name one of them"
            )

    @property
    def block(self) -> int:
        """Channels that share a scale."""
        return 16 if self.kind == "nvfp4" else 32

    def check(self, head_dim: int, page: int) -> None:
        check_page(page, 4)
        _check_block(self.block, head_dim)

    def transpose_planes(self) -> Float4:
        return dataclasses.replace(self, transposed=True)

    def encode(self, x: Array, positions: Array | None = None) -> Float4Code:
        blocks = _blocks(x.astype(jnp.float32), self.block)  # [..., t, n, w]
        largest, page_scale = jnp.abs(blocks).max(-1), None  # [..., t, n]
        if self.kind == "mxfp4":
            scale = scale_to_bits(largest)
        else:
            page_scale = largest.max((-2, -1)) / (E2M1.largest * E4M3.largest)  # [...]
            share = largest / E2M1.largest / _divisor(page_scale[..., None])
            scale = to_bits(share, E4M3).astype(jnp.uint8)
        units = blocks / _divisor(self._scale(scale, page_scale))
        codes = to_bits(units.reshape(x.shape), E2M1)
        words = planes.pack(codes, 4, transposed=self.transposed)
        return Float4Code(words, scale, page_scale)

    def decode(self, code: Float4Code) -> Array:
        codes = planes.unpack(code.words, 4, transposed=self.transposed)
        return _times(from_bits(codes, E2M1), self._scale(code.scale, code.page_scale))

    def _scale(self, bits: Array, page_scale: Array | None) -> Array:
        """Float32 scales of the blocks, `[..., t, n]`, as the decoder sees them."""
        if page_scale is None:
            return scale_from_bits(bits)
        return from_bits(bits, E4M3) * page_scale[..., None, None]


def _blocks(x: Array, width: int) -> Array:
    return x.reshape(*x.shape[:-1], x.shape[-1] // width, width)


def _times(x: Array, scale: Array) -> Array:
    """`x: [..., t, d]` by a `scale: [..., t, n]` per block of channels."""
    return (_blocks(x, x.shape[-1] // scale.shape[-1]) * scale[..., None]).reshape(x.shape)


def _divisor(scale: Array) -> Array:
    """`scale[..., None]`, 1 where it is 0: a block of zeros has no scale."""
    return jnp.where(scale == 0, 1, scale)[..., None]


def _check_block(block: int, head_dim: int) -> None:
    if head_dim % block:
        raise InputError(
            "head_dim",
            got=f"{head_dim} with blocks of {block} channels",
            expected=f"a multiple of {block}",
            fix="choose another codec, or Split off the rest",
        )
