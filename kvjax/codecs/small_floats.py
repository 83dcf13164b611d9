"""Numbers of 8 and 4 bits: their codes in integer words, by exact arithmetic on float32.

Kept as integers, bytes are true on every backend, and no array has an odd dtype.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from kvjax.core.codec import Array


@dataclasses.dataclass(frozen=True)
class Format:
    """A sign, an exponent and a mantissa: the magnitude code `e 2**mantissa + m` stands for

        (1 + m / 2**mantissa) 2**(e - bias),   or  m / 2**mantissa 2**(1 - bias)  where e = 0

    so codes are ordered as their values are, and `top` is that of `largest`, the greatest finite
    one. What follows it is NaN in E4M3 and infinity in E5M2; E2M1 has neither.
    """

    bits: int
    mantissa: int
    bias: int
    top: int
    largest: float
    nan: int | None


E4M3 = Format(bits=8, mantissa=3, bias=7, top=0x7E, largest=448.0, nan=0x7F)
E5M2 = Format(bits=8, mantissa=2, bias=15, top=0x7B, largest=57344.0, nan=0x7E)
E2M1 = Format(bits=4, mantissa=1, bias=1, top=0x7, largest=6.0, nan=None)
FORMATS = {"e4m3": E4M3, "e5m2": E5M2}

# Correctness of E2M1 amounts to this table. Ties go to the even code, so they fall where the
# bracket is: [a, b] holds both its edges, (a, b) neither; from 5 on everything saturates.
#
#   code        0          1           2           3           4         5         6        7
#   value       0         0.5          1          1.5          2         3         4        6
#   bucket  [0, .25]  (.25, .75)  [.75, 1.25] (1.25, 1.75) [1.75, 2.5] (2.5, 3.5) [3.5, 5] (5, inf)


def to_bits(x: Array, form: Format) -> Array:
    """The code of each number, sign bit included, in uint32: nearest value, ties to the even code.

    What rounds beyond `form.largest` is NaN in E4M3, infinity in E5M2 and the largest in E2M1,
    which has no other code (its NaN is that of the block's scale).

    Example:
      >>> import jax.numpy as jnp
      >>> to_bits(jnp.array([1.0, -448.0, 1e9]), E4M3)
      Array([ 56, 254, 127], dtype=uint32)
    """
    x = x.astype(jnp.float32)
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    magnitude = jnp.minimum(jnp.abs(x), 2 * form.largest)  # finite, so that it fits an integer
    lowest = 1 - form.bias  # exponent of the subnormal values
    exponent = ((bits >> 23) & 0xFF).astype(jnp.int32) - 127
    exponent = jnp.clip(exponent, lowest, 127)
    steps = jnp.round(magnitude * _power(form.mantissa - exponent))  # of the last place; half-even
    # A carry out of the mantissa is the next exponent by itself.
    code = ((exponent - lowest) << form.mantissa) + steps.astype(jnp.int32)
    code = jnp.minimum(code, form.top + (form.nan is not None)).astype(jnp.uint32)
    if form.nan is not None:
        code = jnp.where(jnp.isnan(x), form.nan, code).astype(jnp.uint32)
    return code | (bits >> 31) << (form.bits - 1)


def from_bits(codes: Array, form: Format) -> Array:
    """The numbers, float32, of codes with their sign bit.

    By way of float16, whose exponent is as wide or wider: its subnormals are ours, and the
    processor converts them; float32's it may flush to zero.

    Example:
      >>> import jax.numpy as jnp
      >>> from_bits(jnp.arange(8), E2M1)
      Array([0. , 0.5, 1. , 1.5, 2. , 3. , 4. , 6. ], dtype=float32)
    """
    codes = codes.astype(jnp.uint16)
    magnitude, sign = codes & (2 ** (form.bits - 1) - 1), codes >> (form.bits - 1)
    half = (magnitude << (10 - form.mantissa)) | (sign << 15)
    x = jax.lax.bitcast_convert_type(half, jnp.float16).astype(jnp.float32)
    x = x * 2.0 ** (15 - form.bias)
    return jnp.where(magnitude == form.nan, jnp.nan, x) if form is E4M3 else x


def scale_to_bits(largest: Array) -> Array:
    """E8M0 scale of an MX block: `2**(floor(log2 largest) - 2)` as its exponent + 127, uint8.

    2 is the exponent of 4, the highest power of two in E2M1. NaN and infinity give NaN (255). The
    lowest is 1, `2**-126`: the next one down would be subnormal in float32.
    """
    bits = jax.lax.bitcast_convert_type(largest.astype(jnp.float32), jnp.uint32)
    exponent = ((bits >> 23) & 0xFF).astype(jnp.int32)
    return jnp.where(exponent == 255, 255, jnp.maximum(exponent - 2, 1)).astype(jnp.uint8)


def scale_from_bits(codes: Array) -> Array:
    """The powers of two of E8M0 codes, float32; 255 is NaN."""
    codes = codes.astype(jnp.uint32)
    bits = jnp.where(codes == 0, 1 << 22, codes << 23)  # 2**-127 is subnormal
    bits = jnp.where(codes == 255, 0x7FC00000, bits).astype(jnp.uint32)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _power(exponent: Array) -> Array:
    """`2.0**exponent`, exact, for exponents of normal float32 numbers."""
    return jax.lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)
