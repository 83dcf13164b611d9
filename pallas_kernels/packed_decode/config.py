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


def heuristic(batch: int, heads: int, slots: int, page: int, processors: int = 132) -> Config:
    """Enough programs for every processor several times over, none with less than a step to do.

    Args:
      slots: page slots of a sequence. processors: streaming multiprocessors; 132 on H100 and H200.
    """
    steps = max(1, slots * page // 256)
    wanted = -(-8 * processors // (batch * heads))
    return Config(splits=max(1, min(steps, wanted)))
