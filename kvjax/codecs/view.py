"""Values that are a part of their keys: the latent of multi-head latent attention, kept once."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.codecs.dense import Dense
from kvjax.codecs.split import Split
from kvjax.core.codec import Acc, Array, Code, Codec, Prepared
from kvjax.core.errors import InputError
from kvjax.core.pytree import pytree, same, static


@pytree
class View(Codec):
    """`v = key` in its first `width` channels, and zeros in the others.

    A cache whose values have this codec keeps nothing of them, no page and no window: it sums the
    codes that the keys already have. So the key codec is a `Split` whose first part has exactly
    these channels, in order, coded as here; `latent` makes the two together, and `check_key` tells
    what else. A rotation belongs inside that part: one over the whole key would mix the rotary
    channels into the values. `restore` undoes it, so outputs are in the basis of the latent.

    On its own, as in measurements of one codec, it encodes those channels itself, and both laws
    hold.

    Args:
      inner: codec of the first `width` channels; in a cache the key's own is used.
      width: channels that are values: the rank of the latent.
      size: channels of a key.

    Source: DeepSeek-V2's attention (arXiv 2405.04434): one latent is key and value of all heads.

    Example:
      >>> import jax.numpy as jnp
      >>> codec = View(Dense("float32"), width=2, size=3)
      >>> codec.decode(codec.encode(jnp.array([[1.0, 2.0, 3.0]]))).tolist()
      [[1.0, 2.0, 0.0]]
    """

    inner: Codec
    width: int = static()
    size: int = static()

    def check(self, head_dim: int, page: int) -> None:
        if self.size != head_dim or not 0 < self.width < head_dim:
            raise InputError(
                "view",
                got=f"{self.width} of {self.size} channels, for keys of {head_dim}",
                expected="the size of a key, and fewer channels that are values",
                fix="build the method for this latent",
            )
        self.inner.check(self.width, page)

    def check_key(self, key: Codec) -> None:
        """Raises `InputError` unless codes of `key` hold these values, apart and coded alike."""
        if not isinstance(key, Split) or not self._has_channels(key):
            raise InputError(
                "key codec",
                got=type(key).__name__ + (f" at {key.count}" if isinstance(key, Split) else ""),
                expected=f"a Split with channels 0 to {self.width - 1}, the values, as first part",
                fix="make both codecs with kvjax.codecs.latent",
            )
        leaves = jax.tree.leaves((key.first, self.inner))
        traced = any(isinstance(a, jax.core.Tracer) for a in leaves)
        kinds: list[Any] = [jax.tree.structure(codec) for codec in (key.first, self.inner)]
        if kinds[0] != kinds[1] or not (traced or same(key.first, self.inner)):
            raise InputError(
                "value codec",
                got="a view by another codec than the key's own",
                expected="the codec of the key's first part",
                fix="make both codecs with kvjax.codecs.latent",
            )

    def _has_channels(self, key: Split) -> bool:
        if key.count != self.width or isinstance(key.order, jax.core.Tracer):
            return key.count == self.width
        return bool((np.asarray(key.order)[: self.width] == np.arange(self.width)).all())

    def through(self, key: Codec) -> View:
        """This view with the codec that the keys are in fact coded by."""
        assert isinstance(key, Split)
        return dataclasses.replace(self, inner=key.first)

    def of_code(self, key_code: tuple[Code, Code]) -> Code:
        """The values' part of a key's code."""
        return key_code[0]

    def of_key(self, key: Array) -> Array:
        """The values `[..., d]` of keys `[..., d]`: zeros where they are not theirs."""
        return jnp.where(jnp.arange(key.shape[-1]) < self.width, key, 0)

    def encode(self, x: Array, positions: Array | None = None) -> Code:
        return self.inner.encode(x[..., : self.width], positions)

    def decode(self, code: Code) -> Array:
        return self._pad(self.inner.decode(code))

    def prepare(self, q: Array) -> Prepared:
        return self.inner.prepare(q[..., : self.width])

    def logits(self, prepared: Prepared, code: Code) -> Array:
        return self.inner.logits(prepared, code)

    def accumulate(self, p: Array, code: Code) -> Acc:
        return self.inner.accumulate(p, code)

    def restore(self, acc: Acc) -> Array:
        return self._pad(self.inner.restore(acc))

    def transpose_planes(self) -> View:
        """As it is: the words are the key's."""
        return self

    def _pad(self, x: Array) -> Array:
        return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, self.size - self.width)])


def latent(
    codec: Codec, rank: int, head_dim: int, rotary: Codec | None = None
) -> tuple[Split, View]:
    """The codecs of keys and values for a latent cache: key `[latent (rank) | rotary part]`.

    Args:
      codec: for the latent, vectors of `rank`; any rotation in it is undone on the outputs.
      head_dim: channels of a key, the rotary part included.
      rotary: for the others; None keeps them in bf16.

    Example:
      >>> import kvjax
      >>> inner = kvjax.methods.get("turboquant-4", head_dim=512).key
      >>> method = kvjax.Method(*latent(inner, 512, 576))  # DeepSeek-V2: 512 + 64 per token
      >>> cache = kvjax.init(method, capacity=1024, kv_heads=1, head_dim=576)
      >>> cache.window_value.shape[-1], cache.value_pages
      (0, ())
    """
    if not 0 < rank < head_dim:
        raise InputError(
            "latent",
            got=f"rank {rank} of {head_dim} channels",
            expected=f"1 to {head_dim - 1}: some channels are rotary",
            fix="give the rank of the latent, and the size of latent and rotary part together",
        )
    key = Split(jnp.arange(head_dim, dtype=jnp.int32), codec, rotary or Dense(), rank)
    return key, View(codec, rank, head_dim)
