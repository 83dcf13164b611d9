"""All logits of packed keys, `S^T = K q^T`, straight from the words.

The loop of `packed_decode` without its softmax and its values: what a vector search over packed
keys pays, and what scores of eviction from packed history need.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels._call import Backend, call
from pallas_kernels.packed import Packed
from pallas_kernels.packed_decode.config import Config, heuristic, together
from pallas_kernels.packed_decode.kernel import why_not
from pallas_kernels.packed_decode.logits import unit_logits
from pallas_kernels.packed_decode.operands import LOG2E, prepare_queries
from pallas_kernels.packed_decode.read import Plan, Reader

Array = jax.Array

EMPTY = -1e30  # the logit of no token


def logits_only(
    q: Array,
    key: Packed,
    lengths: Array,
    *,
    page: int,
    layer: Array | int = 0,
    table: Array | None = None,
    config: Config | None = None,
    backend: Backend = "triton",
) -> Array:
    """Logits of one query position per sequence with every packed key.

    Args:
      q: `[b, h, g, d]` queries, already scaled; g of them share a KV head, 1 to 16.
      key: arrays that lead with `[layers, b, h, n]` (pages), or `[layers, pool, h]` with a table.
      lengths: `[b]` or `[b, h]` int32, tokens in the pages, in the order of the slots; clamped to
        what there is room for.
      page: tokens of a page.
      layer: which of the layers, clamped to those that there are.
      table: `[b, n]` int32, pages of the pool; clamped to the pool.
      config: tuning; None asks `packed_decode`'s heuristic.
      backend: "triton" on a GPU, "interpret" anywhere.
    Returns:
      `[b, h, g, n * page]` float32, -1e30 where there is no token.
    Raises:
      ValueError: what `why_not` of `packed_decode` says.
    """
    reason = why_not(q, key, (), page=page)
    if reason:
        raise ValueError(f"logits_only: {reason}")
    b, h, g, _ = q.shape
    leaf = key[0].blocks[0].words[0]
    slots = leaf.shape[3] if table is None else table.shape[-1]
    unit_bits = min(width for part in key for block in part.blocks for width in block.widths)
    config = config or heuristic(b, h, slots, page, unit_bits=unit_bits)
    by_channel = any(part.channel_scale is not None for part in key)
    plan = Plan(
        page=page,
        unit_bits=unit_bits,
        together=1 if by_channel else together(config, page, slots),
        layout="rows" if table is None else "pool",
        slots=slots,
        splits=config.splits,
        window=None,
        passes=config.passes,
        channels=config.channels,
        native=backend == "triton",
    )
    # Columns beyond the group repeat its last query, and store what that stores, where it does.
    columns = 8 if g <= 8 else 16
    padded = jnp.pad(q, ((0, 0), (0, 0), (0, columns - g), (0, 0)), mode="edge")
    in_natural_units = padded.astype(jnp.float32) / LOG2E
    lengths = jnp.broadcast_to(lengths if lengths.ndim == 2 else lengths[:, None], (b, h))
    args = {
        "layer": jnp.clip(jnp.asarray(layer, jnp.int32), 0, leaf.shape[0] - 1).reshape(1),
        "lengths": jnp.clip(lengths, 0, slots * page).astype(jnp.int32),
        "table": None if table is None else jnp.clip(table, 0, leaf.shape[1] - 1).astype(jnp.int32),
        "queries": prepare_queries(in_natural_units, key, columns, config.channels),
        "key": key,
    }
    room = pl.cdiv(slots, plan.together) * plan.step
    logits = call(
        functools.partial(_body, plan=plan),
        args,
        name="logits_only",
        grid=(b, h, plan.splits),
        out_shape=jax.ShapeDtypeStruct((b, h, g, room), jnp.float32),
        backend=backend,
        warps=config.warps,
        stages=config.stages,
    )
    return logits[..., : slots * page]


def _body(args: dict[str, Any], out: Any, *, plan: Plan) -> None:
    b, h, split = (pl.program_id(i) for i in range(3))
    length = args["lengths"][b, h]
    reader = Reader(args, plan, args["layer"][0], b, h)
    steps = pl.cdiv(length, plan.step)
    first, last = _share(0, steps, split, plan.splits)
    middle = jnp.clip(length // plan.step, first, last)
    step = functools.partial(_step, reader, length, out)
    jax.lax.fori_loop(first, middle, functools.partial(step, masked=False), None)
    jax.lax.fori_loop(middle, last, functools.partial(step, masked=True), None)
    rest = _share(steps, pl.cdiv(plan.slots, plan.together), split, plan.splits)
    jax.lax.fori_loop(*rest, functools.partial(_fill, plan, out, (b, h)), None)


def _step(reader: Reader, length: Array, out: Any, i: Array, _: None, *, masked: bool) -> None:
    args, plan = reader.args, reader.plan
    where = reader.step(i)
    for first in range(plan.passes):
        units = range(first, plan.units, plan.passes)
        for u, s in unit_logits(reader, where, args["key"], args["queries"], units).items():
            if masked:
                s = jnp.where(where.visible(u, length)[:, None], s, EMPTY)
            column = jax.lax.broadcasted_iota(jnp.int32, (s.shape[1],), 0)
            column = jnp.minimum(column, out.shape[2] - 1)
            out[reader.b, reader.h, column[None, :], where.place(u)[:, None]] = s


def _fill(plan: Plan, out: Any, at: tuple[Array, Array], i: Array, _: None) -> None:
    """What a step stores where no token is."""
    nothing = jnp.full((plan.step,), EMPTY, jnp.float32)
    for query in range(out.shape[2]):
        out[(*at, query, pl.ds(i * plan.step, plan.step))] = nothing


def _share(begin: Array | int, end: Array | int, i: Array, of: int) -> tuple[Array, Array]:
    """The i-th of so many shares of a range."""
    each = pl.cdiv(end - begin, of)
    first = jnp.minimum(begin + i * each, end)
    return first, jnp.minimum(first + each, end)
