"""What kernels know of a compressed tensor: words, levels and scales as plain arrays."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import planes

Array = jax.Array


_static: Any = functools.partial(dataclasses.field, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Block:
    """Codes of `size` channels, from column `start` of their words.

    Channel c of a token stands for `levels[code]`, or for `code - offset` without levels.

    Attributes:
      words: one array of uint16 per plane width (see `planes`), `[..., R, columns]`, or
        `[..., columns, R]` if transposed. With 16 bits: `[..., t, columns]`, bf16 as its bits.
      levels: `[2**bits]` float32, symmetric about 0, for 1 to 4 bits; or None for whole numbers.
    """

    words: tuple[Array, ...]
    levels: Array | None
    bits: int = _static()
    start: int = _static()
    size: int = _static()
    offset: float = _static(default=0.0)
    transposed: bool = _static(default=False)

    @property
    def widths(self) -> tuple[int, ...]:
        """Bits of each array of words."""
        return widths(self.bits)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Part:
    """Blocks that share scales.

        x = level * token_scale * channel_scale + token_zero + channel_zero

    Attributes:
      token_scale, token_zero: `[..., t]`, or `[..., t, columns]` of which `column` is meant.
      channel_scale, channel_zero: `[..., d]` over the channels of the blocks, one page at a time.
    """

    blocks: tuple[Block, ...]
    token_scale: Array | None = None
    token_zero: Array | None = None
    channel_scale: Array | None = None
    channel_zero: Array | None = None
    column: int | None = _static(default=None)

    @property
    def size(self) -> int:
        """Channels."""
        return sum(block.size for block in self.blocks)


Packed = tuple[Part, ...]  # the channels of all parts, one after the other


def size(packed: Packed) -> int:
    """Channels of all parts."""
    return sum(part.size for part in packed)


def widths(bits: int) -> tuple[int, ...]:
    """Bits of each array of words of such a block."""
    return (16,) if bits == 16 else planes.PLANES[bits]


def widen(kept: Array) -> Array:
    """float32 of a kept float: uint16 are the bits of bf16."""
    if kept.dtype == jnp.uint16:
        return jax.lax.bitcast_convert_type(kept.astype(jnp.uint32) << 16, jnp.float32)
    return kept.astype(jnp.float32)


def unpack(packed: Packed) -> Array:
    """The vectors `[..., t, d]` float32: the definition that kernels are tested against."""
    return jnp.concatenate([_unpack_part(part) for part in packed], -1)


def _unpack_part(part: Part) -> Array:
    x = jnp.concatenate([_unpack_block(block) for block in part.blocks], -1)
    pick = lambda a: a if part.column is None else a[..., part.column]
    wide = widen
    if part.channel_scale is not None:
        x = x * wide(part.channel_scale)[..., None, :]
    if part.token_scale is not None:
        x = x * wide(pick(part.token_scale))[..., None]
    if part.channel_zero is not None:
        x = x + wide(part.channel_zero)[..., None, :]
    if part.token_zero is not None:
        x = x + wide(pick(part.token_zero))[..., None]
    return x


def _unpack_block(block: Block) -> Array:
    channels = slice(block.start, block.start + block.size)
    if block.bits == 16:
        [words] = block.words
        return widen(words.swapaxes(-1, -2) if block.transposed else words)[..., channels]
    codes = planes.unpack(block.words, block.bits, transposed=block.transposed)
    codes = codes[..., channels].astype(jnp.int32)
    if block.levels is None:
        return codes.astype(jnp.float32) - block.offset
    return block.levels[codes]


# A code as a sum of bits. With y_S the parity (0 or 1) of the bits S of a code, any levels that are
# symmetric about 0 are a sum over the odd subsets: levels[c] = const + sum_S weight_S y_S(c). So a
# look-up becomes a few ANDs, each read by a matrix product of its own: no table, nothing rounded.


@dataclasses.dataclass(frozen=True)
class Term:
    """One summand: `weight * (the masked word)`, a field of a plane or a parity of bits.

    Attributes:
      plane: which plane (a field), or None (a parity).
      bits: bits of the code whose parity it is, or all bits of the field.
    """

    plane: int | None
    bits: tuple[int, ...]


@functools.cache
def terms(bits: int, levels: bool) -> tuple[Term, ...]:
    """The summands of a code of so many bits."""
    if not levels:
        low, fields = 0, []
        for plane, width in enumerate(widths(bits)):
            fields.append(Term(plane, tuple(range(low, low + width))))
            low += width
        return tuple(fields)
    subsets = [[i for i in range(bits) if s >> i & 1] for s in range(2**bits)]
    return tuple(Term(None, tuple(s)) for s in subsets if len(s) % 2)


def weights(block: Block) -> tuple[Array, Array]:
    """Weights `[terms]` of a block's summands and the constant that they leave out.

    Example:
      >>> import jax.numpy as jnp
      >>> block = Block((), jnp.array([-3.0, -1.0, 1.0, 3.0]), bits=2, start=0, size=1)
      >>> [x.tolist() for x in weights(block)]
      [[2.0, 4.0], -3.0]
    """
    summands = terms(block.bits, block.levels is not None)
    if block.levels is None:
        return jnp.array([2.0 ** t.bits[0] for t in summands]), jnp.float32(-block.offset)
    codes = range(2**block.bits)
    odd = lambda c, t: sum(c >> i & 1 for i in t.bits) % 2
    signs = jnp.array([[2 * odd(c, t) - 1 for c in codes] for t in summands], jnp.float32)
    walsh = signs @ block.levels / 2**block.bits  # levels[c] = sum_S walsh_S (2 y_S - 1)
    return 2 * walsh, -walsh.sum()
