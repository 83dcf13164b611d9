"""Neighbours stay or leave together."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp

from kvjax.core.codec import Array
from kvjax.core.errors import InputError
from kvjax.core.pytree import pytree, static
from kvjax.policies.policy import EMPTY, Policy, Seen


@pytree
class Chunked(Policy):
    """Another policy's scores, averaged over chunks of `size` tokens by position.

    What a chunk says stays whole. A budget that is no multiple of `size` ends within a chunk, and
    so do protected tokens.

    Args:
      inner: scores single tokens.
      size: tokens per chunk.

    Source: ChunkKV, arXiv 2502.00299 (chunks of 10 to 20 tokens). Differs from the paper: chunks
    begin at multiples of `size`, and layers do not share what they chose.

    Raises:
      InputError: a size below 1.

    Example:
      >>> from kvjax.policies import KeyNorm
      >>> Chunked(KeyNorm(), size=16).window
      0
    """

    inner: Policy
    size: int = static(default=16)

    def __post_init__(self):
        if self.size < 1:
            raise InputError("size", got=self.size, expected="1 or more", fix="the paper has 10")

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return self.inner.needs

    @property
    def window(self) -> int:
        return self.inner.window

    @property
    def shared(self) -> bool:
        return self.inner.shared

    @property
    def notes(self) -> Literal["attention", "verdict"] | None:
        return self.inner.notes

    def start(self, b: int, h: int, g: int, d: int) -> Any:
        return self.inner.start(b, h, g, d)

    def observe(self, seen: Seen) -> tuple[Array, Any]:
        return self.inner.observe(seen)

    def score(self, seen: Seen) -> Array:
        mean = jax.vmap(jax.vmap(self._mean))
        return mean(self.inner.score(seen), seen.positions)

    def _mean(self, score: Array, positions: Array) -> Array:
        """Of one head: `[s]`."""
        slots = positions.shape[0]
        chunk = jnp.where(positions >= 0, positions // self.size, -1)
        order = jnp.argsort(chunk)
        starts = jnp.diff(chunk[order], prepend=-2) != 0
        run = jnp.zeros(slots, jnp.int32).at[order].set(jnp.cumsum(starts) - 1)
        total = lambda x: jax.ops.segment_sum(x, run, num_segments=slots)
        means = total(score) / jnp.maximum(total(jnp.ones(slots)), 1)
        return jnp.where(positions >= 0, means[run], EMPTY)
