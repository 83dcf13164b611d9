"""Weighted sums of packed values, `O^T = V^T p^T`, unit by unit."""

from __future__ import annotations

import dataclasses
import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import asm
from pallas_kernels.bits import base, unit_order
from pallas_kernels.packed import Part
from pallas_kernels.packed_decode.operands import chunks, leaves_constant
from pallas_kernels.packed_decode.read import Reader, Where

Array = jax.Array

HEADROOM = -9  # sums are kept times 2**HEADROOM: fp16 weights then reach 2**15


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ValueSum:
    """Running sums of one part of the values.

    Attributes:
      largest: of the token scales met; `const` and `out` are in units of it.
      const, zero: `[rows, n]`, weights times scales, and times zero points, summed over units.
      out: per block and chunk `[channels, n]`.
    """

    largest: Array
    const: Array
    zero: Array
    out: list[list[Array]]


def empty_sum(reader: Reader, part: Part, columns: int) -> ValueSum:
    """Of no tokens yet."""
    plan = reader.plan
    tile = jnp.zeros((plan.together * plan.rows, columns), jnp.float32)
    return ValueSum(
        largest=jnp.float32(1.0 if part.token_scale is None else 1e-30),
        const=tile,
        zero=tile,
        out=[
            [jnp.zeros((c.size, columns), jnp.float32) for c in chunks(block, plan.channels)]
            for block in part.blocks
        ],
    )


def add_values(
    reader: Reader,
    where: Where,
    part: Part,
    weights: list[Any],
    so_far: ValueSum,
    p: dict[int, Array],
    fade: Array,
) -> ValueSum:
    """The sums with some units of a step more.

    Args:
      weights: of the terms of each block, as `prepare_values` gives them.
      p: unit -> weights `[rows, n]`. fade: `[n]`, what earlier weights are worth by now.
    """
    plan = reader.plan
    largest, const, zero = so_far.largest, so_far.const, so_far.zero
    weighted, fade_out = p, fade
    if part.token_scale is not None:
        scales = {u: where.tokens(part.token_scale, part.column, u) for u in p}
        most = functools.reduce(jnp.maximum, [jnp.abs(s) for s in scales.values()]).max(0)
        largest = jnp.maximum(so_far.largest, most)
        weighted = {u: x * (scales[u] / largest)[:, None] for u, x in p.items()}
        fade_out = fade * (so_far.largest / largest)
    if leaves_constant(part):
        const = const * fade_out[None, :] + functools.reduce(operator.add, weighted.values())
    if part.token_zero is not None:
        zero = zero * fade[None, :]
        for u, x in p.items():
            z = where.tokens(part.token_zero, part.column, u)
            zero = asm.fma(x, z[:, None], zero, plan.native)
    out: list[list[Array]] = []
    for block, weight, sums in zip(part.blocks, weights, so_far.out, strict=True):
        terms = weight.shape[0] - 2
        dtype = jnp.bfloat16 if block.bits == 16 else jnp.float16
        out.append([])
        for chunk, acc in zip(chunks(block, plan.channels), sums, strict=True):
            words = reader.words(where, block, chunk, transposed=True)
            acc = acc * fade_out[None, :]
            for u in unit_order(block.bits, plan.unit_bits, p):
                e = base(block.bits, u, plan.unit_bits)[1]
                size = np.float32(2.0 ** (24 - e + HEADROOM))
                for t, y in zip(range(terms), words.operands(u), strict=True):
                    x = (weighted[u] * (weight[t] * size)).astype(dtype)
                    acc = acc + jnp.dot(y, x, preferred_element_type=jnp.float32)
            out[-1].append(acc)
    return ValueSum(largest, const, zero, out)


def write_sum(part: ValueSum, weights: list[Any], total: Array, out: list[list[Any]], at) -> None:
    """Puts normalized sums where they belong.

    Args:
      total: `[n]`, sum of the weights p.
      out: references per block and chunk. at: first indices into them.
    """
    zero = part.zero.sum(0) / total
    mass = part.const.sum(0) * part.largest / total
    for sums, weight, refs in zip(part.out, weights, out, strict=True):
        count = weight.shape[0]
        scale = weight[count - 2] * (2.0**-HEADROOM * part.largest) / total
        shift = weight[count - 1] * mass + zero
        for acc, ref in zip(sums, refs, strict=True):
            ref[(*at, slice(None), slice(None))] = acc * scale[None, :] + shift[None, :]
