"""What the newest query attends to stays."""

from __future__ import annotations

from typing import ClassVar

import jax.numpy as jnp

from kvjax.core.codec import Array
from kvjax.core.pytree import pytree
from kvjax.policies.policy import Policy, Seen, columns


@pytree
class Tova(Policy):
    """Attention of the newest query, the mean over all query heads of the layer:

        s_j = mean over heads of softmax_j(q_newest . k)

    All heads of a layer keep the same tokens.

    Source: TOVA, arXiv 2401.06104.
    Differs from the paper: tokens leave after a block, not after each token; with blocks of one
    token it is the paper's. kvpress also protects the newest token, as `recent=1` of the eviction
    does.

    Example:
      >>> Tova().shared
      True
    """

    needs: ClassVar[frozenset[str]] = frozenset({"queries"})

    @property
    def shared(self) -> bool:
        return True

    def score(self, seen: Seen) -> Array:
        weight = columns(seen, last=1).total.mean(1, keepdims=True)  # [b, 1, s]
        return jnp.broadcast_to(weight, seen.positions.shape)
