"""Flash-decoding over packed pages: `S^T = K q^T`, softmax, `O^T = V^T p^T`, straight from words.

The cache is the tall operand of both products and the group of query heads the narrow one, so that
nothing is done per cached value but one AND per term (see `packed.terms`) and the product itself.
Scales of tokens multiply logits and weights, scales of channels the query, once per page.
"""

from __future__ import annotations

import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from pallas_kernels import asm, checks
from pallas_kernels._call import Backend, call
from pallas_kernels.packed import Packed, size
from pallas_kernels.packed_decode import triton_backend
from pallas_kernels.packed_decode.config import Config, heuristic, together
from pallas_kernels.packed_decode.logits import unit_logits
from pallas_kernels.packed_decode.operands import chunks, prepare_queries, prepare_values
from pallas_kernels.packed_decode.read import Plan, Reader, Where
from pallas_kernels.packed_decode.tpu import packed_decode_tpu
from pallas_kernels.packed_decode.tuned import choose, narrowest
from pallas_kernels.packed_decode.values import add_values, empty_sum, write_sum

Array = jax.Array

EMPTY = -1e30  # a logit of nothing: finite, so that differences are 0 and not NaN


def packed_decode(
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
    config: Config | None = None,
    backend: Backend = "triton",
    check: bool | None = None,
) -> tuple[Array, Array]:
    """Softmax attention of one query position per sequence over packed pages.

    Args:
      q: `[b, h, g, d]` queries, already scaled; g of them share a KV head, 1 to 16.
      key: arrays that lead with `[layers, b, h, n]` (pages), or `[layers, pool, h]` with a table.
      value: likewise; best with words transposed, which saves a turn in shared memory.
      lengths: `[b]` or `[b, h]` int32, tokens in the pages, in the order of the slots; clamped to
        what there is room for. Pages beyond are read where a step ends in them, with weights of 0:
        their scales (and bf16 numbers) must be finite, as zeros are.
      page: tokens of a page.
      layer: which of the layers, clamped to those that there are.
      table: `[b, n]` int32, pages of the pool; clamped to the pool.
      starts, position, window: with a sliding window, the position of each page's first token
        (`[layers, b, n]` or `[layers, pool]`, -1 for none), the position `[b]` of the query, and
        how many tokens it sees back from itself.
      config: tuning on a GPU; None is what was measured on this kind of device (`tuned.choose`), or
        `config.heuristic`.
      backend: "triton" on a GPU, "tpu" on a TPU, "interpret" anywhere; "jax_triton" on a GPU,
        without Pallas (needs the extra `triton`).
      check: whether functions under `checkify` are told what is clamped; None: see `checks.wanted`.
    Returns:
      out `[b, h, g, dv]` float32 and the natural log-sum-exp of the logits `[b, h, g]`, -1e30
      where there is no token.
    Raises:
      ValueError: what `why_not` says.
    """
    reason = why_not(q, key, value, page=page)
    if reason:
        raise ValueError(f"packed_decode: {reason}")
    leaf = jax.tree.leaves(key[0].blocks[0].words)[0]
    slots = leaf.shape[3] if table is None else table.shape[-1]
    if checks.wanted(check, backend):
        checks.check_reads("packed_decode", lengths, layer, leaf.shape, page, table)
    layer = jnp.clip(jnp.asarray(layer, jnp.int32), 0, leaf.shape[0] - 1)
    if backend == "tpu":
        return packed_decode_tpu(
            q,
            key,
            value,
            lengths,
            page=page,
            layer=layer,
            table=table,
            starts=starts,
            position=position,
            window=window,
        )
    b, h, g, d = q.shape
    unit_bits = narrowest(key, value)
    if config is None and backend == "triton":
        config = choose(b, h, g, d, slots, page, key, value)
    config = config or heuristic(b, h, slots, page, unit_bits=unit_bits)
    by_channel = any(part.channel_scale is not None for part in key)
    plan = Plan(
        page=page,
        unit_bits=unit_bits,
        together=1 if by_channel else together(config, page, slots),
        layout="rows" if table is None else "pool",
        slots=slots,
        splits=config.splits,
        window=window,
        passes=config.passes,
        channels=config.channels,
        native=backend == "triton",
    )
    columns = 8 if g <= 8 else 16
    lengths = jnp.broadcast_to(lengths if lengths.ndim == 2 else lengths[:, None], (b, h))
    args = {
        "layer": layer.reshape(1),
        "lengths": jnp.clip(lengths, 0, slots * page).astype(jnp.int32),
        "table": None if table is None else jnp.clip(table, 0, leaf.shape[1] - 1).astype(jnp.int32),
        "starts": starts if window is not None else None,
        "position": position if window is not None else None,
        "queries": prepare_queries(q, key, columns, config.channels),
        "weights": prepare_values(value),
        "key": key,
        "value": value,
    }
    shape = (b, h, plan.splits)
    out_shape = {
        "out": [
            [
                [
                    jax.ShapeDtypeStruct((*shape, c.size, columns), jnp.float32)
                    for c in chunks(block, config.channels)
                ]
                for block in part.blocks
            ]
            for part in value
        ],
        "lse": jax.ShapeDtypeStruct((*shape, columns), jnp.float32),
    }
    if backend == "jax_triton":
        result = triton_backend.call(args, plan, out_shape, config, empty=EMPTY)
    else:
        result = call(
            functools.partial(_body, plan=plan),
            args,
            name="packed_decode",
            grid=shape,
            out_shape=out_shape,
            backend=backend,
            warps=config.warps,
            stages=config.stages,
        )
    return _merge_splits(result, value, g, config.channels)


def why_not(q: Array, key: Packed, value: Packed, *, page: int) -> str | None:
    """Why the kernel does not take these shapes, or None."""
    if q.shape[2] > 16:
        return f"got {q.shape[2]} query heads per KV head; expected 16 or fewer; use the page scan"
    if size(key) != q.shape[-1]:
        return f"got keys of {size(key)} channels; expected {q.shape[-1]}, as q; see the codec"
    if page * narrowest(key, value) % 16:
        return f"got pages of {page} tokens; expected a multiple of 16; choose such a page"
    blocks = [block for part in (*key, *value) for block in part.blocks]
    for block in blocks:
        for words, width in zip(block.words, block.widths, strict=True):
            rows = words.shape[-1 if block.transposed else -2]
            if rows * 16 != page * width:
                return (
                    f"got {rows} rows of {width}-bit words; expected {page * width / 16:g} for a "
                    f"page of {page} tokens; pass the page that they were packed with"
                )
    wide = [block.bits for block in blocks if block.levels is not None and 4 < block.bits < 16]
    if wide:
        return f"got a codebook of {wide[0]} bits; expected 4 or fewer; use whole numbers there"
    if any(part.channel_scale is not None or part.channel_zero is not None for part in value):
        return "got values with scales of channels; expected scales of tokens; use axis='channels'"
    for part in key:
        if part.channel_scale is not None and any(b.levels is not None for b in part.blocks):
            return "got a codebook with scales of channels; expected whole numbers; use Uniform"
    return None


def _body(args: dict[str, Any], out: dict[str, Any], *, plan: Plan) -> None:
    b, h, split = (pl.program_id(i) for i in range(3))
    length = args["lengths"][b, h]
    reader = Reader(args, plan, args["layer"][0], b, h)
    steps = pl.cdiv(length, plan.step)
    share = pl.cdiv(steps, plan.splits)
    first = split * share
    last = jnp.minimum(first + share, steps)
    whole = length // plan.step if plan.window is None else 0
    middle = jnp.clip(whole, first, jnp.maximum(last, first))

    columns = args["queries"][0].const.shape[-1]
    parts = [empty_sum(reader, part, columns) for part in args["value"]]
    tile = jnp.zeros((plan.together * plan.rows, columns), jnp.float32)
    carry = (jnp.full((columns,), EMPTY, jnp.float32), tile, parts)
    step = functools.partial(_step, reader, length)
    carry = jax.lax.fori_loop(first, middle, functools.partial(step, masked=False), carry)
    carry = jax.lax.fori_loop(middle, last, functools.partial(step, masked=True), carry)
    top, total, parts = carry

    total = total.sum(0)
    seen = jnp.where(total == 0, 1.0, total)
    out["lse"][b, h, split, :] = jnp.where(total == 0, EMPTY, top + jnp.log2(seen))
    for part, weights, refs in zip(parts, args["weights"], out["out"], strict=True):
        write_sum(part, weights, seen, refs, (b, h, split))


def _step(reader: Reader, length: Array, i: Array, carry, *, masked: bool):
    where = reader.step(i)
    for first in range(reader.plan.passes):
        units = range(first, reader.plan.units, reader.plan.passes)
        carry = _add_units(reader, where, length, units, carry, masked=masked)
    return carry


def _add_units(reader: Reader, where: Where, length: Array, units, carry, *, masked: bool):
    args, native = reader.args, reader.plan.native
    top, total, parts = carry
    logits = unit_logits(reader, where, args["key"], args["queries"], units)
    if masked:
        valid = {u: where.visible(u, length)[:, None] for u in units}
        logits = {u: jnp.where(valid[u], s, EMPTY) for u, s in logits.items()}
    new_top = jnp.maximum(top, functools.reduce(jnp.maximum, logits.values()).max(0))
    fade = jnp.exp2(top - new_top)
    p = {u: asm.exp2(s - new_top[None, :], native) for u, s in logits.items()}
    if masked:  # where nothing has been seen yet, an empty logit is the largest
        p = {u: jnp.where(valid[u], x, 0.0) for u, x in p.items()}
    total = total * fade[None, :] + functools.reduce(operator.add, p.values())
    each = zip(args["value"], args["weights"], parts, strict=True)
    parts = [add_values(reader, where, *mine, p, fade) for mine in each]
    return new_top, total, parts


def _merge_splits(
    result: dict[str, Any], value: Packed, g: int, channels: int
) -> tuple[Array, Array]:
    lse = result["lse"]  # [b, h, splits, n], base 2
    top = lse.max(2)
    weight = jnp.exp2(lse - top[:, :, None])
    total = weight.sum(2)
    pieces = []
    for part, blocks in zip(value, result["out"], strict=True):
        for block, cut in zip(part.blocks, blocks, strict=True):
            for c, out in zip(chunks(block, channels), cut, strict=True):
                merged = (out[:, :, :, : c.used] * weight[:, :, :, None]).sum(2)
                pieces.append(merged / total[:, :, None])
    out = jnp.concatenate(pieces, 2).swapaxes(-1, -2)[:, :, :g]
    lse = jnp.where(top > EMPTY / 2, (top + jnp.log2(total)) / np.float32(np.log2(np.e)), EMPTY)
    return out, lse[:, :, :g]
