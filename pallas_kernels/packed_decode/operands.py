"""What the kernel is given besides the cache: queries as fp16 operands, weights of terms."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from pallas_kernels.bits import term_offset
from pallas_kernels.packed import Block, Packed, Part, terms, weights

Array = jax.Array

LOG2E = math.log2(math.e)
SMALLEST = 16  # channels of a chunk: of one matrix product


@dataclasses.dataclass(frozen=True)
class Chunk:
    """A power of two of channels of one block: what Triton takes as a tile.

    Attributes:
      start: first column in the block's words. size: columns read.
      used: those that belong to the block; the others repeat its last, and count for nothing.
    """

    start: int
    size: int
    used: int


def chunks(block: Block, most: int = 256) -> list[Chunk]:
    """A block in pieces of at most so many channels.

    Example:
      >>> [c.size for c in chunks(Block((), None, bits=2, start=0, size=96))]
      [64, 32]
    """
    out, done = [], 0
    while done < block.size:
        left = block.size - done
        width = max(SMALLEST, min(most, 1 << (left.bit_length() - 1)))
        out.append(Chunk(block.start + done, width, min(width, left)))
        done += width
    return out


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Query:
    """What the logits of one part need, `n` columns of queries.

    Attributes:
      terms: per block and chunk, `[b, h, terms, channels, n]` fp16 queries times the weights of
        the terms; or `[b, h, 1, channels, n]` float32, bare, where channels have scales.
      scale: `[b, h]`, what all `terms` were divided by.
      const: `[b, h, n]`, sum of the queries times the constants of the blocks.
      total: `[b, h, n]`, sum of the queries.
    """

    terms: list[list[Array]]
    scale: Array
    const: Array
    total: Array


def prepare_queries(q: Array, key: Packed, columns: int, most: int) -> list[Query]:
    """Operands of `q: [b, h, g, d]`, padded to `columns` queries, in chunks of at most `most`
    channels; in units of base-2 logits."""
    pad = columns - q.shape[2]
    q = jnp.pad(q.astype(jnp.float32) * LOG2E, ((0, 0), (0, 0), (0, pad), (0, 0))).swapaxes(-1, -2)
    out, start = [], 0
    for part in key:
        out.append(_part_query(q[:, :, start : start + part.size], part, most))
        start += part.size
    return out


def _part_query(q: Array, part: Part, most: int) -> Query:
    const, blocks, start = jnp.zeros((*q.shape[:2], q.shape[-1])), [], 0
    for block in part.blocks:
        mine = q[:, :, start : start + block.size]  # [b, h, channels, n]
        start += block.size
        weight, left_out = term_weights(block)
        const = const + left_out * mine.sum(2)
        weight = jnp.ones(1) if part.channel_scale is not None else weight
        blocks.append(mine[:, :, None] * weight[:, None, None])
    largest = jnp.stack([jnp.abs(x).max((2, 3, 4)) for x in blocks]).max(0)
    scale = jnp.where(largest > 0, largest, 1)
    cut = [
        _cut((x / scale[..., None, None, None]).astype(_dtype(block, part)), block, most)
        for x, block in zip(blocks, part.blocks, strict=True)
    ]
    return Query(cut, scale, const, q.sum(2))


def _dtype(block: Block, part: Part):
    if part.channel_scale is not None:
        return jnp.float32
    return jnp.bfloat16 if block.bits == 16 else jnp.float16


def _cut(x: Array, block: Block, most: int) -> list[Array]:
    out, start = [], 0
    for chunk in chunks(block, most):
        piece = x[:, :, :, start : start + chunk.used]
        out.append(jnp.pad(piece, (*[(0, 0)] * 3, (0, chunk.size - chunk.used), (0, 0))))
        start += chunk.used
    return out


def term_weights(block: Block) -> tuple[Array, Array]:
    """`packed.weights` for the operands as they come: a bit read above the first is too large."""
    weight, left_out = weights(block)
    summands = terms(block.bits, block.levels is not None)
    small = jnp.array([2.0 ** -term_offset(block, term) for term in summands], jnp.float32)
    return weight * small, left_out


def prepare_values(value: Packed) -> list[list[Array]]:
    """Per part and block `[terms + 2]` float32: weights over the largest, the largest, constant."""

    def of(block: Block) -> Array:
        weight, left_out = term_weights(block)
        largest = jnp.abs(weight).max()
        largest = jnp.where(largest > 0, largest, 1)
        return jnp.concatenate([weight / largest, jnp.stack([largest, left_out])])

    return [[of(block) for block in part.blocks] for part in value]


def leaves_constant(part: Part) -> bool:
    """Whether the terms of a part leave a constant out, where that is not a page's own."""
    return any(block.levels is not None or block.offset for block in part.blocks)
