"""How `packed_decode` divides its work."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Config:
    """Tuning of one launch.

    Args:
      splits: parts of a sequence read by programs of their own; their results are merged.
      tokens: read per step of the loop; at least a page, or so many whole pages.
      passes: parts of a step that are done one after the other: of two, half the logits are in
        registers at once.
      channels: most channels of one matrix product; fewer take fewer registers.
      warps, stages: of a Triton program.
    """

    splits: int = 1
    tokens: int = 256
    passes: int = 1
    channels: int = 256
    warps: int = 2
    stages: int = 2


# Bits of the narrowest plane -> tuning, from compiling for H200 ahead of time: the most warps that
# each have 16 rows of a unit to multiply, the largest steps that do not spill.
_BY_UNIT = {
    1: Config(tokens=256, channels=64, warps=1),
    2: Config(tokens=256, warps=2),
    4: Config(tokens=256, warps=2),
    8: Config(tokens=128, warps=4),
    16: Config(tokens=256, warps=4),
}
_WARPS = 8  # per processor, of some 230 registers a thread


def heuristic(
    batch: int, heads: int, slots: int, page: int, *, unit_bits: int = 2, processors: int = 132
) -> Config:
    """One wave of programs on all processors, none with less than a step to do.

    Args:
      slots: page slots of a sequence. unit_bits: narrowest plane of keys and values.
      processors: streaming multiprocessors; 132 on H100 and H200.

    Example:
      >>> heuristic(1, 8, slots=512, page=256, unit_bits=2).splits
      66
    """
    config = _BY_UNIT[unit_bits]
    splits = splits_of(config, batch * heads, slots, page, processors=processors)
    return dataclasses.replace(config, splits=splits)


def splits_of(config: Config, rows: int, slots: int, page: int, *, processors: int = 132) -> int:
    """Parts of a sequence that make one wave of programs, of `rows` sequences times heads."""
    steps = max(1, slots * page // config.tokens)
    programs = processors * _WARPS // config.warps
    return max(1, min(steps, programs // rows))


def together(config: Config, page: int, slots: int) -> int:
    """Pages of one step: a power of two, as Triton takes tiles.

    Example:
      >>> together(Config(tokens=256), page=64, slots=3)
      2
    """
    pages = max(1, min(config.tokens // page, slots))
    return 1 << (pages.bit_length() - 1)
