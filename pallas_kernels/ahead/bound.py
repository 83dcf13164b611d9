"""What a loop's instructions and the bytes it reads allow on an H200: projected, never measured.

Each of memory, instruction issue, the half-rate pipe and the matrix units has a time below which it
cannot go. The longest is a lower bound of the kernel's time: stalls, latency and launch come on
top.
"""

from __future__ import annotations

import dataclasses

from pallas_kernels.ahead.sass import Loop

PROCESSORS = 132
CLOCK = 1.755e9  # Hz, sustained; 1.98e9 at most
BANDWIDTH = 4.3e12  # bytes/s of a copy; 4.8e12 on paper
LANES = 128  # lane-instructions issued per clock and processor
HALF_LANES = 64  # of them, those that the half-rate pipe takes
FMAS = 1024  # of fp16 matrix products per clock and processor: a cautious figure for mma.sync
REGISTERS = 65536  # of a processor
SHARED = 233472  # bytes of a processor
RESERVED = 1024  # bytes of them that a program takes besides its own
MOST_WARPS, MOST_PROGRAMS = 64, 32


@dataclasses.dataclass(frozen=True)
class Bound:
    """Projected times in microseconds."""

    memory: float
    issue: float
    half_rate: float
    products: float

    @property
    def longest(self) -> float:
        """The lower bound."""
        return max(dataclasses.astuple(self))

    @property
    def binds(self) -> str:
        """What sets it."""
        return max(dataclasses.asdict(self).items(), key=lambda item: item[1])[0]


def project(
    loop: Loop, threads: int, iterations: float, size: int, columns: int, operands: int
) -> Bound:
    """The bound of a loop that all programs together run `iterations` times.

    Args:
      threads: of a program. size: bytes read.
      operands: elements of the left operands of the products of an iteration; each meets `columns`
        columns.
    """
    seconds = lambda work, rate: work / (rate * PROCESSORS * CLOCK) * 1e6
    lanes = iterations * threads
    return Bound(
        memory=size / BANDWIDTH * 1e6,
        issue=seconds(lanes * len(loop.opcodes), LANES),
        half_rate=seconds(lanes * loop.half_rate(), HALF_LANES),
        products=seconds(iterations * operands * columns, FMAS),
    )


def resident_warps(registers: int, threads: int, shared: int) -> int:
    """Warps that a processor holds at once, for registers, shared memory and places.

    Example:
      >>> resident_warps(registers=220, threads=64, shared=0)
      8
    """
    warps = -(-threads // 32)
    by_registers = REGISTERS // (-(-registers // 8) * 8 * 32) // 4 * 4 // warps
    by_shared = SHARED // (shared + RESERVED)
    return min(by_registers, by_shared, MOST_PROGRAMS, MOST_WARPS // warps) * warps
