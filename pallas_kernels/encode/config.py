"""How `encode` divides its work."""

from __future__ import annotations

import dataclasses

from pallas_kernels import planes


@dataclasses.dataclass(frozen=True)
class Config:
    """Tuning of one launch.

    Args:
      rows: rows of words of one program, a power of two, each of 2 tokens (8 bits) to 16 (1 bit).
      channels: most channels of one matrix product.
      warps, stages: of a Triton program.
    """

    rows: int = 64
    channels: int = 64
    warps: int = 4
    stages: int = 1


def heuristic(
    bits: int, d: int, *, dense: bool = False, wide: bool = False, gain: bool = False
) -> Config:
    """As many rows as registers take, by compiling for an H200 without spills.

    A row of tokens in several planes is kept as several words per channel until it is full.

    Args:
      d: channels. dense: a matrix comes first. wide: vectors are float32. gain: scales need the
        codes' levels.

    Example:
      >>> [(c.rows, c.warps) for c in (heuristic(2, 128), heuristic(3, 128), heuristic(7, 128))]
      [(64, 4), (64, 8), (16, 8)]
    """
    widths = planes.PLANES[bits]
    words = d * sum(width // min(widths) for width in widths)
    warps = 8 if words > 128 or (dense and wide) or (gain and bits == 4) else 4
    rows = 64
    if words > 128:
        if dense or gain:
            rows = 32
        if wide and (dense or gain):
            rows = 16
    while rows > 16 and rows * words > 96 * 32 * warps:
        rows //= 2
    channels = 128 if dense and not wide else 64
    return Config(rows, channels, warps, stages=2 if wide and words <= 128 else 1)
