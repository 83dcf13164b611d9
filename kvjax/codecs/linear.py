"""Codes in another basis: rotations and general invertible transforms before an inner codec."""

from __future__ import annotations

from typing import Literal

from kvjax.codecs.transforms import Hadamard, Orthogonal, Transform
from kvjax.core.codec import Acc, Array, Code, Codec, Prepared
from kvjax.core.errors import InputError
from kvjax.core.pytree import pytree

Rotation = Literal["haar", "hadamard"]


@pytree
class Linear(Codec):
    """`inner` on `y = A x`; queries get the inverse transpose, so nothing is undone per token.

        <q, A^-1 y> = <A^-T q, y>      sum_t p_t A^-1 y_t = A^-1 sum_t p_t y_t

    The query is transformed once per step and the output once per step, whatever the context.

    Example:
      >>> import jax
      >>> from kvjax.codecs import Hadamard, Uniform
      >>> codec = Linear(Hadamard.random(64, rng=jax.random.key(0)), Uniform(4))
      >>> x = jax.random.normal(jax.random.key(1), (16, 64))
      >>> float(abs(codec.decode(codec.encode(x)) - x).max()) < 0.4
      True
    """

    transform: Transform
    inner: Codec

    def check(self, head_dim: int, page: int) -> None:
        self.transform.check(head_dim)
        self.inner.check(head_dim, page)

    def encode(self, x: Array, positions: Array | None = None) -> Code:
        return self.inner.encode(self.transform.forward(x), positions)

    def decode(self, code: Code) -> Array:
        return self.transform.inverse(self.inner.decode(code))

    def prepare(self, q: Array) -> Prepared:
        return self.inner.prepare(self.transform.dual(q))

    def logits(self, prepared: Prepared, code: Code) -> Array:
        return self.inner.logits(prepared, code)

    def accumulate(self, p: Array, code: Code) -> Acc:
        return self.inner.accumulate(p, code)

    def restore(self, acc: Acc) -> Array:
        return self.transform.inverse(self.inner.restore(acc))


def rotated(kind: Rotation, d: int, inner: Codec, *, rng: Array) -> Linear:
    """`inner` after a random rotation of dimension `d`: dense, or randomized Hadamard."""
    makers = {"haar": Orthogonal.random, "hadamard": Hadamard.random}
    if kind not in makers:
        raise InputError(
            "rotation", got=repr(kind), expected="'haar' or 'hadamard'", fix="name one of them"
        )
    return Linear(makers[kind](d, rng=rng), inner)
