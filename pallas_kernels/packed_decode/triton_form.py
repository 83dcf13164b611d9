"""What `triton_source` is told while it is compiled: which array is what, and how it is read.

Tables that refer to each other by number, since Triton passes numbers to functions but no records.
`triton_tables` fills them in.
"""

from __future__ import annotations

import dataclasses
import hashlib

from pallas_kernels.packed_decode.values import HEADROOM

ARRAYS = 48  # that the kernel's signature has room for
SMALLEST = 16  # tokens that a matrix product contracts


@dataclasses.dataclass(frozen=True)
class Recipe:
    """An operand: words of some planes, each shifted right, xor-ed together and masked.

    Attributes:
      planes, stretches, rights: of each of the words: which array, which of its stretches of
        `Form.rows` rows, and how far they go right.
    """

    planes: tuple[int, ...]
    stretches: tuple[int, ...]
    rights: tuple[int, ...]
    mask: int


@dataclasses.dataclass(frozen=True)
class Words:
    """An array of words; strides of its pages, rows and channels, in words."""

    array: int
    page: int
    row: int
    channel: int


@dataclasses.dataclass(frozen=True)
class BlockForm:
    """A block of channels.

    Attributes:
      factors: of each term, which is a product: what it is worth, where it is a field.
      offset: of whole numbers.
      first_operand: of its part's queries, which is the first of the block.
      weights: the array of the weights of values, or -1.
      recipes: of each unit and each term. sizes: of each unit, what products are multiplied with.
      orders: of each pass, its units in the order of the words in memory.
      places: of each unit of a pass, where it is in that order. turns: the inverse.
    """

    bits: int
    words: tuple[Words, ...]
    cuts: tuple[int, ...]
    factors: tuple[float, ...]
    offset: float
    first_operand: int
    weights: int
    recipes: tuple[tuple[Recipe, ...], ...]
    sizes: tuple[float, ...]
    orders: tuple[tuple[int, ...], ...]
    places: tuple[tuple[int, ...], ...]
    turns: tuple[tuple[int, ...], ...]


@dataclasses.dataclass(frozen=True)
class CutForm:
    """A power of two of channels of a block (see `operands.Chunk`).

    Attributes:
      in_part: the first of them, counted in the part.
      operand: the array of queries, with `operands` of them per head; or -1.
      out: first row of the sums.
    """

    block: int
    start: int
    size: int
    used: int
    in_part: int
    operand: int
    operands: int
    out: int


@dataclasses.dataclass(frozen=True)
class Scales:
    """Scales or zero points: `column` of `columns` per token, or `columns` channels."""

    array: int
    columns: int
    column: int
    is_bits: bool


@dataclasses.dataclass(frozen=True)
class PartForm:
    """Blocks that share scales.

    Attributes:
      token_scale, token_zero, channel_scale, channel_zero: which of `Form.scales`, or None.
      constant: whether something is to be added that `terms` leave out.
      scale, const, total: arrays of the queries (see `operands.Query`), or -1.
      smallest: where the largest scale starts.
    """

    blocks: tuple[int, ...]
    cuts: tuple[int, ...]
    token_scale: int | None
    token_zero: int | None
    channel_scale: int | None
    channel_zero: int | None
    constant: bool
    scale: int
    const: int
    total: int
    smallest: float


@dataclasses.dataclass(frozen=True)
class Form:
    """One launch.

    Attributes:
      layer, lengths, table, starts, position: which arrays; None where there is none.
      heads: KV heads. pages: of the pool, or sequences where there is none.
      rows: tokens of a unit of one page. used: of all pages of a step. tile: what Triton multiplies
        of them; those beyond `used` are the last again, with weights of 0.
      unmasked: whether steps that are full need no masks.
      passes: units that are done together.
      keys, values: which parts.
      out_rows: of all sums. unscale: what they are multiplied with. empty: a logit of nothing.
      native: whether assembly is understood.
    """

    layer: int
    lengths: int
    table: int | None
    starts: int | None
    position: int | None
    heads: int
    pages: int
    slots: int
    page: int
    rows: int
    together: int
    used: int
    tile: int
    unmasked: bool
    step: int
    splits: int
    window: int | None
    columns: int
    passes: tuple[tuple[int, ...], ...]
    keys: tuple[int, ...]
    values: tuple[int, ...]
    parts: tuple[PartForm, ...]
    blocks: tuple[BlockForm, ...]
    cuts: tuple[CutForm, ...]
    scales: tuple[Scales, ...]
    out_rows: int
    empty: float
    unscale: float = 2.0**-HEADROOM
    native: bool = True

    def __repr__(self) -> str:
        """Short, and another for another form: Triton makes names of it."""
        return f"form{hashlib.sha256(repr(dataclasses.astuple(self)).encode()).hexdigest()[:16]}"
