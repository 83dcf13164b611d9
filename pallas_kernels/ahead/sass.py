"""Loops of an `nvdisasm -c` listing, and what their instructions are: pure text, no jax.

    lane-instructions per value = instructions of the loop x threads / values read by an iteration

compares kernels without a GPU: a streaming multiprocessor issues 128 lane-instructions a clock.
These are static counts: nothing of stalls, occupancy or bandwidth is in them.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter

LABEL = re.compile(r"^\s*(\.L\w+):")
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)(.*)")
FUNCTION = re.compile(r"^\s*\.section\s+\.text\.(\S+?),")
BRANCH = re.compile(r"`\((\.L\w+)\)")


# What the integer and comparison pipe of Hopper takes, at half the rate of the others.
HALF_RATE = frozenset(
    "LOP3 SHF PRMT SEL ISETP FSETP FMNMX IMNMX VIMNMX VIMNMX3 PLOP3 LEA POPC FLO I2FP SGXT BMSK"
    " IADD3 VIADD VIADDMNMX IABS".split()
)


@dataclasses.dataclass(frozen=True)
class Loop:
    """Instructions between a label and a branch back to it, with modifiers, without NOPs."""

    opcodes: tuple[str, ...]

    def histogram(self) -> Counter[str]:
        """Opcode, without modifiers -> how often."""
        return Counter(op.split(".")[0] for op in self.opcodes)

    def products(self) -> int:
        """Matrix instructions."""
        return sum(op.startswith(("HMMA", "HGMMA", "IMMA", "IGMMA")) for op in self.opcodes)

    def multiplied(self) -> int:
        """Elements of left operands that one warp's fp16 products take, times their columns."""
        total = 0
        for op in self.opcodes:
            if m := re.match(r"HMMA\.168(8|16)\b", op):  # 16 rows, 8 columns
                total += 16 * int(m[1]) * 8
            elif m := re.match(r"HGMMA\.64x(\d+)x(\d+)\b", op):  # four warps together
                total += 16 * int(m[2]) * int(m[1])
        return total

    def half_rate(self) -> int:
        """Instructions of the integer and comparison pipe."""
        return sum(n for op, n in self.histogram().items() if op in HALF_RATE)


def functions(listing: str) -> dict[str, str]:
    """Name -> its part of a listing of several functions."""
    out: dict[str, list[str]] = {}
    name = ""
    for line in listing.splitlines():
        if m := FUNCTION.match(line):
            name = m[1]
        out.setdefault(name, []).append(line)
    return {name: "\n".join(lines) for name, lines in out.items() if name}


def loops(listing: str) -> list[Loop]:
    """Every loop of one function, one per branch backward."""
    labels: dict[str, int] = {}
    code: list[tuple[str, str]] = []
    found = []
    for line in listing.splitlines():
        if m := LABEL.match(line):
            labels[m[1]] = len(code)
        elif m := INSTRUCTION.match(line):
            code.append((m[1], m[2]))
    for i, (op, rest) in enumerate(code):
        target = BRANCH.search(rest) if op.startswith("BRA") else None
        start = labels.get(target[1], i) if target else i
        if start < i:
            found.append(Loop(tuple(op for op, _ in code[start : i + 1] if op != "NOP")))
    return found


def main_loop(listing: str) -> Loop | None:
    """The smallest loop with nearly the most matrix products, which leaves the masked loop out; the
    longest where there are none. None without loops."""
    found = loops(listing)
    if not found:
        return None
    most = max(loop.products() for loop in found)
    if not most:
        return max(found, key=lambda loop: len(loop.opcodes))
    near = [loop for loop in found if loop.products() >= 0.9 * most]
    return min(near, key=lambda loop: len(loop.opcodes))
