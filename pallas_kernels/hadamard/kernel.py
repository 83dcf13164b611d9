"""The transform of rows: products with a small exact matrix, then sums and differences."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from pallas_kernels._call import Backend, call
from pallas_kernels.hadamard.product import is_power, walsh_operand, walsh_pieces

Array = jax.Array


def hadamard(
    x: Array,
    signs: Array | None = None,
    *,
    dtype=jnp.float32,
    rows: int = 64,
    channels: int = 64,
    warps: int = 4,
    backend: Backend = "triton",
) -> Array:
    """`H (signs * x) / sqrt(d)` of the last axis, H of +1 and -1 in the order of Sylvester.

    bf16 vectors lose nothing before the sum in float32; float32 vectors are read to 17 bits, an
    error of about 2e-6 of their length.

    Args:
      x: `[..., d]` bf16 or float32, d a power of two, 16 or more.
      signs: `[d]` of +1 and -1, or None.
      dtype: of the result.
      rows: of one program, a power of two; fewer where there are fewer.
      channels: most channels of one product; what is left is sums and differences.
      warps: of a Triton program.
      backend: "triton" on a GPU, "interpret" anywhere.
    Returns:
      `[..., d]`.
    Raises:
      ValueError: what `why_not` says.
    """
    reason = why_not(x, signs)
    if reason:
        raise ValueError(f"hadamard: {reason}")
    d, count = x.shape[-1], math.prod(x.shape[:-1])
    if count == 0:
        return jnp.zeros(x.shape, dtype)
    rows = min(rows, 2 ** (count.bit_length() - 1))
    size = min(channels, d)
    y = call(
        functools.partial(_body, rows=rows, size=size),
        x.reshape(count, d),
        walsh_operand(d, size, signs),
        name="hadamard",
        grid=(pl.cdiv(count, rows),),
        out_shape=jax.ShapeDtypeStruct((count, d), dtype),
        backend=backend,
        warps=warps,
    )
    return y.reshape(x.shape)


def why_not(x: Array, signs: Array | None = None) -> str | None:
    """Why the kernel does not take these arrays, or None."""
    d = x.shape[-1]
    if not is_power(d) or d < 16:
        return f"got {d} channels; expected a power of two, 16 or more; use a dense matrix"
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        return f"got {x.dtype}; expected bfloat16 or float32; convert first"
    if signs is not None and signs.shape != (d,):
        return f"got signs {signs.shape}; expected ({d},), the same for all; use jax.vmap"
    return None


def _body(x: Any, operand: Any, y: Any, *, rows: int, size: int) -> None:
    count, d = x.shape
    # The last program starts early and does rows again, rather than mask them.
    mine = pl.ds(jnp.minimum(pl.program_id(0) * rows, count - rows), rows)
    pieces = [pl.ds(start, size) for start in range(0, d, size)]
    sums = walsh_pieces([x[mine, c] for c in pieces], [operand[c, :] for c in pieces])
    for c, total in zip(pieces, sums, strict=True):
        y[mine, c] = (total * np.float32(d**-0.5)).astype(y.dtype)
