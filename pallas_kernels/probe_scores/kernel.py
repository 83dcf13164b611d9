"""Column maximum and sum of softmax weights, without the matrix of weights.

Two passes over the same tiles of logits. The first holds queries and reads keys: the log-sum-exp of
every query. The second holds keys and reads queries: with the log-sum-exps known, each weight is
final when it is made, and is only compared and added.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from pallas_kernels import asm, checks
from pallas_kernels._call import Backend, call
from pallas_kernels.packed import Block
from pallas_kernels.packed_decode.operands import Chunk, chunks
from pallas_kernels.probe_scores.config import Config, heuristic
from pallas_kernels.probe_scores.operands import key_positions, query_rows, row_positions

Array = jax.Array

LOG2E: Any = np.float32(math.log2(math.e))
# A logit of nothing. As a power of two it is exact times LOG2E: a row that sees nothing then gets
# differences of 0, where another number would leave a rounding error of 1e22 to exponentiate.
EMPTY = np.float32(-(2.0**100))


class ProbeScores(NamedTuple):
    """What the queries pay to each key, `[b, h, t]` float32; 0 to a key that none of them sees.

    Attributes:
      peak: largest softmax weight over queries and query heads.
      total: sum of the softmax weights over queries and query heads.
    """

    peak: Array
    total: Array


@dataclasses.dataclass(frozen=True)
class Plan:
    """Static shape of both passes.

    Attributes:
      cut: the channels, in pieces that a product takes at once.
      keys: rows of keys in memory.
      masked: whether positions are compared; else a key is seen if there is one.
      native: whether assembly is understood.
    """

    config: Config
    cut: tuple[Chunk, ...]
    keys: int
    masked: bool
    native: bool


def probe_scores(
    q: Array,
    key: Array,
    lengths: Array | None = None,
    *,
    positions: Array | None = None,
    query_positions: Array | None = None,
    config: Config | None = None,
    backend: Backend = "triton",
    check: bool | None = None,
) -> ProbeScores:
    """Softmax of every query over the keys that it sees, summed up by key.

    A product of logits has the keys' precision: queries are rounded to bf16 beside bf16 keys, and
    both to TF32 on a GPU beside float32.

    Args:
      q: `[b, h, g, n, d]` queries, already scaled; g query heads share a KV head.
      key: `[b, h, t, d]` float32 or bf16, or the bits of bf16 as uint16.
      lengths: `[b]` or `[b, h]` int32, how many of the first keys there are; clamped to t.
      positions: `[b, t]` or `[b, h, t]` int32 of the keys, -1 where there is none; None numbers
        them in their order.
      query_positions: `[b, n]` int32: a query sees keys up to its own position, and none from -1
        (padding). None lets every query see every key.
      config: tuning; None asks `config.heuristic`.
      backend: "triton" on a GPU, "interpret" anywhere.
      check: whether functions under `checkify` are told of lengths that are clamped; None: see
        `checks.wanted`.
    Raises:
      ValueError: what `why_not` says.
    """
    reason = why_not(q, key)
    if reason:
        raise ValueError(f"probe_scores: {reason}")
    b, h, g, n, d = q.shape
    t = key.shape[2]
    if lengths is not None and checks.wanted(check, backend):
        checks.check_lengths("probe_scores", lengths, t)
    config = config or heuristic(b, h, g * n, t, row=d * key.dtype.itemsize)
    plan = Plan(
        config=config,
        cut=tuple(chunks(Block((), None, bits=16, start=0, size=d), config.channels)),
        keys=t,
        masked=positions is not None or query_positions is not None,
        native=backend == "triton",
    )
    lengths = jnp.full((b, h), t) if lengths is None else jnp.clip(lengths, 0, t)
    lengths = jnp.broadcast_to(lengths if lengths.ndim == 2 else lengths[:, None], (b, h))
    block = max(config.tile, config.step)
    rows, room = (pl.cdiv(size, block) * block for size in (g * n, t))
    args = {
        "lengths": lengths.astype(jnp.int32),
        "q": query_rows(q, rows, key.dtype, plan.cut),
        "key": key,
        "at": row_positions(query_positions, b, g, n, rows) if plan.masked else None,
        "places": key_positions(positions, lengths, t, room) if plan.masked else None,
    }
    launch = functools.partial(call, backend=backend, warps=config.warps, stages=config.stages)
    lse = launch(
        functools.partial(_lse_body, plan=plan),
        args,
        name="probe_lse",
        grid=(rows // config.tile, config.key_splits, h, b),
        out_shape=jax.ShapeDtypeStruct((b, h, config.key_splits, rows), jnp.float32),
    )
    args["lse"] = jnp.where(jnp.arange(rows) < g * n, _merge(lse), -EMPTY)
    out = jax.ShapeDtypeStruct((b, h, config.query_splits, room), jnp.float32)
    peak, total = launch(
        functools.partial(_columns_body, plan=plan, rows=rows),
        args,
        name="probe_columns",
        grid=(room // config.tile, config.query_splits, h, b),
        out_shape=(out, out),
    )
    return ProbeScores(peak.max(2)[:, :, :t], total.sum(2)[:, :, :t])


def why_not(q: Array, key: Array) -> str | None:
    """Why the kernel does not take these arrays, or None."""
    if q.ndim != 5 or key.ndim != 4:
        return (
            f"got arrays of {q.ndim} and {key.ndim} axes; expected q [b, h, g, n, d] and key "
            "[b, h, t, d]; put query heads that share a KV head on the third axis"
        )
    if (*q.shape[:2], q.shape[-1]) != (*key.shape[:2], key.shape[-1]):
        return (
            f"got q {q.shape} and key {key.shape}; expected the same batch, KV heads and channels; "
            "pass the queries of the same layer"
        )
    if 0 in (*q.shape, *key.shape):
        return f"got q {q.shape} and key {key.shape}; expected no axis of 0; leave such a call out"
    if key.dtype not in (jnp.float32, jnp.bfloat16, jnp.uint16):
        return f"got keys of {key.dtype}; expected float32, bfloat16 or its bits; cast them"
    return None


def _lse_body(args: dict[str, Any], out: Any, *, plan: Plan) -> None:
    """First pass: base-2 log-sum-exp of a tile of queries over a share of the keys."""
    tile, split, h, b = (pl.program_id(i) for i in range(4))
    config, length = plan.config, args["lengths"][b, h]
    mine = pl.ds(tile * config.tile, config.tile)
    q = [ref[b, h, mine, :] for ref in args["q"]]
    at = args["at"][b, mine][:, None] if plan.masked else None
    first, last = _share(pl.cdiv(length, config.step), split, config.key_splits)
    whole = first if plan.masked else jnp.clip(length // config.step, first, last)

    def step(i, carry, *, border: bool):
        top, total = carry
        slots = i * config.step + _iota(config.step)
        s = _product(q, _load_keys(args["key"], plan, b, h, slots))  # [tile, step]
        if at is not None:
            place = args["places"][b, h, pl.ds(i * config.step, config.step)]
            s = jnp.where(place[None, :] <= at, s, EMPTY)
        elif border:
            s = jnp.where((slots < length)[None, :], s, EMPTY)
        new_top = jnp.maximum(top, s.max(1))
        p = asm.exp2(asm.fma(s, LOG2E, -(new_top * LOG2E)[:, None], plan.native), plan.native)
        fade = asm.exp2((top - new_top) * LOG2E, plan.native)
        return new_top, total * fade + p.sum(1)

    carry = (jnp.full((config.tile,), EMPTY), jnp.zeros((config.tile,), jnp.float32))
    if at is None:
        carry = jax.lax.fori_loop(first, whole, functools.partial(step, border=False), carry)
    top, total = jax.lax.fori_loop(whole, last, functools.partial(step, border=True), carry)
    out[b, h, split, mine] = jnp.where(top > EMPTY / 2, top * LOG2E + jnp.log2(total), EMPTY)


def _merge(lse: Array) -> Array:
    """Of the splits `[b, h, splits, rows]`: of a row that sees nothing, one that makes every weight
    0."""
    top = lse.max(2)
    merged = top + jnp.log2(jnp.exp2(lse - top[:, :, None]).sum(2))
    return jnp.where(top > EMPTY / 2, merged, -EMPTY)


def _columns_body(args: dict[str, Any], peaks: Any, totals: Any, *, plan: Plan, rows: int) -> None:
    """Second pass: a tile of keys over a share of the queries."""
    tile, split, h, b = (pl.program_id(i) for i in range(4))
    config, length = plan.config, args["lengths"][b, h]
    mine, slots = pl.ds(tile * config.tile, config.tile), tile * config.tile + _iota(config.tile)
    keys = _load_keys(args["key"], plan, b, h, slots)
    place = args["places"][b, h, mine][:, None] if plan.masked else None
    first, last = _share(rows // config.step, split, config.query_splits)
    last = jnp.where(tile * config.tile < length, last, first)

    def step(i, carry):
        peak, total = carry
        others = pl.ds(i * config.step, config.step)
        s = _product(keys, [ref[b, h, others, :] for ref in args["q"]])  # [tile, step]
        s = asm.fma(s, LOG2E, -args["lse"][b, h, others][None, :], plan.native)
        if place is not None:
            s = jnp.where(place <= args["at"][b, others][None, :], s, EMPTY)
        return jnp.maximum(peak, s.max(1)), total + asm.exp2(s, plan.native).sum(1)

    carry = (jnp.full((config.tile,), EMPTY), jnp.zeros((config.tile,), jnp.float32))
    peak, total = jax.lax.fori_loop(first, last, step, carry)
    peaks[b, h, split, mine] = jnp.where(slots < length, asm.exp2(peak, plan.native), 0.0)
    totals[b, h, split, mine] = jnp.where(slots < length, total, 0.0)


def _product(a: list[Array], b: list[Array]) -> Array:
    """`a @ b.T`, float32 as TF32 where there is that."""
    precision = jax.lax.Precision.DEFAULT
    one = functools.partial(jnp.dot, preferred_element_type=jnp.float32, precision=precision)
    return functools.reduce(operator.add, [one(x, y.T) for x, y in zip(a, b, strict=True)])


def _load_keys(ref: Any, plan: Plan, b: Array, h: Array, slots: Array) -> list[Array]:
    """Rows of keys, chunk by chunk; those beyond the last repeat it."""
    rows = jnp.minimum(slots, plan.keys - 1)
    out = []
    for chunk in plan.cut:
        column = _iota(chunk.size)
        if chunk.used < chunk.size:  # else the compiler is to see that it may load 16 bytes at once
            column = jnp.minimum(column, chunk.used - 1)
        column = chunk.start + column
        tile = ref[b, h, rows[:, None], column[None, :]]
        whole = tile.dtype == jnp.uint16
        out.append(jax.lax.bitcast_convert_type(tile, jnp.bfloat16) if whole else tile)
    return out


def _iota(size: int) -> Array:
    return jax.lax.broadcasted_iota(jnp.int32, (size,), 0)


def _share(steps: Array | int, i: Array, of: int) -> tuple[Array, Array]:
    """The i-th of so many shares of the steps."""
    each = pl.cdiv(steps, of)
    first = jnp.minimum(i * each, steps)
    return first, jnp.minimum(first + each, steps)
