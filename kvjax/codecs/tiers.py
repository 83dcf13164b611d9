"""Channels in blocks, each with a codec of its own: many bits where they count, none where not."""

from __future__ import annotations

import jax.numpy as jnp

from kvjax.core.codec import Acc, Array, Code, Codec, Prepared
from kvjax.core.errors import InputError
from kvjax.core.pytree import pytree, static


@pytree
class Dropped(Codec):
    """Nothing is kept: every vector comes back as zeros. Takes no bits.

    The code remembers only how many channels there were, in the shape of an empty array.
    """

    def encode(self, x: Array, positions: Array | None = None) -> Array:
        return jnp.zeros((*x.shape, 0), jnp.uint8)

    def decode(self, code: Array) -> Array:
        return jnp.zeros(code.shape[:-1], jnp.float32)

    def logits(self, prepared: Prepared, code: Array) -> Array:
        shape = jnp.broadcast_shapes(prepared.shape[:-2], code.shape[:-3])
        return jnp.zeros((*shape, prepared.shape[-2], code.shape[-3]), jnp.float32)

    def accumulate(self, p: Array, code: Array) -> Acc:
        shape = jnp.broadcast_shapes(p.shape[:-2], code.shape[:-3])
        return jnp.zeros((*shape, p.shape[-2], code.shape[-2]), jnp.float32)


@pytree
class Tiers(Codec):
    """The first `sizes[0]` channels go to `codecs[0]`, the next `sizes[1]` to `codecs[1]`, ...

    After a transform that sorts its coordinates by importance this is bit allocation with static
    shapes. Logits of the blocks add; nothing is gathered.

    Args:
      codecs: one per block. sizes: channels of each; their sum is the dimension.

    Example:
      >>> import jax
      >>> from kvjax.codecs import Codebook
      >>> book = lambda bits: Codebook.lloyd_max(None, bits)
      >>> codec = Tiers((book(4), book(2), Dropped()), (16, 32, 16))
      >>> x = jax.random.normal(jax.random.key(0), (16, 64))
      >>> codec.decode(codec.encode(x)).shape
      (16, 64)
    """

    codecs: tuple[Codec, ...]
    sizes: tuple[int, ...] = static()

    def __post_init__(self):
        object.__setattr__(self, "sizes", tuple(self.sizes))
        if not self.sizes or len(self.codecs) != len(self.sizes) or min(self.sizes) < 1:
            raise InputError(
                "tiers",
                got=f"{len(self.codecs)} codecs for blocks of {self.sizes}",
                expected="one codec per block, blocks of 1 channel or more",
                fix="leave empty blocks out",
            )

    def check(self, head_dim: int, page: int) -> None:
        if sum(self.sizes) != head_dim:
            raise InputError(
                "tiers",
                got=f"vectors of {head_dim}",
                expected=f"{sum(self.sizes)} channels, the sum of {self.sizes}",
                fix="build the method for this head_dim",
            )
        for codec, size in zip(self.codecs, self.sizes, strict=True):
            codec.check(size, page)

    def children(self) -> list[tuple[str, Codec]]:
        return [(f"codecs[{i}]", codec) for i, codec in enumerate(self.codecs)]

    def transpose_planes(self) -> Tiers:
        return Tiers(tuple(c.transpose_planes() for c in self.codecs), self.sizes)

    def encode(self, x: Array, positions: Array | None = None) -> tuple[Code, ...]:
        parts = zip(self.codecs, self.parts(x), strict=True)
        return tuple(codec.encode(part, positions) for codec, part in parts)

    def decode(self, code: tuple[Code, ...]) -> Array:
        parts = zip(self.codecs, code, strict=True)
        return jnp.concatenate([codec.decode(part) for codec, part in parts], -1)

    def prepare(self, q: Array) -> tuple[Prepared, ...]:
        parts = zip(self.codecs, self.parts(q), strict=True)
        return tuple(codec.prepare(part) for codec, part in parts)

    def logits(self, prepared: tuple[Prepared, ...], code: tuple[Code, ...]) -> Array:
        parts = zip(self.codecs, prepared, code, strict=True)
        return sum(codec.logits(q, part) for codec, q, part in parts)  # type: ignore[return-value]

    def accumulate(self, p: Array, code: tuple[Code, ...]) -> tuple[Acc, ...]:
        return tuple(codec.accumulate(p, c) for codec, c in zip(self.codecs, code, strict=True))

    def restore(self, acc: tuple[Acc, ...]) -> Array:
        parts = zip(self.codecs, acc, strict=True)
        return jnp.concatenate([codec.restore(part) for codec, part in parts], -1)

    def parts(self, x: Array) -> list[Array]:
        """The channels of `x: [..., d]`, block by block."""
        stops = [sum(self.sizes[: i + 1]) for i in range(len(self.sizes) - 1)]
        return jnp.split(x, stops, axis=-1)
