"""What all queries so far attended to stays."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import jax.numpy as jnp

from kvjax.core.codec import Array
from kvjax.core.pytree import pytree, static
from kvjax.policies.policy import Policy, Seen, columns


@pytree
class H2O(Policy):
    """Heavy hitters: attention summed over all queries since the token came,

        s_j = sum over i of A_ij

    kept in `mass` and updated after every block; the sum over what is kept, as in the paper's
    decoding. A plain sum favours old tokens, which more queries have seen.

    Args:
      normalized: divide by the number of tokens since, j's own query with them (kvpress'
        "observed attention").

    Source: arXiv 2306.14048. It keeps as many recent tokens as heavy hitters: set `recent` of the
    eviction to half its budget for that.
    Differs from the paper: one sum per KV head, the mean over its query heads.

    Example:
      >>> H2O() == H2O(normalized=True)
      False
    """

    needs: ClassVar[frozenset[str]] = frozenset({"queries"})

    normalized: bool = static(default=False)

    @property
    def notes(self) -> Literal["attention"]:
        return "attention"

    def observe(self, seen: Seen) -> tuple[Array, Any]:
        return seen.mass + columns(seen).total, seen.memory

    def score(self, seen: Seen) -> Array:
        if not self.normalized:
            return seen.mass
        newest = seen.query_positions.max(-1)[:, None, None]
        return seen.mass / jnp.maximum(newest - seen.positions + 1, 1)
