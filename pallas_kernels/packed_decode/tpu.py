"""`packed_decode` for a TPU: `S = q K^T`, softmax, `O = p V`, straight from words.

A point of the grid is a sequence, a head and a step of some pages. Which pages, and of which layer,
says the index map, from scalars that are there before the pages are: a table costs nothing, and
steps beyond a sequence's end neither copy nor compute.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels._call import Tile, call_tiles
from pallas_kernels.packed import Packed
from pallas_kernels.packed_decode.tpu_body import EMPTY, Plan, State, attend
from pallas_kernels.packed_decode.tpu_form import ROWS, Arrays, Form

Array = jax.Array

LOG2E = math.log2(math.e)


def packed_decode_tpu(
    q: Array,
    key: Packed,
    value: Packed,
    lengths: Array,
    *,
    page: int,
    layer: Array | int = 0,
    table: Array | None = None,
    starts: Array | None = None,
    position: Array | None = None,
    window: int | None = None,
    tokens: int = 2048,
    interpret: bool = False,
) -> tuple[Array, Array]:
    """As `packed_decode`, for a TPU: queries, weights and codes are exact to 2**-16.

    Scales are best bf16 or float32: those in fp16, and those with columns, are copied, one layer.

    Args:
      tokens: read per step of the grid, at least a page. The rest as `packed_decode`.
      interpret: run as XLA operations on any device, for tests.
    Raises:
      ValueError: what `why_not` says.
    """
    reason = why_not(key, value)
    if reason:
        raise ValueError(f"packed_decode on TPU: {reason}")
    b, h, g, _ = q.shape
    layer = jnp.asarray(layer, jnp.int32)
    arrays = Arrays(layer)
    forms = arrays.form(key), arrays.form(value)
    leaf = key[0].blocks[0].words[0]
    slots = leaf.shape[3] if table is None else table.shape[-1]
    together = _together(tokens // page, slots)
    plan = Plan(*forms, page, slots, together, table is not None, window)
    rows = 8 if g <= 8 else 16
    q = jnp.pad(q.astype(jnp.float32) * LOG2E, ((0, 0), (0, 0), (0, rows - g), (0, 0)))
    lengths = jnp.broadcast_to(lengths if lengths.ndim == 2 else lengths[:, None], (b, h))
    integers = {
        "layer": layer.reshape(1),
        "lengths": jnp.clip(lengths, 0, slots * page).astype(jnp.int32),
    }
    if table is not None:
        integers["table"] = jnp.clip(table, 0, leaf.shape[1] - 1).astype(jnp.int32)
    if window is not None:
        if starts is None or position is None:
            raise ValueError("window: got no starts or position; expected both; pass them")
        integers["starts"] = starts[layer].astype(jnp.int32)
        integers["position"] = position.astype(jnp.int32)
    one = lambda *size: Tile((None, None, *size), lambda b, h, i, _: (b, h, 0, 0))
    queries = _queries(q, forms[0])
    copies = together if plan.pool else 1
    args = {
        "weights": jnp.concatenate(arrays.weights),
        "queries": queries,
        "pages": [arrays.kept] * copies,
    }
    tiles = {
        "weights": Tile(None),
        "queries": [one(rows, x.shape[-1]) for x in queries],
        "pages": [
            [_tile(x, kind, plan, j) for x, kind in zip(arrays.kept, arrays.kinds, strict=True)]
            for j in range(copies)
        ],
    }
    columns = [piece.columns for piece in forms[1].pieces]
    shape = lambda *size: jax.ShapeDtypeStruct(size, jnp.float32)
    out, lse = call_tiles(
        functools.partial(attend, plan=plan),
        integers,
        args,
        tiles,
        name="packed_decode",
        grid=(b, h, -(-slots // plan.together)),
        out_shape=([shape(b, h, rows, c) for c in columns], shape(b, h, rows, 1)),
        out_tiles=([one(rows, c) for c in columns], one(rows, 1)),
        scratch=State([shape(rows, c) for c in columns], shape(rows, 1), shape(rows, 1)),
        interpret=interpret,
    )
    cut = [x[..., p.start : p.start + p.size] for x, p in zip(out, forms[1].pieces, strict=True)]
    lse = jnp.where(lse > EMPTY / 2, lse / np.float32(LOG2E), EMPTY)
    return jnp.concatenate(cut, -1)[:, :, :g], lse[:, :, :g, 0]


def why_not(key: Packed, value: Packed) -> str | None:
    """Why the TPU kernel does not take what the others take, or None."""
    for block in (block for part in (*key, *value) for block in part.blocks):
        for words in block.words:
            if words.dtype != jnp.uint16:
                return f"got words of {words.dtype}; expected uint16; pack with word=16"
            rows = words.shape[-1 if block.transposed else -2]
            if rows % 2:
                return f"got {rows} rows of words; expected an even number; use a larger page"
    return None


def _queries(q: Array, form: Form) -> list[Array]:
    """The channels of every piece where its codes have them, zeros elsewhere."""
    out, first = [], 0
    for piece in form.pieces:
        mine = q[..., first : first + piece.size]
        first += piece.size
        out.append(jnp.pad(mine, (*[(0, 0)] * 3, piece.around)))
    return out


def _tile(x: Array, kind: str, plan: Plan, j: int) -> Tile:
    """How page j of a step is cut out of an array; or all of its pages, where they lie in a row.

    Scales of one page are one row of a tile: the others are those of other pages, or heads.
    """
    lead = 3 if plan.pool else 4
    several = kind == "rows"
    pages = 1 if plan.pool else plan.together
    last = min(ROWS, x.shape[lead - 1]) if several else pages

    def index(b, h, i, numbers):
        length = numbers["lengths"][b, h]
        layer = numbers["layer"][0] if x.shape[0] > 1 else 0
        slot = plan.slot(i, j, length)
        rest = [0] * (x.ndim - lead)
        if plan.pool:
            return layer, numbers["table"][b, slot], h // ROWS if several else h, *rest
        return layer, b, h, slot // ROWS if several else plan.step(i, length), *rest

    return Tile((*[None] * (lead - 1), last, *x.shape[lead:]), index)


def _together(wanted: int, slots: int) -> int:
    """Pages of a step: a power of two that divides the slots and the rows of a tile."""
    both = math.gcd(slots, ROWS)
    return max(n for n in (1, 2, 4, 8, 16) if both % n == 0 and n <= max(1, wanted))
