"""How `probe_scores` divides its work."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Config:
    """Tuning of both passes.

    Args:
      tile: rows of a program, which it holds: of queries in the first pass, of keys in the second.
      step: rows of the other side, read per step of its loop. Both are powers of two.
      key_splits, query_splits: parts of the other side that have programs of their own, in the
        first and in the second pass; their results are merged.
      channels: most channels of one matrix product.
      warps, stages: of a Triton program.
    """

    tile: int = 64
    step: int = 128
    key_splits: int = 1
    query_splits: int = 1
    channels: int = 256
    warps: int = 4
    stages: int = 2


SHARED = 232_448  # bytes of shared memory that a program can have on H100 and H200


def heuristic(
    batch: int,
    heads: int,
    queries: int,
    keys: int,
    processors: int = 132,
    *,
    row: int = 256,
) -> Config:
    """Enough programs for every processor several times over, none with less than a step to do.

    Args:
      queries: rows per KV head, of all its query heads. keys: per KV head.
      processors: streaming multiprocessors; 132 on H100 and H200.
      row: bytes of a key.

    Example:
      >>> wide = heuristic(1, 8, 1024, 4096, row=4 * 256)
      >>> wide.tile, wide.step, wide.stages
      (64, 64, 2)
    """
    usual = _fitting(row)

    def splits(rows: int, others: int) -> int:
        programs = batch * heads * -(-rows // usual.tile)
        return max(1, min(-(-others // usual.step), 4 * processors // programs))

    return dataclasses.replace(
        usual, key_splits=splits(queries, keys), query_splits=splits(keys, queries)
    )


def _fitting(row: int) -> Config:
    """What shared memory has room for: the rows that are held, and those of the steps under way."""
    config = Config()
    smaller: tuple[dict[str, int], ...] = ({"step": 64}, {"step": 32}, {"stages": 1}, {"tile": 32})
    for change in smaller:
        if (config.tile + config.stages * config.step) * row > SHARED:
            config = dataclasses.replace(config, **change)
    return config
