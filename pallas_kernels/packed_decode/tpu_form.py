"""Packed tensors as a TPU reads them: tiles of words and of scales, codes as bf16 operands.

A bf16 between 1 and 2 is 1 and seven bits behind the point: a field of a word, moved there, is
`1 + field / 2**width` exactly, with a shift, an AND and an OR for two values at once, since two
words share a 32-bit lane. No vector unit of 16 bits is asked for, and nothing is converted. What
is left, one weight per term and one constant, is applied to results.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.packed import Block, Packed, terms, weights, widths

Array = jax.Array

MANTISSA = 7  # bits of bf16
ONE = 0x3F80  # 1 as bf16
LANES = 128
ROWS = 16  # of a tile of scales: whole tiles of 16-bit numbers


@dataclasses.dataclass(frozen=True)
class Codes:
    """Words of codes: which arrays they are, and how they are read."""

    arrays: tuple[int, ...]
    bits: int
    levels: bool
    transposed: bool


@dataclasses.dataclass(frozen=True)
class Floats:
    """One float per token, or per channel, of a page: array, column, whether they are fp16."""

    array: int
    column: int | None
    half: bool


@dataclasses.dataclass(frozen=True)
class Piece:
    """A block: its part, its codes, its channels among theirs, where its weights begin."""

    part: int
    codes: int
    start: int
    size: int
    columns: int
    weights: int

    @property
    def around(self) -> tuple[int, int]:
        """Channels of the codes before and after its own."""
        return self.start, self.columns - self.start - self.size


@dataclasses.dataclass(frozen=True)
class Scales:
    """Of a part; `channels` of its blocks."""

    token_scale: Floats | None
    token_zero: Floats | None
    channel_scale: Floats | None
    channel_zero: Floats | None


@dataclasses.dataclass(frozen=True)
class Form:
    """A packed tensor with its arrays taken out: what does not change from launch to launch."""

    codes: tuple[Codes, ...]
    pieces: tuple[Piece, ...]
    parts: tuple[Scales, ...]


@dataclasses.dataclass
class Arrays:
    """The arrays of packed tensors, each once, however many blocks and parts read it.

    Attributes:
      layer: the one that is read.
      kept: arrays as kernels take them.
      kinds: "words", "turned words", "rows" or "columns", how they are cut.
      weights: of every block, one after the other.
    """

    layer: Array
    kept: list[Array] = dataclasses.field(default_factory=list)
    kinds: list[str] = dataclasses.field(default_factory=list)
    weights: list[Array] = dataclasses.field(default_factory=list)
    seen: dict[int, tuple[Array, int]] = dataclasses.field(default_factory=dict)

    def form(self, packed: Packed) -> Form:
        """Takes a tensor's arrays in."""
        codes: list[Codes] = []
        pieces, parts = [], []
        for p, part in enumerate(packed):
            for block in part.blocks:
                mine = self._codes(block)
                if mine not in codes:
                    codes.append(mine)
                words = block.words[0]
                columns = words.shape[-2 if block.transposed else -1]
                first = sum(w.shape[0] for w in self.weights)
                self.weights.append(operand_weights(block))
                at = codes.index(mine)
                pieces.append(Piece(p, at, block.start, block.size, columns, first))
            floats = functools.partial(self._floats, column=part.column)
            parts.append(
                Scales(
                    floats(part.token_scale),
                    floats(part.token_zero),
                    self._floats(part.channel_scale, None),
                    self._floats(part.channel_zero, None),
                )
            )
        return Form(tuple(codes), tuple(pieces), tuple(parts))

    def _codes(self, block: Block) -> Codes:
        short = any(words.shape[-1] % LANES for words in block.words)
        kind = "turned words" if block.transposed and short else "words"
        arrays = tuple(self._take(words, kind) for words in block.words)
        return Codes(arrays, block.bits, block.levels is not None, block.transposed and not short)

    def _floats(self, x: Array | None, column: int | None) -> Floats | None:
        if x is None:
            return None
        at = self._take(x, "rows" if column is None else "columns")
        return Floats(at, column, x.dtype == jnp.float16)

    def _take(self, x: Array, kind: str) -> int:
        known = self.seen.setdefault(id(x), (x, len(self.kept)))[1]
        if known == len(self.kept):
            self.kept.append(self._prepared(x, kind))
            self.kinds.append(kind)
        return known

    def _prepared(self, x: Array, kind: str) -> Array:
        """What Mosaic takes. Of floats one layer, copied: fp16 as its bits, columns as rows.

        Words whose rows fill no lanes XLA keeps turned already: to turn them costs nothing, but to
        hand them over as they are would copy and pad the whole cache.
        """
        if kind == "turned words":
            return x.swapaxes(-1, -2)
        if kind == "columns" or x.dtype == jnp.float16:
            x = jax.lax.dynamic_index_in_dim(x, self.layer, 0)
        if x.dtype == jnp.float16:
            x = jax.lax.bitcast_convert_type(x, jnp.uint16)
        return x.swapaxes(-1, -2) if kind == "columns" else x


def fields(bits: int, levels: bool) -> list[tuple[int, ...]]:
    """Bits of the code that each operand holds: their parity with levels, else their number.

    Example:
      >>> fields(2, levels=True), fields(3, levels=False), fields(8, levels=False)
      ([(0,), (1,)], [(0, 1), (2,)], [(0, 1, 2, 3), (4, 5, 6, 7)])
    """
    whole = [term.bits for term in terms(bits, levels)]
    if levels:
        return whole
    return [b[i : i + 4] for b in whole for i in range(0, len(b), 4)]


def operand_weights(block: Block) -> Array:
    """`[operands + 1]`: a value is `weights[:-1] @ operands + weights[-1]`."""
    if block.bits == 16:
        return jnp.array([1.0, 0.0])
    if block.levels is not None:  # an operand is 1 + parity / 2
        weight, left_out = weights(block)
        weight = 2 * weight
    else:
        each = fields(block.bits, False)
        weight = jnp.array([2.0 ** (f[0] + len(f)) for f in each])
        left_out = jnp.float32(-block.offset)
    return jnp.concatenate([weight, (left_out - weight.sum())[None]])


def operands(codes: Codes, load: Callable[[int], Any]) -> list[Array]:
    """bf16 `[t, columns]` of every field of the codes of a page: `1 + field / 2**width`.

    Args:
      load: array -> reference to its tile, `[R, columns]` uint16 or transposed.
    """

    def read(array: int, dtype) -> Array:
        ref = load(array)
        if codes.transposed:
            return pltpu.bitcast(ref[...].T, dtype)
        return ref.bitcast(dtype)[...]  # in memory: a reading of words as they are costs more

    if codes.bits == 16:
        return [read(array, jnp.bfloat16) for array in codes.arrays]
    words = [read(array, jnp.uint32) for array in codes.arrays]  # two rows in a lane
    moved: dict[tuple[int, int], Array] = {}

    def move(bit: int, to: int) -> Array:
        """Words of all tokens, `[t / 2, columns]`, with a bit of the code moved."""
        if (bit, to) not in moved:
            planes = widths(codes.bits)
            ends = np.cumsum(planes)
            plane = int(np.searchsorted(ends, bit, side="right"))
            inside = bit - int(ends[plane]) + planes[plane]
            each = range(inside, 16, planes[plane])
            moved[bit, to] = jnp.concatenate([_shift(words[plane], at - to) for at in each], 0)
        return moved[bit, to]

    out = []
    for field in fields(codes.bits, codes.levels):
        low = MANTISSA - (1 if codes.levels else len(field))
        bits = [move(bit, low) for bit in (field if codes.levels else field[:1])]
        x = functools.reduce(operator.xor, bits)
        mask = (1 << MANTISSA) - (1 << low)
        out.append(pltpu.bitcast(x & _both(mask) | _both(ONE), jnp.bfloat16))
    return out


def _shift(x: Array, right: int) -> Array:
    return x >> np.uint32(right) if right >= 0 else x << np.uint32(-right)


def _both(half: int) -> np.uint32:
    return np.uint32(half * 0x10001)


def numbers(floats: Floats, tile: Array, row: Array) -> Array:
    """One row of a tile as float32, `[1, size]`; of several columns, their row."""
    x = widen(tile, floats.half)
    if floats.column is not None:
        return x[floats.column : floats.column + 1]
    if x.shape[0] == 1:
        return x
    at = jax.lax.broadcasted_iota(jnp.int32, x.shape, 0)
    return jnp.where(at == row, x, 0.0).sum(0, keepdims=True)


def widen(x: Array, half: bool) -> Array:
    """float32 of a tile; uint16 are the bits of fp16 (infinities aside), else of bf16."""
    if not half:
        x = pltpu.bitcast(x, jnp.bfloat16) if x.dtype == jnp.uint16 else x
        return x.astype(jnp.float32)
    x = x.astype(jnp.int32)
    size = x & 0x7FFF
    normal = jax.lax.bitcast_convert_type((size << 13) + (112 << 23), jnp.float32)
    plain = jnp.where(size < 0x400, size.astype(jnp.float32) * np.float32(2.0**-24), normal)
    return jnp.where(x < 0x8000, plain, -plain)


def split(x: Array) -> Array:
    """float32 `[n, k]` as bf16 `[2 n, k]` of which the halves add up to it, to 2**-16 of it."""
    high = jax.lax.bitcast_convert_type(x, jnp.int32) & np.int32(-65536)
    high = jax.lax.bitcast_convert_type(high, jnp.float32)
    return jnp.concatenate([high, x - high], 0).astype(jnp.bfloat16)
