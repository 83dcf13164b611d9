"""Small keys stay."""

from __future__ import annotations

import jax.numpy as jnp

from kvjax.core.codec import Array
from kvjax.core.pytree import pytree
from kvjax.policies.policy import Policy, Seen


@pytree
class KeyNorm(Policy):
    """`s_j = -|k_j|`: keys of small norm draw most attention, and need no query to be found.

    Source: arXiv 2406.11430.
    Differs from the paper: it leaves the first layers whole; here that is the business of the
    budgets.

    Example:
      >>> KeyNorm().window
      0
    """

    def score(self, seen: Seen) -> Array:
        return -jnp.linalg.norm(seen.key.astype(jnp.float32), axis=-1)
