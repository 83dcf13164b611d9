"""Codes as fp16 operands of a matrix product, straight from the words: one AND per two values.

A page of words is read as units: unit u holds tokens `u * rows .. (u + 1) * rows - 1` of the page,
`rows = page * width / 16` for the narrowest plane width of keys and values, so that units of all
planes and all blocks are the same tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp

from pallas_kernels import asm
from pallas_kernels.packed import Block, Term, terms, widths

Array = jax.Array

MANTISSA = 10  # bits of fp16: a masked word below 2**10 is a subnormal, exactly


def base(bits: int, unit: int, unit_bits: int) -> tuple[int, int]:
    """How far the words of a unit go right, and at which bit its codes then begin.

    Example:
      >>> [base(2, unit, unit_bits=2) for unit in range(8)]
      [(0, 0), (0, 2), (0, 4), (0, 6), (0, 8), (10, 0), (10, 2), (10, 4)]
    """
    if bits == 16:  # a bf16 number as it is
        return 0, 24
    width = widths(bits)[0]
    at = unit // (width // unit_bits) * width
    down = 0 if at + width <= MANTISSA else MANTISSA if width < 4 else 8
    return down, at - down


def unit_order(bits: int, unit_bits: int, units: Iterable[int]) -> list[int]:
    """Units in the order of their words in memory, so that words in registers die early.

    Example:
      >>> unit_order(4, unit_bits=2, units=range(8))
      [0, 2, 4, 6, 1, 3, 5, 7]
    """
    stretches = widths(bits)[0] // unit_bits
    return sorted(units, key=lambda unit: (unit % stretches, unit))


def term_offset(block: Block, term: Term) -> int:
    """A term's operand is `2**offset` times too large: its bit lies above the unit's first."""
    inside = len(term.bits) == 1 and term.bits[0] < block.widths[0]
    return term.bits[0] if term.plane is None and inside else 0


@dataclasses.dataclass
class Words:
    """Words of one block in a page, and what was made of them: each shift is done once.

    Args:
      load: (plane, which of its stretches of `rows` rows) -> words.
    """

    block: Block
    unit_bits: int
    native: bool
    load: Callable[[int, int], Array]

    def __post_init__(self):
        self.shifted: dict[tuple[int, int, int], Array] = {}

    def operands(self, unit: int) -> list[Array]:
        """fp16 `y * 2**(e + offset - 24)` of every term y of the codes of a unit, `e = base[1]`;
        of 16 bits, the bf16 numbers."""
        if self.block.bits == 16:
            return [jax.lax.bitcast_convert_type(self._words(0, unit), jnp.bfloat16)]
        summands = terms(self.block.bits, self.block.levels is not None)
        return [self._operand(term, unit) for term in summands]

    def _operand(self, term: Term, unit: int) -> Array:
        e = base(self.block.bits, unit, self.unit_bits)[1]
        if term.plane is not None:  # a field
            words = self._aligned(term.plane, unit, 0)
            return asm.as_subnormal(words, ((1 << len(term.bits)) - 1) << e, self.native)
        offset = term_offset(self.block, term)
        if offset:  # one bit of the first plane, read where it is
            return asm.as_subnormal(self._aligned(0, unit, 0), 1 << (e + offset), self.native)
        width = self.block.widths[0]
        bits = [(0, unit, bit) if bit < width else (1, unit, bit - width) for bit in term.bits]
        parity = self._aligned(*bits[0])
        for bit in bits[1:]:
            parity = asm.xor(parity, self._aligned(*bit), self.native)
        return asm.as_subnormal(parity, 1 << e, self.native)

    def _aligned(self, plane: int, unit: int, bit: int) -> Array:
        """Words of a plane with `bit` of the unit's codes at the unit's first bit."""
        e = base(self.block.bits, unit, self.unit_bits)[1]
        width = self.block.widths[plane]
        index, stretch = divmod(unit, width // self.unit_bits)
        right = index * width + bit - e
        key = (plane, stretch, right)
        if key not in self.shifted:
            self.shifted[key] = asm.shift(self._words(plane, stretch), right, self.native)
        return self.shifted[key]

    def _words(self, plane: int, stretch: int) -> Array:
        key = (plane, stretch, 0)
        if key not in self.shifted:
            self.shifted[key] = self.load(plane, stretch)
        return self.shifted[key]
