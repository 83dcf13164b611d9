"""The largest and smallest numbers of every vector kept beside a codec of all the others."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from kvjax.core.codec import Acc, Array, Code, Codec, Prepared
from kvjax.core.errors import InputError
from kvjax.core.pytree import pytree, static
from kvjax.core.storage import narrow, widen


@pytree
class SparseCode:
    """x_hat = inner.decode(code) + delta at index; index and delta are `[..., rows, count]`."""

    code: Code
    index: Array
    delta: Array


@pytree
class Sparse(Codec):
    """`inner` on a page without its outliers, which are kept at 16 bits and an index each.

    Of every row, a token's channels or a channel's tokens, the `count / 2` largest and `count / 2`
    smallest numbers are replaced by the mean of the others before `inner` sees them, and what
    `inner` makes of them is corrected by `delta` (bf16). So the grid of a quantizer spans what is
    left, and an outlier is off by 2^-9 of its correction.

    Args:
      inner: the codec of the rest.
      count: outliers of a row, even.
      axis: "channels": rows are tokens, as suits grids along channels. "tokens": rows are channels.

    Source: the sparse part of GEAR, arXiv 2403.05527.
    Differs from the paper: corrections to what `inner` decodes are stored, not the numbers; in its
      place stands the mean of the others, not of the whole row.

    Example:
      >>> import jax
      >>> from kvjax.codecs import Uniform
      >>> x = jax.random.normal(jax.random.key(0), (16, 32)).at[3, 5].set(100.0)
      >>> error = lambda codec: float(abs(codec.decode(codec.encode(x)) - x)[3].max())
      >>> error(Uniform(2)) > 5 * error(Sparse(Uniform(2), 2))
      True
    """

    inner: Codec
    count: int = static()
    axis: Literal["channels", "tokens"] = static(default="channels")

    def __post_init__(self):
        if self.count < 2 or self.count % 2 or self.axis not in ("channels", "tokens"):
            raise InputError(
                "sparse",
                got=f"{self.count} outliers along {self.axis!r}",
                expected="an even number from 2 on, along 'channels' or 'tokens'",
                fix="take as many large as small ones",
            )

    def check(self, head_dim: int, page: int) -> None:
        row = head_dim if self.axis == "channels" else page
        if self.count >= row:
            raise InputError(
                "sparse",
                got=f"{self.count} outliers of {row} {self.axis}",
                expected=f"at most {(row - 1) // 2 * 2}",
                fix="take fewer",
            )
        self.inner.check(head_dim, page)

    def encode(self, x: Array, positions: Array | None = None) -> SparseCode:
        rows = self._rows(x.astype(jnp.float32))  # [..., m, n]
        n, half = rows.shape[-1], self.count // 2
        most = jax.lax.top_k(rows, half)[1]
        taken = _hit(most, n)
        least = jax.lax.top_k(jnp.where(taken, -jnp.inf, -rows), half)[1]
        index = jnp.concatenate([most, least], -1)
        taken |= _hit(least, n)
        others = jnp.where(taken, 0.0, rows).sum(-1, keepdims=True) / (n - self.count)
        code = self.inner.encode(self._rows(jnp.where(taken, others, rows)), positions)
        rest = rows - self._rows(self.inner.decode(code))
        delta = narrow(jnp.take_along_axis(rest, index, -1), jnp.bfloat16)
        return SparseCode(code, index.astype(jnp.uint8 if n <= 256 else jnp.uint16), delta)

    def decode(self, code: SparseCode) -> Array:
        rest = self._rows(self.inner.decode(code.code))
        put = lambda row, index, delta: row.at[index].add(delta)
        added = jnp.vectorize(put, signature="(n),(k),(k)->(n)")
        return self._rows(added(rest, code.index, widen(code.delta)))

    def prepare(self, q: Array) -> tuple[Array, Prepared]:
        return q, self.inner.prepare(q)

    def logits(self, prepared: tuple[Array, Prepared], code: SparseCode) -> Array:
        q, inner = prepared
        logits = self.inner.logits(inner, code.code)
        if self.axis == "channels":
            return logits + _gather(q, code)
        return logits + _scatter(q, code, logits.shape[-1])

    def accumulate(self, p: Array, code: SparseCode) -> tuple[Acc, Acc]:
        if self.axis == "tokens":
            own = _gather(p, code)
        else:  # the inner codec knows the number of channels
            d = jax.eval_shape(self.inner.decode, code.code).shape[-1]
            own = _scatter(p, code, d)
        return own, self.inner.accumulate(p, code.code)

    def restore(self, acc: tuple[Acc, Acc]) -> Array:
        return acc[0] + self.inner.restore(acc[1])

    def _rows(self, x: Array) -> Array:
        return x if self.axis == "channels" else jnp.swapaxes(x, -1, -2)


def _hit(index: Array, n: int) -> Array:
    """Which of n places are in `index: [..., k]`, bool `[..., n]`."""
    return (index[..., None] == jnp.arange(n)).any(-2)


def _gather(x: Array, code: SparseCode) -> Array:
    """`sum_k x[g, index[m, k]] delta[m, k]` of `x: [..., g, n]`: `[..., g, m]`."""
    *_, m, k = code.index.shape
    flat = code.index.reshape(*code.index.shape[:-2], 1, m * k).astype(jnp.int32)
    shape = jnp.broadcast_shapes(x.shape[:-2], flat.shape[:-2])
    picked = jnp.take_along_axis(jnp.broadcast_to(x, (*shape, *x.shape[-2:])), flat, -1)
    picked = picked.reshape(*picked.shape[:-1], m, k)
    return (picked * widen(code.delta)[..., None, :, :]).sum(-1)


def _scatter(x: Array, code: SparseCode, n: int) -> Array:
    """`x[g, m] delta[m, k]` summed at `index[m, k]` of n places, for `x: [..., g, m]`."""
    parts = x[..., None] * widen(code.delta)[..., None, :, :]  # [..., g, m, k]

    def one(parts, index):
        empty = jnp.zeros((parts.shape[0], n), jnp.float32)
        return empty.at[:, index.reshape(-1)].add(parts.reshape(parts.shape[0], -1))

    return jnp.vectorize(one, signature="(g,m,k),(m,k)->(g,n)")(parts, code.index)
