"""Policies that look at nothing but positions: the newest tokens, or a fair sample of all."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kvjax.core.codec import Array
from kvjax.core.pytree import pytree
from kvjax.core.rng import fold
from kvjax.policies.policy import Policy, Seen


@pytree
class Streaming(Policy):
    """The newest tokens: `s_j = position of j`.

    The first tokens, which the method keeps too, are the `sink` of the eviction.

    Source: StreamingLLM, arXiv 2309.17453 (4 sinks).
    Differs from the paper: keys keep the positions that they were made at; the paper counts
    positions inside the cache (see `rerotate`).

    Example:
      >>> from kvjax.policies.eviction import Eviction
      >>> Eviction(Streaming(), budget=256, sink=4).slots
      256
    """

    def score(self, seen: Seen) -> Array:
        return seen.positions.astype(jnp.float32)


@pytree
class Random(Policy):
    """A fair sample of all tokens so far, another one for each sequence and head: the baseline
    that every policy must beat.

    `s_j` is uniform on [0, 1) and belongs to the token: drawn from `rng`, sequence, head and
    position. So a token meets the same luck in every block, and what stays is a uniform sample
    without replacement of the whole history. Fresh draws in every block would favour the newest.

    Args:
      rng: a key from `jax.random.key`. Layers that are given the same one keep the same tokens.

    Source: the usual control; in kvpress drawn once, after prefill.

    Example:
      >>> import jax
      >>> sorted(Random(jax.random.key(0)).needs)
      []
    """

    rng: Array

    def score(self, seen: Seen) -> Array:
        b, h, _ = seen.positions.shape

        def draw(sequence: Array, head: Array, position: Array) -> Array:
            return jax.random.uniform(fold(self.rng, "random", sequence, head, position))

        over_slots = jax.vmap(draw, in_axes=(None, None, 0))
        over_heads = jax.vmap(over_slots, in_axes=(None, 0, 0))
        over_sequences = jax.vmap(over_heads, in_axes=(0, None, 0))
        return over_sequences(jnp.arange(b), jnp.arange(h), seen.positions)
