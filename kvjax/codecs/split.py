"""Channels in two sets, each with its own codec: outliers apart, fractional bits, tiers."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kvjax.core.codec import Acc, Array, Code, Codec, Prepared
from kvjax.core.errors import InputError
from kvjax.core.pytree import pytree, static


@pytree
class Split(Codec):
    """`first` on the channels `order[:count]`, `second` on the others; the choice is fixed.

    Args:
      order: `[d]` int32, a permutation of the channels.
      count: how many go to `first`.
    """

    order: Array
    first: Codec
    second: Codec
    count: int = static()

    def check(self, head_dim: int, page: int) -> None:
        if self.order.shape[-1] != head_dim or not 0 < self.count < head_dim:
            raise InputError(
                "split",
                got=f"{self.count} of {self.order.shape[-1]} channels, for vectors of {head_dim}",
                expected="an order of all channels and a count inside it",
                fix="build the method for this head_dim",
            )
        self.first.check(self.count, page)
        self.second.check(head_dim - self.count, page)

    def encode(self, x: Array, positions: Array | None = None) -> tuple[Code, Code]:
        a, b = self.parts(x)
        return self.first.encode(a, positions), self.second.encode(b, positions)

    def decode(self, code: tuple[Code, Code]) -> Array:
        return self.join(self.first.decode(code[0]), self.second.decode(code[1]))

    def prepare(self, q: Array) -> tuple[Prepared, Prepared]:
        a, b = self.parts(q)
        return self.first.prepare(a), self.second.prepare(b)

    def logits(self, prepared: tuple[Prepared, Prepared], code: tuple[Code, Code]) -> Array:
        first = self.first.logits(prepared[0], code[0])
        return first + self.second.logits(prepared[1], code[1])

    def accumulate(self, p: Array, code: tuple[Code, Code]) -> tuple[Acc, Acc]:
        return self.first.accumulate(p, code[0]), self.second.accumulate(p, code[1])

    def restore(self, acc: tuple[Acc, Acc]) -> Array:
        return self.join(self.first.restore(acc[0]), self.second.restore(acc[1]))

    def parts(self, x: Array) -> tuple[Array, Array]:
        """The channels of `x: [..., d]`, those of `first` and the others."""
        return x[..., self.order[: self.count]], x[..., self.order[self.count :]]

    def join(self, a: Array, b: Array) -> Array:
        """The inverse of `parts`."""
        return jnp.concatenate([a, b], -1)[..., jnp.argsort(self.order)]


@pytree
class OutliersCode:
    """Channels `index` of the page in `first`, the others, in order, in `second`."""

    index: Array
    first: Code
    second: Code


@pytree
class Outliers(Codec):
    """Like `Split`, with the `count` channels of most energy chosen anew for each page.

    Costs an index per outlier and page, and a rotation of the query per page where the inner
    codecs rotate: g rows, not t.

    Source: per group of tokens, as QJL does (arXiv 2406.03482, section 4).
    """

    first: Codec
    second: Codec
    count: int = static()

    def check(self, head_dim: int, page: int) -> None:
        if not 0 < self.count < head_dim:
            raise InputError(
                "outliers",
                got=f"{self.count} of {head_dim} channels",
                expected=f"1 to {head_dim - 1}",
                fix="choose another count",
            )
        self.first.check(self.count, page)
        self.second.check(head_dim - self.count, page)

    def encode(self, x: Array, positions: Array | None = None) -> OutliersCode:
        d = x.shape[-1]
        energy = (x.astype(jnp.float32) ** 2).sum(-2)  # [..., d]
        index = jnp.sort(jax.lax.top_k(energy, self.count)[1], axis=-1)  # [..., count]
        index = index.astype(jnp.uint8 if d <= 256 else jnp.uint16)
        order = _order(index, d)
        x = jnp.take_along_axis(x, order[..., None, :], -1)
        first = self.first.encode(x[..., : self.count], positions)
        return OutliersCode(index, first, self.second.encode(x[..., self.count :], positions))

    def decode(self, code: OutliersCode) -> Array:
        return self._join(code, self.first.decode(code.first), self.second.decode(code.second))

    def logits(self, prepared: Array, code: OutliersCode) -> Array:
        order = _order(code.index, prepared.shape[-1])[..., None, :]  # [..., 1, d]
        shape = jnp.broadcast_shapes(prepared.shape[:-2], order.shape[:-2])
        q = jnp.broadcast_to(prepared, (*shape, *prepared.shape[-2:]))
        q = jnp.take_along_axis(q, order, -1)
        a = self.first.logits(self.first.prepare(q[..., : self.count]), code.first)
        return a + self.second.logits(self.second.prepare(q[..., self.count :]), code.second)

    def accumulate(self, p: Array, code: OutliersCode) -> Acc:
        first = self.first.restore(self.first.accumulate(p, code.first))
        return self._join(code, first, self.second.restore(self.second.accumulate(p, code.second)))

    def _join(self, code: OutliersCode, a: Array, b: Array) -> Array:
        rank = _rank(code.index, a.shape[-1] + b.shape[-1])[..., None, :]  # [..., 1, d]
        # Clipped: an empty slot names one channel many times, and what is not there would be NaN.
        return jnp.take_along_axis(jnp.concatenate([a, b], -1), rank, -1, mode="clip")


def _rank(index: Array, d: int) -> Array:
    """Where each channel stands when the channels `index` come first: `[..., d]`."""
    chosen = (index[..., None, :] == jnp.arange(d, dtype=index.dtype)[:, None]).any(-1)
    count = index.shape[-1]
    return jnp.where(chosen, chosen.cumsum(-1) - 1, count + (~chosen).cumsum(-1) - 1)


def _order(index: Array, d: int) -> Array:
    """The channels in that order, the inverse permutation of `_rank`: `[..., d]`."""
    return jnp.argsort(_rank(index, d), axis=-1)
