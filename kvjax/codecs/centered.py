"""A constant taken out before coding: most of a real key is one vector common to all tokens."""

from __future__ import annotations

import jax.numpy as jnp

from kvjax.core.codec import Acc, Array, Code, Codec, Prepared
from kvjax.core.errors import InputError
from kvjax.core.pytree import pytree


@pytree
class Centered(Codec):
    """`inner` on `x - mean`.

        <q, x_hat> = <q, mean> + <q, y_hat>        sum p x_hat = (sum p) mean + sum p y_hat

    On keys the mean shifts all packed logits alike, but not those of the exact windows, so it is
    added, once per query.

    Args:
      mean: `[d]`, or `[h, 1, 1, d]` for one mean per KV head.
    """

    mean: Array
    inner: Codec

    def check(self, head_dim: int, page: int) -> None:
        if self.mean.shape[-1] != head_dim:
            raise InputError(
                "mean",
                got=f"{self.mean.shape[-1]} channels",
                expected=f"{head_dim}",
                fix="use the mean of vectors of this head_dim",
            )
        self.inner.check(head_dim, page)

    def encode(self, x: Array, positions: Array | None = None) -> Code:
        return self.inner.encode(x.astype(jnp.float32) - self.mean, positions)

    def decode(self, code: Code) -> Array:
        return self.inner.decode(code) + self.mean

    def prepare(self, q: Array) -> Prepared:
        shift = (q.astype(jnp.float32) * self.mean).sum(-1, keepdims=True)  # [..., g, 1]
        return shift, self.inner.prepare(q)

    def logits(self, prepared: Prepared, code: Code) -> Array:
        shift, inner = prepared
        return self.inner.logits(inner, code) + shift

    def accumulate(self, p: Array, code: Code) -> Acc:
        return p.sum(-1, keepdims=True), self.inner.accumulate(p, code)

    def restore(self, acc: Acc) -> Array:
        mass, inner = acc
        return self.inner.restore(inner) + mass * self.mean
