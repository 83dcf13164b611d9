"""What the newest queries attend to stays, with its neighbours."""

from __future__ import annotations

from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from kvjax.core.codec import Array
from kvjax.core.errors import InputError
from kvjax.core.pytree import pytree, static
from kvjax.policies.policy import Policy, Seen, columns


@pytree
class SnapKV(Policy):
    """Attention of a window of newest queries, pooled over neighbouring tokens:

        s_j = pool over neighbours of  sum over the last w queries i of  A_ij

    with A the softmax over all that a query sees, mean over the query heads of a KV head. The
    window itself always stays, and gives nothing to its neighbours.

    Neighbours are the next kept tokens by position, however far away: after an eviction there are
    gaps, and empty slots are passed over. A block of fewer than `window` tokens judges with the
    queries that it has.

    Args:
      window: queries that judge, and tokens that stay.
      kernel: width of the pooling, odd; 1 is none.
      pool: "avg" or "max".

    Source: arXiv 2404.14469 (window 32, kernel 5, "avg" in its code).
    Differs from the paper: one choice per KV head, from the mean over its query heads (the paper
    repeats keys and chooses per query head).

    Raises:
      InputError: a kernel that is even, numbers below 1, another pooling.

    Example:
      >>> SnapKV(window=16).window
      16
    """

    needs: ClassVar[frozenset[str]] = frozenset({"queries"})

    window: int = static(default=32)
    kernel: int = static(default=5)
    pool: Literal["avg", "max"] = static(default="avg")

    def __post_init__(self):
        if self.window < 1 or self.kernel < 1 or self.kernel % 2 == 0:
            raise InputError(
                "SnapKV",
                got=f"window {self.window}, kernel {self.kernel}",
                expected="a window of 1 or more, an odd kernel",
                fix="choose such numbers",
            )
        if self.pool not in ("avg", "max"):
            raise InputError("pool", got=repr(self.pool), expected="avg or max", fix="name one")

    def score(self, seen: Seen) -> Array:
        newest = seen.query_positions.max(-1)[:, None, None]
        before = seen.real & (seen.positions <= newest - self.window)
        weight = jnp.where(before, columns(seen, last=self.window).total, 0.0)
        empties_last = jnp.where(seen.real, seen.positions, jnp.iinfo(jnp.int32).max)
        order = jnp.argsort(empties_last, axis=-1, stable=True)
        pooled = self._pooled(jnp.take_along_axis(weight, order, axis=-1))
        return jnp.take_along_axis(pooled, jnp.argsort(order, axis=-1), axis=-1)

    def _pooled(self, x: Array) -> Array:
        window, strides = (1, 1, self.kernel), (1, 1, 1)
        if self.pool == "max":  # weights are 0 or more, so the zeros of padding never win
            return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, strides, "SAME")
        return jax.lax.reduce_window(x, 0.0, jax.lax.add, window, strides, "SAME") / self.kernel
