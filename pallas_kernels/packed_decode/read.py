"""Where the kernel's loads come from: pages of a row or of a pool, one or several in a step."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.bits import Words
from pallas_kernels.packed import Block, widen
from pallas_kernels.packed_decode.operands import Chunk

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Plan:
    """Static shape of a launch.

    Attributes:
      page: tokens of a page. slots: page slots of a sequence.
      unit_bits: narrowest plane of keys and values (see `bits`).
      together: pages read in one step.
      layout: where a page lies: "rows" `[layer, b, h, page]`, or "pool" `[layer, page, h]`.
      splits: programs per sequence and head.
      window: tokens that a query sees back from itself, or None.
      passes: groups of units that are done one after the other, each every so many units.
      channels: most channels of one matrix product.
      native: whether assembly is understood.
    """

    page: int
    slots: int
    unit_bits: int
    together: int
    layout: Literal["rows", "pool"]
    splits: int
    window: int | None
    passes: int
    channels: int
    native: bool

    @property
    def rows(self) -> int:
        """Tokens of a unit of one page."""
        return self.page * self.unit_bits // 16

    @property
    def units(self) -> int:
        """Units of a page."""
        return 16 // self.unit_bits

    @property
    def step(self) -> int:
        """Tokens of one step."""
        return self.together * self.page


@dataclasses.dataclass(frozen=True)
class Reader:
    """Loads for one sequence and head."""

    args: dict[str, Any]
    plan: Plan
    layer: Array
    b: Array
    h: Array

    def step(self, i: Array) -> Where:
        """The pages of step i."""
        plan, table = self.plan, self.args["table"]
        row = None
        slot = i
        if plan.together > 1:  # one number per row of a unit: which page, which row of it
            at = jax.lax.broadcasted_iota(jnp.int32, (plan.together * plan.rows,), 0)
            row = at % plan.rows
            slot = i * plan.together + at // plan.rows
        room = jnp.minimum(slot, plan.slots - 1)
        page = room if table is None else table[self.b, room]
        return Where(self, slot, page, row)

    def words(self, where: Where, block: Block, chunk: Chunk, *, transposed: bool) -> Words:
        """A chunk of a block's channels, `[rows, channels]`, or transposed."""
        columns: Any = pl.ds(chunk.start, chunk.size)
        if where.row is not None or chunk.used < chunk.size:
            columns = jax.lax.broadcasted_iota(jnp.int32, (chunk.size,), 0)
            columns = chunk.start + jnp.minimum(columns, chunk.used - 1)

        def load(plane: int, stretch: int) -> Array:
            ref, first = block.words[plane], stretch * self.plan.rows
            if where.row is None and chunk.used == chunk.size:
                rows: Any = pl.ds(first, self.plan.rows)
                tail = (columns, rows) if block.transposed else (rows, columns)
                words = ref[(*self.lead(where.page), *tail)]
            else:
                row, page = where.rows(first)
                if block.transposed:
                    words = ref[(*self.lead(page[None, :]), columns[:, None], row[None, :])]
                else:
                    words = ref[(*self.lead(page[:, None]), row[:, None], columns[None, :])]
            return words if transposed == block.transposed else words.T

        return Words(block, self.plan.unit_bits, self.plan.native, load)

    def lead(self, page: Array, *, heads: bool = True) -> tuple:
        """The first indices of an array of the cache."""
        if self.plan.layout == "rows":
            return (self.layer, self.b, self.h, page) if heads else (self.layer, self.b, page)
        return (self.layer, page, self.h) if heads else (self.layer, page)


@dataclasses.dataclass(frozen=True)
class Where:
    """The pages of one step.

    Attributes:
      slot, page: scalars, or one number per row where a step has several pages; a page's place in
        the sequence, and in memory.
      row: `[rows]`, the row of a unit within its page, or None for a single page.
    """

    reader: Reader
    slot: Array
    page: Array
    row: Array | None

    def rows(self, first: int) -> tuple[Array, Array]:
        """Rows from `first` on, and the page of each."""
        rows = self.reader.plan.rows
        if self.row is not None:
            return first + self.row, self.page
        row = first + jax.lax.broadcasted_iota(jnp.int32, (rows,), 0)
        return row, jnp.full((rows,), self.page)

    def tokens(self, ref: Any, column: int | None, unit: int) -> Array:
        """One float32 per token of a unit, `[rows]`."""
        reader, first = self.reader, unit * self.reader.plan.rows
        last = () if column is None else (column,)
        at = pl.ds(first, reader.plan.rows) if self.row is None else first + self.row
        return widen(ref[(*reader.lead(self.page), at, *last)])

    def channels(self, ref: Any, start: int, chunk: Chunk) -> Array:
        """One float32 per channel of a chunk whose part's channels begin at `start`."""
        at: Any = pl.ds(start, chunk.size)
        if chunk.used < chunk.size:
            at = jax.lax.broadcasted_iota(jnp.int32, (chunk.size,), 0)
            at = start + jnp.minimum(at, chunk.used - 1)
        return widen(ref[(*self.reader.lead(self.page), at)])

    def place(self, unit: int) -> Array:
        """Which tokens of the sequence a unit holds, in the order of the slots, `[rows]`."""
        return self.slot * self.reader.plan.page + self._token(unit)

    def visible(self, unit: int, length: Array) -> Array:
        """Which tokens of a unit there are and are in reach, `[rows]` bool."""
        reader, plan = self.reader, self.reader.plan
        seen = self.place(unit) < length
        if plan.window is None:
            return seen
        start = reader.args["starts"][reader.lead(self.page, heads=False)]
        now = reader.args["position"][reader.b]
        at = start + self._token(unit)
        return seen & (start >= 0) & (at <= now) & (now - at < plan.window)

    def _token(self, unit: int) -> Array:
        rows, row = self.reader.plan.rows, self.row
        if row is None:
            row = jax.lax.broadcasted_iota(jnp.int32, (rows,), 0)
        return unit * rows + row
