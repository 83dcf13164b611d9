"""Keys that differ from the rest stay."""

from __future__ import annotations

import jax.numpy as jnp

from kvjax.core.codec import Array
from kvjax.core.pytree import pytree
from kvjax.policies.policy import Policy, Seen


@pytree
class KeyDiff(Policy):
    """Minus the cosine to the mean direction of the head's keys:

        u_j = k_j / |k_j|,    s_j = -cos(u_j, mean of u over the candidates)

    The mean is taken anew over the candidates of every block, and needs no query.

    Source: arXiv 2504.15364.
    Differs from the paper: in nothing. EpiCache's code takes one mean over all heads of a layer
    from the second block on.

    Example:
      >>> sorted(KeyDiff().needs)
      []
    """

    def score(self, seen: Seen) -> Array:
        unit = _unit(seen.key.astype(jnp.float32))
        anchor = jnp.where(seen.real[..., None], unit, 0.0).sum(2)  # [b, h, d], any length will do
        return -jnp.einsum("bhsd,bhd->bhs", unit, _unit(anchor))


def _unit(x: Array) -> Array:
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
