"""The softmax monoid: attention over any split of the tokens, merged exactly."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kvjax.core.codec import matmul, matmul_t
from kvjax.core.pytree import pytree
from kvjax.core.storage import widen

Array = jax.Array

# Finite, so that differences of two empty parts are 0 and not NaN; far below any real logit.
EMPTY_LSE = -1e30


@pytree
class Partial:
    """Attention output over some of the tokens: normalized there, with its log-sum-exp.

    Invariant: `merge` is associative and commutative, with `empty` as its identity; merging the
    parts of any partition of the tokens gives softmax attention over all of them.

    Attributes:
      out: `[..., d]` float32, softmax-weighted mean of the values seen.
      lse: `[...]` float32, log of the sum of exponentials of the logits seen.

    Example:
      >>> import jax.numpy as jnp
      >>> a = Partial(out=jnp.array([[1.0]]), lse=jnp.array([0.0]))
      >>> float(a.merge(Partial.empty((1,), 1)).out[0, 0])
      1.0
    """

    out: Array
    lse: Array

    @staticmethod
    def empty(shape: tuple[int, ...], d: int) -> Partial:
        """The identity: no token seen."""
        return Partial(jnp.zeros((*shape, d), jnp.float32), jnp.full(shape, EMPTY_LSE, jnp.float32))

    def merge(self, other: Partial) -> Partial:
        """Attention over the tokens of both (which must not overlap)."""
        top = jnp.maximum(self.lse, other.lse)
        a, b = jnp.exp(self.lse - top), jnp.exp(other.lse - top)
        out = (self.out * a[..., None] + other.out * b[..., None]) / (a + b)[..., None]
        return Partial(out, top + jnp.log(a + b))

    def merge_axis(self, axis_name: str) -> Partial:
        """Merges over a mesh axis, inside `shard_map`: each device holds a part of the tokens."""
        top = jax.lax.pmax(self.lse, axis_name)
        weight = jnp.exp(self.lse - top)[..., None]
        both = jnp.concatenate([self.out * weight, weight], -1)
        both = jax.lax.psum(both, axis_name)  # one reduction: [..., d + 1]
        return Partial(both[..., :-1] / both[..., -1:], top + jnp.log(both[..., -1]))


def dense_partial(q: Array, k: Array, v: Array, mask: Array, bias: Array | None = None) -> Partial:
    """Attention over tokens that are kept as they are.

    Args:
      q: `[..., r, d]` float32 queries, already scaled. k, v: `[..., t, d]` as kept (see
        `storage`).
      mask: bool, broadcasts to `[..., r, t]`; False hides a token. A row that sees nothing gives
        the empty part: zeros, not NaN.
      bias: added to the logits, broadcasts to `[..., r, t]`.
    """
    logits = matmul_t(q, widen(k))
    logits = jnp.where(mask, logits if bias is None else logits + bias, -jnp.inf)
    top = jnp.maximum(logits.max(-1), EMPTY_LSE)
    p = jnp.exp(logits - top[..., None])
    total = p.sum(-1)
    out = matmul(p, widen(v)) / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)[..., None]
    return Partial(out, jnp.where(total > 0, top + jnp.log(total), EMPTY_LSE))
