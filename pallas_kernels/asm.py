"""Inline assembly that the compiler would not find by itself, each with its twin in jnp.

`native=True` is for Triton on NVIDIA; the twins run everywhere and say what is meant. Words are
uint16, and the assembly takes two of them in a 32-bit register at once.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plt

Array = jax.Array


def exp2(x: Array, native: bool) -> Array:
    """`2**x` of float32, approximate on a GPU: 2 units in the last place, subnormals are 0."""
    if not native:
        return jnp.exp2(x)
    return _asm("ex2.approx.ftz.f32 $0, $1;", [x], jnp.float32, "=f,f", 1)


def fma(a: Array, b: Array, c: Array, native: bool) -> Array:
    """`a * b + c` of float32, broadcast: XLA's Triton does not contract it."""
    if not native:
        return a * b + c
    shape = jnp.broadcast_shapes(a.shape, b.shape, c.shape)
    args = [jnp.broadcast_to(x, shape) for x in (a, b, c)]
    return _asm("fma.rn.f32 $0, $1, $2, $3;", args, jnp.float32, "=f,f,f,f", 1)


def as_subnormal(words: Array, mask: int, native: bool) -> Array:
    """`words & mask` read as float16: an integer k below 1024 is the number `k * 2**-24`."""
    if not native:
        return jax.lax.bitcast_convert_type(words & words.dtype.type(mask), jnp.float16)
    both = mask * 0x10001
    return _asm(f"and.b32 $0, $1, 0x{both:08x};", [words], jnp.float16, "=r,r", 2)


def shift(words: Array, right: int, native: bool) -> Array:
    """`words >> right`, or `<< -right`. On a GPU bits cross between the two halves of a register:
    those within `|right|` of the end that is shifted into are not to be used. The result is signed
    there, which only assembly reads."""
    if right == 0:
        return words
    if not native:
        by = words.dtype.type(abs(right))
        return words >> by if right > 0 else words << by
    op = "shr.b32" if right > 0 else "shl.b32"
    return _asm(f"{op} $0, $1, {abs(right)};", [words], jnp.int16, "=r,r", 2)


def xor(a: Array, b: Array, native: bool) -> Array:
    """`a ^ b` of words."""
    if not native:
        return a ^ b
    return _asm("xor.b32 $0, $1, $2;", [a, b], jnp.int16, "=r,r,r", 2)


def _asm(code: str, args: list[Array], dtype, constraints: str, pack: int) -> Array:
    [out] = plt.elementwise_inline_asm(
        code,
        args=args,
        constraints=constraints,
        pack=pack,
        result_shape_dtypes=[jax.ShapeDtypeStruct(args[0].shape, dtype)],
    )
    return out
