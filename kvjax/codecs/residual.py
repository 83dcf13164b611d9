"""Two codecs in a row: the second codes what the first left over."""

from __future__ import annotations

import jax.numpy as jnp

from kvjax.core.codec import Acc, Array, Code, Codec, Prepared
from kvjax.core.pytree import pytree


@pytree
class Residual(Codec):
    """`x_hat = first(x) + second(x - first(x))`; logits and outputs add.

    Example:
      >>> import jax
      >>> from kvjax.codecs import Uniform
      >>> x = jax.random.normal(jax.random.key(0), (16, 64))
      >>> codec = Residual(Uniform(2), Uniform(2))
      >>> float(abs(codec.decode(codec.encode(x)) - x).mean()) < 0.2
      True
    """

    first: Codec
    second: Codec

    def encode(self, x: Array, positions: Array | None = None) -> tuple[Code, Code]:
        first = self.first.encode(x, positions)
        rest = x.astype(jnp.float32) - self.first.decode(first)
        return first, self.second.encode(rest, positions)

    def decode(self, code: tuple[Code, Code]) -> Array:
        return self.first.decode(code[0]) + self.second.decode(code[1])

    def prepare(self, q: Array) -> tuple[Prepared, Prepared]:
        return self.first.prepare(q), self.second.prepare(q)

    def logits(self, prepared: tuple[Prepared, Prepared], code: tuple[Code, Code]) -> Array:
        first = self.first.logits(prepared[0], code[0])
        return first + self.second.logits(prepared[1], code[1])

    def accumulate(self, p: Array, code: tuple[Code, Code]) -> tuple[Acc, Acc]:
        return self.first.accumulate(p, code[0]), self.second.accumulate(p, code[1])

    def restore(self, acc: tuple[Acc, Acc]) -> Array:
        return self.first.restore(acc[0]) + self.second.restore(acc[1])
