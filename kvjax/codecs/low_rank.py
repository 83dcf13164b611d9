"""A page as a product of two thin factors; attention goes through them and never multiplies out."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from kvjax.codecs.dense import Dense
from kvjax.core.codec import Acc, Array, Code, Codec, matmul, matmul_t
from kvjax.core.errors import InputError
from kvjax.core.pytree import pytree, static
from kvjax.core.storage import narrow, widen

_TINY = 1e-30


@pytree
class LowRankCode:
    """x_hat = left.decode(tokens) @ channels.T; channels `[..., d, r]` in bf16."""

    tokens: Code
    channels: Array


@pytree
class LowRank(Codec):
    """The page's best approximation of rank r, `X ~ A B^T` with `A: [t, r]` and `B: [d, r]`.

    B comes from power iteration (`A <- orth(X B)`, `B <- orth(X^T A)`), and `A = X B`. Both factors
    are multiplied with the query or the weights as they are:

        logits = (q B) A^T        accumulate = (p A) B^T

    r (t + d) numbers a page: with bf16 factors `16 r (1 / d + 1 / t)` bits per value.

    Args:
      start: `[d, r]`, where the iteration begins; from `LowRank.random`.
      left: codec of A, as vectors of r channels.
      iterations: rounds of power iteration.

    Source: GEAR, arXiv 2403.05527, which has it on the residual of a quantizer:
      `Residual(quantizer, LowRank.random(...))`.
    Differs from the paper: one start for all pages, drawn once, and each page has factors of its
      own, where GEAR factors all of a prompt at once.

    Example:
      >>> import jax
      >>> thin, wide = jax.random.normal(jax.random.key(0), (2, 16, 2))
      >>> codec = LowRank.random(16, 2, rng=jax.random.key(1))
      >>> x = thin @ wide.T
      >>> float(abs(codec.decode(codec.encode(x)) - x).max()) < 0.05  # bf16 factors
      True
    """

    start: Array
    left: Codec = dataclasses.field(default_factory=Dense)
    iterations: int = static(default=3)

    @staticmethod
    def random(
        d: int, rank: int, *, rng: Array, left: Codec | None = None, iterations: int = 3
    ) -> LowRank:
        """Normal `start` for vectors of d channels.

        Raises:
          InputError: a rank under 1 or not under d, no iterations.
        """
        if not 0 < rank < d or iterations < 1:
            raise InputError(
                "low rank",
                got=f"rank {rank} for vectors of {d}, {iterations} iterations",
                expected=f"a rank of 1 to {d - 1}, 1 iteration or more",
                fix="choose a smaller rank",
            )
        start = jax.random.normal(rng, (d, rank), jnp.float32)
        return LowRank(start, Dense() if left is None else left, iterations)

    def check(self, head_dim: int, page: int) -> None:
        d, rank = self.start.shape[-2:]
        if d != head_dim or rank >= page:
            raise InputError(
                "low rank",
                got=f"rank {rank} for pages of {page} tokens, vectors of {head_dim}",
                expected=f"a rank under the page, vectors of {d}",
                fix="build the method for this head_dim, with a smaller rank or larger pages",
            )
        self.left.check(rank, page)

    def encode(self, x: Array, positions: Array | None = None) -> LowRankCode:
        x = x.astype(jnp.float32)
        b = jnp.broadcast_to(self.start, (*x.shape[:-2], *self.start.shape[-2:]))
        for _ in range(self.iterations):
            a = orthonormal(matmul(x, b))
            b = orthonormal(matmul(jnp.swapaxes(x, -1, -2), a))
        channels = narrow(b, jnp.bfloat16)
        tokens = matmul(x, widen(channels))
        return LowRankCode(self.left.encode(tokens, positions), channels)

    def decode(self, code: LowRankCode) -> Array:
        return matmul_t(self.left.decode(code.tokens), widen(code.channels))

    def logits(self, prepared: Array, code: LowRankCode) -> Array:
        q = matmul(prepared, widen(code.channels))  # [..., g, r]
        return self.left.logits(self.left.prepare(q), code.tokens)

    def accumulate(self, p: Array, code: LowRankCode) -> Acc:
        part = self.left.restore(self.left.accumulate(p, code.tokens))  # [..., g, r]
        return matmul_t(part, widen(code.channels))


def orthonormal(x: Array) -> Array:
    """Columns of `x: [..., n, r]` made orthonormal in turn; one that adds nothing becomes zero.

    Twice Gram-Schmidt, unrolled over the few columns: no LAPACK call, so it runs anywhere, and
    alike for one page and for many.
    """
    columns: list[Array] = []
    for i in range(x.shape[-1]):
        column = x[..., i]
        size = jnp.linalg.norm(column, axis=-1, keepdims=True)
        for _ in range(2):
            for other in columns:
                column = column - other * (other * column).sum(-1, keepdims=True)
        left = jnp.linalg.norm(column, axis=-1, keepdims=True)
        real = left > jnp.maximum(1e-5 * size, _TINY)
        columns.append(jnp.where(real, column / jnp.where(real, left, 1.0), 0.0))
    return jnp.stack(columns, -1)
