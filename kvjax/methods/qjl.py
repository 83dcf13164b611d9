"""QJL: sign sketches of keys, integers for values."""

from __future__ import annotations

import jax

from kvjax.codecs import QJL, Outliers, Uniform
from kvjax.core.errors import InputError
from kvjax.core.method import Method
from kvjax.core.rng import fold


def qjl(
    head_dim: int,
    *,
    rng: jax.Array,
    rows_per_channel: int = 2,
    outliers: int = 8,
    value_bits: int = 2,
    group: int = 32,
) -> Method:
    """Keys as signs of a sketch with `rows_per_channel * head_dim` rows; values as KIVI's.

    The `outliers` channels of most energy in a page have a sketch of their own, of `head_dim`
    rows.

    Source: QJL, arXiv 2406.03482; sketch sizes from its README (256 rows for 128 channels).
    Differs from the paper: the same sketch size in all layers (theirs doubles it in the first 15);
    outliers are chosen per page of the layout, not per 32 tokens.

    Example:
      >>> import jax
      >>> qjl(64, rng=jax.random.key(0)).name
      'qjl'
    """
    rest = head_dim - outliers
    if outliers < 1 or rest < 1:
        raise InputError(
            "head_dim",
            got=f"{head_dim} with {outliers} outlier channels",
            expected="at least one outlier and one other channel",
            fix="choose fewer outliers",
        )
    key = Outliers(
        QJL.random(outliers, rng=fold(rng, "sketch", "outliers"), rows=head_dim),
        QJL.random(rest, rng=fold(rng, "sketch", "rest"), rows=rows_per_channel * head_dim),
        outliers,
    )
    return Method(key, Uniform(value_bits, axis="channels", group=group), name="qjl")
