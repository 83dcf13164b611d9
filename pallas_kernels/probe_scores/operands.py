"""What the passes are given: queries in rows, and the positions that make the mask."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.packed_decode.operands import Chunk

Array = jax.Array

NEVER = np.int32(2**31 - 1)  # the position of no key: after every query


def query_rows(q: Array, rows: int, dtype, cut: tuple[Chunk, ...]) -> list[Array]:
    """`[b, h, rows, channels]` per chunk: heads of a position side by side, then zeros.

    Args:
      q: `[b, h, g, n, d]`. rows: n g or more. dtype: of the keys.
    """
    b, h, g, n, d = q.shape
    q = q.swapaxes(2, 3).reshape(b, h, n * g, d)
    q = q.astype(jnp.float32 if dtype == jnp.float32 else jnp.bfloat16)
    out, start = [], 0
    for chunk in cut:
        piece = q[..., start : start + chunk.used]
        more = ((0, 0), (0, 0), (0, rows - n * g), (0, chunk.size - chunk.used))
        out.append(jnp.pad(piece, more))
        start += chunk.used
    return out


def row_positions(positions: Array | None, b: int, g: int, n: int, rows: int) -> Array:
    """`[b, rows]` int32, up to where each row sees: -1 for rows that are no query."""
    if positions is None:
        positions = jnp.full((b, n), NEVER - 1)
    by_row = jnp.repeat(positions.astype(jnp.int32), g, axis=1)
    return jnp.pad(by_row, ((0, 0), (0, rows - n * g)), constant_values=-1)


def key_positions(positions: Array | None, lengths: Array, keys: int, room: int) -> Array:
    """`[b, h, room]` int32, `NEVER` where there is no key.

    Args:
      positions: `[b, keys]` or `[b, h, keys]`, -1 for none. lengths: `[b, h]`.
    """
    order = jnp.arange(keys, dtype=jnp.int32)
    at = order[None, None] if positions is None else positions.astype(jnp.int32)
    at = at if at.ndim == 3 else at[:, None]
    real = (order < lengths[..., None]) & (at >= 0)
    more = ((0, 0), (0, 0), (0, room - keys))
    return jnp.pad(jnp.where(real, at, NEVER), more, constant_values=NEVER)
