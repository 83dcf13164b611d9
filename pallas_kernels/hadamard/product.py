"""Matrix products of float32 accuracy on the units for bf16, and the transform made of them.

A float32 number is the sum of two bf16 numbers to 17 bits; each half has a product of its own. The
transform's matrix is exact in bf16, so that bf16 vectors take one product and lose nothing.
"""

from __future__ import annotations

import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


def split(x: Array) -> list[Array]:
    """bf16 summands of x, the large one first; of a bf16 array, itself."""
    if x.dtype == jnp.bfloat16:
        return [x]
    x = x.astype(jnp.float32)
    high = x.astype(jnp.bfloat16)
    return [high, (x - high.astype(jnp.float32)).astype(jnp.bfloat16)]


def product(x: list[Array], matrix: list[Array]) -> Array:
    """`x @ matrix` in float32 from the summands of both, without those of second order."""
    dot = functools.partial(jnp.dot, preferred_element_type=jnp.float32)
    pairs = [(a, b) for i, a in enumerate(x) for j, b in enumerate(matrix) if i + j < 2]
    return functools.reduce(operator.add, [dot(a, b) for a, b in pairs])


def cuts(d: int, most: int) -> list[tuple[int, int]]:
    """(start, size) of pieces of d channels: powers of two, at most `most` each.

    Example:
      >>> cuts(96, 64), cuts(256, 128)
      ([(0, 64), (64, 32)], [(0, 128), (128, 128)])
    """
    pieces, start = [], 0
    while start < d:
        size = min(most, 2 ** ((d - start).bit_length() - 1))
        pieces.append((start, size))
        start += size
    return pieces


def is_power(d: int) -> bool:
    """Whether d is a power of two."""
    return d > 0 and d & (d - 1) == 0


def walsh(size: int) -> np.ndarray:
    """`[size, size]` of +1 and -1, in the order of Sylvester (Kronecker powers).

    Example:
      >>> walsh(4).tolist()
      [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]
    """
    matrix = np.ones((1, 1), np.int32)
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


def walsh_operand(d: int, size: int, signs: Array | None) -> Array:
    """`[d, size]` bf16: for each piece of `size` channels, its signs times the matrix."""
    tall = jnp.asarray(np.tile(walsh(size), (d // size, 1)), jnp.bfloat16)
    return tall if signs is None else tall * signs.astype(jnp.bfloat16)[:, None]


def walsh_pieces(x: list[Array], operands: list[Array]) -> list[Array]:
    """The transform, times the square root of d, of equal pieces of the channels.

    Args:
      x: `[rows, size]` each. operands: `[size, size]` each, pieces of `walsh_operand`.
    """
    y = [product(split(a), [b]) for a, b in zip(x, operands, strict=True)]
    width = 1
    while width < len(y):
        for i in range(len(y)):
            if not i & width:
                y[i], y[i + width] = y[i] + y[i + width], y[i] - y[i + width]
        width *= 2
    return y
