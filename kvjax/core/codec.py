"""The contract of every compression method: a page of vectors to a code and back, and attention
that never has to go back."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from kvjax.core.pytree import pytree

Array = jax.Array
Code = Any  # pytree of arrays; every leaf leads with the axes that x had before [t, d]
Prepared = Any  # pytree of arrays made from the query once per step
Acc = Any  # pytree of arrays; every leaf leads with [..., g]


@pytree
class Codec:
    """Maps pages of vectors `x: [..., t, d]` to codes, and attends to the codes.

    A codec is a value: a frozen pytree whose arrays (rotations, codebooks, sketches) are traced
    leaves, so that jit caches on structure alone and layers can be stacked. Two laws hold for
    every codec, and `tests/codecs/test_laws.py` checks them for all:

        law 1:  logits(prepare(q), code)                 ==  q @ decode(code).T
        law 2:  restore(sum over pages accumulate(p, code))  ==  sum over pages p @ decode(code)

    A new method needs `encode` and `decode`; the rest has defaults that go through `decode` and
    is overridden for speed, never for meaning.

    The leading axes are `[batch, kv_head, page]` wherever the cache calls a codec (the query has
    one page), so an array that differs by KV head has the shape `[h, 1, ...]`.
    """

    def encode(self, x: Array, positions: Array | None = None) -> Code:
        """Codes of `x: [..., t, d]`, at the logical `positions: [..., t]` where they matter."""
        raise NotImplementedError

    def decode(self, code: Code) -> Array:
        """The reconstruction, `[..., t, d]` float32."""
        raise NotImplementedError

    def prepare(self, q: Array) -> Prepared:
        """What `logits` needs of the query `[..., g, d]`; runs once per step."""
        return q

    def logits(self, prepared: Prepared, code: Code) -> Array:
        """Inner products of the queries with the decoded page, `[..., g, t]` float32."""
        return matmul_t(prepared, self.decode(code))

    def accumulate(self, p: Array, code: Code) -> Acc:
        """The page's part of the output for weights `p: [..., g, t]`; linear in p, any basis."""
        return matmul(p, self.decode(code))

    def restore(self, acc: Acc) -> Array:
        """The output `[..., g, d]` of accumulators summed over pages; runs once per step."""
        return acc

    def check(self, head_dim: int, page: int) -> None:
        """Raises `InputError` when vectors of `head_dim` or pages of `page` tokens do not fit."""
        for _, child in self.children():
            child.check(head_dim, page)

    def children(self) -> list[tuple[str, Codec]]:
        """The codecs held by this one, by field name."""
        fields = ((f.name, getattr(self, f.name)) for f in dataclasses.fields(self))
        return [(name, value) for name, value in fields if isinstance(value, Codec)]

    def transpose_planes(self) -> Codec:
        """The same codec with words kept transposed, `[d, R]`, as GPU kernels want of values."""
        children = {name: child.transpose_planes() for name, child in self.children()}
        return dataclasses.replace(self, **children)


def matmul(a: Array, b: Array) -> Array:
    """`a @ b` with float32 accumulation, whatever the operands' dtypes."""
    return jnp.matmul(a, b, preferred_element_type=jnp.float32)


def matmul_t(a: Array, b: Array) -> Array:
    """`a @ b.T` over the last two axes, `[..., g, d], [..., t, d] -> [..., g, t]`, in float32."""
    return jnp.einsum("...gd,...td->...gt", a, b, preferred_element_type=jnp.float32)
