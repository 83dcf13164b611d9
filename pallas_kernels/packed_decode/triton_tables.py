"""Fills in the tables of `triton_form` from what `packed_decode` is given."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.bits import base, term_offset, unit_order
from pallas_kernels.packed import Block, Part, Term, terms
from pallas_kernels.packed_decode.operands import Chunk, Query, chunks, leaves_constant
from pallas_kernels.packed_decode.read import Plan
from pallas_kernels.packed_decode.triton_form import (
    SMALLEST,
    BlockForm,
    CutForm,
    Form,
    PartForm,
    Recipe,
    Scales,
    Words,
)
from pallas_kernels.packed_decode.values import HEADROOM


def describe(
    args: dict[str, Any], plan: Plan, columns: int, empty: float
) -> tuple[Form, list[jax.Array]]:
    """The form of a launch, and its arrays in the order of their numbers.

    Args:
      args: what `kernel._body` gets. columns: of queries. empty: a logit of nothing.
    """
    tables = _Tables(plan)
    keys = [
        tables.part(part, query, _flat(query.terms), [None] * len(part.blocks))
        for part, query in zip(args["key"], args["queries"], strict=True)
    ]
    values = [
        tables.part(part, None, None, weights)
        for part, weights in zip(args["value"], args["weights"], strict=True)
    ]
    number = tables.number
    optional = lambda name: None if args[name] is None else number(args[name])
    used = plan.together * plan.rows
    tile = max(SMALLEST, 1 << (used - 1).bit_length())
    _, pages, heads = args["key"][0].blocks[0].words[0].shape[:3]
    form = Form(
        layer=number(args["layer"]),
        lengths=number(args["lengths"]),
        table=optional("table"),
        starts=optional("starts"),
        position=optional("position"),
        heads=heads,
        pages=pages,
        slots=plan.slots,
        page=plan.page,
        rows=plan.rows,
        together=plan.together,
        used=used,
        tile=tile,
        unmasked=plan.window is None and used == tile,
        step=plan.step,
        splits=plan.splits,
        window=plan.window,
        columns=columns,
        passes=tuple(tuple(range(n, plan.units, plan.passes)) for n in range(plan.passes)),
        keys=tuple(keys),
        values=tuple(values),
        parts=tuple(tables.parts),
        blocks=tuple(tables.blocks),
        cuts=tuple(tables.cuts),
        scales=tuple(tables.scales),
        out_rows=tables.out_rows,
        empty=empty,
    )
    return form, tables.arrays


class _Tables:
    """The tables of a form while they are written; each method gives the number of its entry."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self.arrays: list[jax.Array] = []
        self.parts: list[PartForm] = []
        self.blocks: list[BlockForm] = []
        self.cuts: list[CutForm] = []
        self.scales: list[Scales] = []
        self.out_rows = 0

    def number(self, array: jax.Array) -> int:
        """Of an array; one that is met again keeps its number."""
        known = [n for n, other in enumerate(self.arrays) if other is array]
        if known:
            return known[0]
        self.arrays.append(array)
        return len(self.arrays) - 1

    def part(
        self,
        part: Part,
        query: Query | None,
        operands: list[jax.Array] | None,
        weights: list[jax.Array | None],
    ) -> int:
        """A part of the keys, with its query, or of the values, with weights of its blocks."""
        first_block, first_cut, done, operand = len(self.blocks), len(self.cuts), 0, 0
        for block, weight in zip(part.blocks, weights, strict=True):
            self._block(block, operand, weight)
            for chunk in chunks(block, self.plan.channels):
                array = None if operands is None else operands[len(self.cuts) - first_cut]
                self._cut(len(self.blocks) - 1, chunk, done, array)
                done += chunk.used
                operand += len(self.blocks[-1].factors)
        by_channel = part.channel_scale is not None
        offsets = part.channel_zero is not None or any(block.offset for block in part.blocks)
        self.parts.append(
            PartForm(
                blocks=tuple(range(first_block, len(self.blocks))),
                cuts=tuple(range(first_cut, len(self.cuts))),
                token_scale=self._scales(part.token_scale, part.column),
                token_zero=self._scales(part.token_zero, part.column),
                channel_scale=self._scales(part.channel_scale, 0, part.size),
                channel_zero=self._scales(part.channel_zero, 0, part.size),
                constant=offsets if by_channel else leaves_constant(part),
                scale=-1 if query is None else self.number(query.scale),
                const=-1 if query is None else self.number(query.const),
                total=-1 if query is None else self.number(query.total),
                smallest=1.0 if part.token_scale is None else 1e-30,
            )
        )
        return len(self.parts) - 1

    def _block(self, block: Block, first_operand: int, weight: jax.Array | None) -> None:
        plan = self.plan
        summands = [None] if block.bits == 16 else terms(block.bits, block.levels is not None)
        bits = [base(block.bits, u, plan.unit_bits)[1] for u in range(plan.units)]
        room = 0 if weight is None else HEADROOM
        passes = [range(n, plan.units, plan.passes) for n in range(plan.passes)]
        orders = [unit_order(block.bits, plan.unit_bits, units) for units in passes]
        both = list(zip(passes, orders, strict=True))
        first = len(self.cuts)
        self.blocks.append(
            BlockForm(
                bits=block.bits,
                words=tuple(self._words(w, block.transposed) for w in block.words),
                cuts=tuple(range(first, first + len(chunks(block, plan.channels)))),
                factors=tuple(1.0 if t is None else 2.0 ** t.bits[0] for t in summands),
                offset=block.offset,
                first_operand=first_operand,
                weights=-1 if weight is None else self.number(weight),
                recipes=tuple(
                    tuple(_recipe(block, t, u, plan.unit_bits) for t in summands)
                    for u in range(plan.units)
                ),
                sizes=tuple(2.0 ** (24 - e + room) for e in bits),
                orders=tuple(map(tuple, orders)),
                places=tuple(tuple(order.index(u) for u in units) for units, order in both),
                turns=tuple(tuple(units.index(u) for u in order) for units, order in both),
            )
        )

    def _cut(self, block: int, chunk: Chunk, in_part: int, operand: jax.Array | None) -> None:
        number = -1 if operand is None else self.number(operand)
        count = 0 if operand is None else operand.shape[2]
        cut = CutForm(
            block, chunk.start, chunk.size, chunk.used, in_part, number, count, self.out_rows
        )
        self.cuts.append(cut)
        self.out_rows += chunk.size if operand is None else 0

    def _words(self, words: jax.Array, transposed: bool) -> Words:
        rows, channels = words.shape[-2:][:: -1 if transposed else 1]
        strides = (1, rows) if transposed else (channels, 1)
        return Words(self.number(words), rows * channels, *strides)

    def _scales(self, kept: jax.Array | None, column: int | None, channels: int = 0) -> int | None:
        if kept is None:
            return None
        columns = channels or (1 if column is None else kept.shape[-1])
        is_bits = kept.dtype == jnp.uint16
        self.scales.append(Scales(self.number(kept), columns, column or 0, is_bits))
        return len(self.scales) - 1


def _recipe(block: Block, term: Term | None, unit: int, unit_bits: int) -> Recipe:
    """As `bits.Words.operands` reads a term; None is a number of 16 bits."""
    e = base(block.bits, unit, unit_bits)[1]

    def read(bit: int, plane: int) -> tuple[int, int, int]:
        """Words of a plane with a bit of it where the unit's codes begin."""
        width = block.widths[plane]
        index, stretch = divmod(unit, width // unit_bits)
        return plane, stretch, index * width + bit - e

    if term is None:
        return Recipe((0,), (unit,), (0,), 0)
    offset = term_offset(block, term)
    if term.plane is not None:
        reads, mask = [read(0, term.plane)], ((1 << len(term.bits)) - 1) << e
    elif offset:
        reads, mask = [read(0, 0)], 1 << (e + offset)
    else:
        low = block.widths[0]
        reads = [read(b, 0) if b < low else read(b - low, 1) for b in term.bits]
        mask = 1 << e
    planes, stretches, rights = zip(*reads, strict=True)
    return Recipe(planes, stretches, rights, mask)


def _flat(nested: list[list[jax.Array]]) -> list[jax.Array]:
    return [array for inner in nested for array in inner]
