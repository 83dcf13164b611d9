"""Logits of packed keys, `S^T = K q^T`, unit by unit."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import asm
from pallas_kernels.bits import base, unit_order
from pallas_kernels.packed import Packed, Part, terms
from pallas_kernels.packed_decode.operands import Query, chunks, leaves_constant
from pallas_kernels.packed_decode.read import Reader, Where

Array = jax.Array


def unit_logits(
    reader: Reader, where: Where, key: Packed, queries: list[Query], units: Sequence[int]
) -> dict[int, Array]:
    """Base-2 logits of some units, `[rows, n]` each."""
    logits: dict[int, Array] = {}
    for part, query in zip(key, queries, strict=True):
        own = _part_logits(reader, where, part, query, units)
        logits = {u: own[u] if u not in logits else logits[u] + own[u] for u in units}
    return logits


def _part_logits(
    reader: Reader, where: Where, part: Part, query: Query, units: Sequence[int]
) -> dict[int, Array]:
    plan, at = reader.plan, (reader.b, reader.h)
    scale = query.scale[at]
    const = query.const[(*at, slice(None))] if leaves_constant(part) else None
    operands: Any = None
    if part.channel_scale is not None:
        operands, scale, const = _scaled_query(reader, where, part, query, scale)
    sums: dict[int, dict[int, Array]] = {u: {} for u in units}
    for j, block in enumerate(part.blocks):
        for k, chunk in enumerate(chunks(block, plan.channels)):
            words = reader.words(where, block, chunk, transposed=False)
            for u in unit_order(block.bits, plan.unit_bits, units):
                e = base(block.bits, u, plan.unit_bits)[1]
                for t, y in enumerate(words.operands(u)):
                    q = query.terms[j][k][(*at, t)] if operands is None else operands[j][k][t]
                    s = jnp.dot(y, q, preferred_element_type=jnp.float32)
                    sums[u][e] = s if e not in sums[u] else sums[u][e] + s
    logits = {}
    for u in units:
        by_size = [x * (np.float32(2.0 ** (24 - e)) * scale) for e, x in sums[u].items()]
        s = functools.reduce(operator.add, by_size)
        if const is not None:
            s = s + const[None, :]
        if part.token_scale is not None:
            s = s * where.tokens(part.token_scale, part.column, u)[:, None]
        if part.token_zero is not None:
            zero = where.tokens(part.token_zero, part.column, u)[:, None]
            s = asm.fma(zero, query.total[(*at, slice(None))][None, :], s, plan.native)
        logits[u] = s
    return logits


def _scaled_query(reader: Reader, where: Where, part: Part, query: Query, scale: Array):
    """The query times the scales of a page's channels, in fp16, over the largest of them."""
    plan = reader.plan
    cut = [
        (j, k, c) for j, b in enumerate(part.blocks) for k, c in enumerate(chunks(b, plan.channels))
    ]
    starts = [sum(c.used for _, _, c in cut[:i]) for i in range(len(cut))]
    scales = [
        where.channels(part.channel_scale, start, chunk)
        for start, (_, _, chunk) in zip(starts, cut, strict=True)
    ]
    largest = functools.reduce(jnp.maximum, [jnp.abs(s).max(0) for s in scales])
    largest = jnp.maximum(largest, 1e-30)
    const = None
    operands: list[list[list[Array]]] = [[] for _ in part.blocks]
    for start, (j, k, chunk), s in zip(starts, cut, scales, strict=True):
        block = part.blocks[j]
        bare = query.terms[j][k][(reader.b, reader.h, 0)]
        times = bare * (s / largest)[:, None]
        offsets = []
        if part.channel_zero is not None:
            zero = where.channels(part.channel_zero, start, chunk)
            offsets.append((bare * zero[:, None]).sum(0))
        if block.offset:
            offsets.append((times * (-block.offset * largest)).sum(0))
        for offset in offsets:
            const = offset if const is None else const + offset
        fields = terms(block.bits, False)
        operands[j].append([(times * 2.0 ** t.bits[0]).astype(jnp.float16) for t in fields])
    return operands, scale * largest, None if const is None else const * scale
