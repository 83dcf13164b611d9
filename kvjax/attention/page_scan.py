"""Attention over packed pages, a few pages at a time, for every codec: memory of one chunk.

This is the definition that kernels are tested against, and a fast path in its own right on a CPU:
codes are read straight from their words, nothing of the history is ever unpacked as a whole.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kvjax.core.codec import Acc, Array, Code, Codec
from kvjax.core.partial import EMPTY_LSE, Partial


class Chunk(NamedTuple):
    """Some pages of every KV head.

    Attributes:
      key, value: codes, leaves `[b, h, c, ...]`.
      positions: `[b, h, c, p]` int32, -1 where there is no token; `[b, 1, c, p]` if heads agree.
      bias: added to the logits, shaped like positions, or None.
    """

    key: Code
    value: Code
    positions: Array
    bias: Array | None = None


def page_scan(
    key: Codec,
    value: Codec,
    read: Callable[[Array], Chunk],
    chunks: Array | int,
    q: Array,
    visible: Callable[[Array], Array],
) -> Partial:
    """Softmax attention over all chunks, online.

    Args:
      key, value: codecs of the codes.
      read: chunk index -> `Chunk`.
      chunks: how many chunks to read; traced, so that an almost empty cache costs little.
      q: `[b, h, r, d]` queries (r rows), already scaled.
      visible: positions `[b, h or 1, c, p]` -> bool `[b, h or 1, c, r, p]`.
    Returns:
      A `Partial` of `[b, h, r, d]`.
    """
    prepared = key.prepare(q.astype(jnp.float32)[:, :, None])  # [b, h, 1, r, ...]
    weights = jax.eval_shape(lambda: _chunk_logits(key, prepared, read(jnp.int32(0)), visible))
    acc = jax.eval_shape(
        lambda w: _sum_pages(value.accumulate(w, read(jnp.int32(0)).value)), weights
    )
    rows = q.shape[:3]
    start = (
        jnp.full(rows, EMPTY_LSE, jnp.float32),
        jnp.zeros(rows, jnp.float32),
        jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), acc),
    )

    def body(i, carry):
        top, total, acc = carry
        chunk = read(i)
        logits = _chunk_logits(key, prepared, chunk, visible)  # [b, h, c, r, p]
        new_top = jnp.maximum(top, logits.max((2, 4)))
        p = jnp.exp(logits - new_top[:, :, None, :, None])
        fade = jnp.exp(top - new_top)
        part = _sum_pages(value.accumulate(p, chunk.value))
        acc = jax.tree.map(lambda a, new: _rowwise(fade, a) * a + new, acc, part)
        return new_top, total * fade + p.sum((2, 4)), acc

    top, total, acc = jax.lax.fori_loop(0, chunks, body, start)
    seen = jnp.maximum(total, jnp.finfo(jnp.float32).tiny)
    out = value.restore(jax.tree.map(lambda a: (a / _rowwise(seen, a))[:, :, None], acc))[:, :, 0]
    return Partial(out, jnp.where(total > 0, top + jnp.log(seen), EMPTY_LSE))


def _chunk_logits(key: Codec, prepared, chunk: Chunk, visible) -> Array:
    logits = key.logits(prepared, chunk.key)  # [b, h, c, r, p]
    if chunk.bias is not None:
        logits = logits + chunk.bias[:, :, :, None]
    return jnp.where(visible(chunk.positions), logits, -jnp.inf)


def _sum_pages(acc: Acc) -> Acc:
    """`[b, h, c, r, ...] -> [b, h, r, ...]`, by adds: XLA is 40 times slower on a middle axis."""
    return jax.tree.map(
        lambda a: functools.reduce(operator.add, (a[:, :, i] for i in range(a.shape[2]))), acc
    )


def _rowwise(weight: Array, a: Array) -> Array:
    """`weight: [b, h, r]` shaped to multiply `a: [b, h, r, ...]`."""
    return weight.reshape(*weight.shape, *[1] * (a.ndim - weight.ndim))
