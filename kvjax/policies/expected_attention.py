"""What future queries are expected to attend to stays."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from kvjax.core.codec import Array
from kvjax.core.errors import InputError
from kvjax.core.pytree import pytree, static
from kvjax.policies.policy import EMPTY, Policy, Seen
from kvjax.policies.rerotate import turn


@pytree
class QueryMoments:
    """Running statistics of queries before RoPE, merged block by block in a stable way.

    Attributes:
      count: `[b]` float32, queries seen.
      mean: `[b, h, g, d]` float32.
      scatter: `[b, h, g, d, d]` float32, sum of (q - mean)(q - mean)^T.
    """

    count: Array
    mean: Array
    scatter: Array

    def merge(self, query: Array, real: Array) -> QueryMoments:
        """With the queries `[b, h, g, t, d]` where `real: [b, t]`."""
        mask = real.astype(jnp.float32)[:, None, None, :, None]
        more = real.sum(-1).astype(jnp.float32)
        total = self.count + more
        mean = (query * mask).sum(3) / jnp.maximum(more, 1)[:, None, None, None]
        apart = (query - mean[..., None, :]) * mask
        step = mean - self.mean
        share = (more / jnp.maximum(total, 1))[:, None, None, None]
        between = (self.count[:, None, None, None] * share)[..., None]
        scatter = self.scatter + jnp.einsum("bhgti,bhgtj->bhgij", apart, apart)
        scatter = scatter + between * step[..., :, None] * step[..., None, :]
        return QueryMoments(total, self.mean + step * share, scatter)


@pytree
class ExpectedAttention(Policy):
    """Attention expected of queries to come, were they Gaussian with the moments of those so far:

        z_j = mu . k'_j + k'_j^T Sigma k'_j / 2,    k'_j = R^T k_j
        s_j = (softmax_j(z) + epsilon) |v_j|,       mean of the softmax over the query heads

    mu and Sigma are those of scaled queries before RoPE, and R is the mean of the rotations at the
    next `future` positions. Since E exp(q . k) = exp(z) for Gaussian q, no query is needed but in
    the statistics, which are kept in `memory`: d^2 numbers per query head.

    Args:
      future: positions to come that the rotation is averaged over.
      epsilon: added to the softmax, so that values count where no attention is expected.
      sink: first positions that are left out of the statistics and of the softmax, whose attention
        is of another kind; they score highest.

    Source: arXiv 2510.00636; future 512 and sink 4 there, epsilon 0 to 0.02 (0.01 with Ada-KV, the
    default here).
    Differs from the paper: statistics run on over blocks, where the paper takes them of the whole
    prompt; the candidates are those of the block.

    Raises:
      InputError: numbers that make no sense.

    Example:
      >>> ExpectedAttention(future=256).start(1, 2, 4, 8).scatter.shape
      (1, 2, 4, 8, 8)
    """

    needs: ClassVar[frozenset[str]] = frozenset({"queries"})

    future: int = static(default=512)
    epsilon: float = static(default=0.01)
    sink: int = static(default=4)

    def __post_init__(self):
        if self.future < 1 or self.sink < 0 or not self.epsilon >= 0:
            raise InputError(
                "expected attention",
                got=f"future {self.future}, epsilon {self.epsilon}, sink {self.sink}",
                expected="future of 1 or more, epsilon and sink of 0 or more",
                fix="choose such numbers",
            )

    def start(self, b: int, h: int, g: int, d: int) -> QueryMoments:
        zeros = lambda *shape: jnp.zeros(shape, jnp.float32)
        return QueryMoments(zeros(b), zeros(b, h, g, d), zeros(b, h, g, d, d))

    def observe(self, seen: Seen) -> tuple[Array, Any]:
        at = seen.query_positions
        angles = at.astype(jnp.float32)[..., None] * seen.frequencies  # [b, t, d / 2]
        angles = angles[:, None, None]
        unrotated = turn(seen.query, jnp.cos(angles), -jnp.sin(angles))
        return seen.mass, seen.memory.merge(unrotated, at >= self.sink)

    def score(self, seen: Seen) -> Array:
        moments: QueryMoments = seen.memory
        newest = seen.query_positions.max(-1)  # [b]
        ahead = newest[:, None] + 1 + jnp.arange(self.future)
        angles = ahead.astype(jnp.float32)[..., None] * seen.frequencies  # [b, future, d / 2]
        cos, sin = jnp.cos(angles).mean(1), jnp.sin(angles).mean(1)
        key = turn(seen.key, cos[:, None, None], -sin[:, None, None])
        spread = moments.scatter / jnp.maximum(moments.count, 1)[:, None, None, None, None]
        judged = seen.real & (seen.positions >= self.sink)

        def expected(one: tuple[Array, Array]) -> Array:  # of one query head per KV head
            mean, covariance = one
            bend = jnp.einsum("bhsi,bhij->bhsj", key, covariance)
            z = jnp.einsum("bhsd,bhd->bhs", key, mean) + (bend * key).sum(-1) / 2
            return jax.nn.softmax(jnp.where(judged, z, EMPTY), axis=-1)

        heads = (jnp.moveaxis(moments.mean, 2, 0), jnp.moveaxis(spread, 2, 0))
        weight = jax.lax.map(expected, heads).mean(0)  # [b, h, s]
        score = (weight + self.epsilon) * jnp.linalg.norm(seen.value, axis=-1)
        score = jnp.where(judged, score, 0.0)
        return jnp.where(seen.positions < self.sink, score.max() + 1, score)
