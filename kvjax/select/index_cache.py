"""What indexers keep of the past: one key of a few channels per token and layer, in 8 bits."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from kvjax.core.codec import Array
from kvjax.core.errors import InputError
from kvjax.core.pytree import pytree


@pytree
class IndexCache:
    """Index keys of some layers; slot i is the token at position i.

    Attributes:
      codes: `[l, b, t, d]` int8. scale: `[l, b, t]` float16, one per token: 8 d + 16 bits a token.
    """

    codes: Array
    scale: Array

    @property
    def capacity(self) -> int:
        return self.codes.shape[2]


def init_index(*, layers: int, batch: int, capacity: int, width: int) -> IndexCache:
    """An empty index cache: of the layers that have an indexer alone."""
    return IndexCache(
        jnp.zeros((layers, batch, capacity, width), jnp.int8),
        jnp.zeros((layers, batch, capacity), jnp.float16),
    )


def pack_keys(keys: Array) -> tuple[Array, Array]:
    """Keys `[..., d]` as int8 `[..., d]` with a float16 scale `[...]`: `key ~ code * scale`.

    Example:
      >>> import jax.numpy as jnp
      >>> code, scale = pack_keys(jnp.array([[0.0, 127.0, -63.5]]))
      >>> code.tolist(), scale.tolist()
      ([[0, 127, -64]], [1.0])
    """
    scale = (jnp.abs(keys).max(-1) / 127).astype(jnp.float16)
    scale = jnp.maximum(scale, jnp.finfo(jnp.float16).tiny)  # a key of zeros has codes of zeros
    codes = jnp.round(keys / scale.astype(jnp.float32)[..., None])
    return jnp.clip(codes, -127, 127).astype(jnp.int8), scale


def unpack_keys(codes: Array, scale: Array) -> Array:
    """The inverse of `pack_keys` up to half a step, float32."""
    return codes.astype(jnp.float32) * scale.astype(jnp.float32)[..., None]


def append_index(
    cache: IndexCache, keys: Array, positions: Array, *, layer: Array | int = 0
) -> IndexCache:
    """Adds the index keys of some tokens of each sequence, in place under jit.

    Args:
      keys: `[b, t, d]`. positions: `[b, t]` int32; what does not fit, or is -1, is not kept: where
        the capacity is that of the cache of keys and values, attention then reads as NaN.
    Raises:
      InputError: keys of another shape.
    """
    _, b, capacity, d = cache.codes.shape
    if keys.shape != (*positions.shape, d) or keys.shape[0] != b:
        raise InputError(
            "index keys",
            got=f"shape {keys.shape} at positions {positions.shape}",
            expected=f"batch {b}, tokens, {d} channels",
            fix="reshape them",
        )
    codes, scale = pack_keys(keys)
    rows, at = jnp.arange(b)[:, None], jnp.where(positions < 0, capacity, positions)
    put = lambda a, new: a.at[layer, rows, at].set(new, mode="drop")
    return dataclasses.replace(cache, codes=put(cache.codes, codes), scale=put(cache.scale, scale))


def read_index(cache: IndexCache, *, layer: Array | int = 0) -> Array:
    """The index keys of a layer, `[b, t, d]` float32."""
    return unpack_keys(cache.codes[layer], cache.scale[layer])


def index_bytes(layers: int, width: int, *, scale_bytes: int = 2) -> int:
    """Bytes per token of an index cache with 8-bit keys.

    Example:
      >>> index_bytes(78, 128, scale_bytes=4)  # GLM-5.2 without sharing
      10296
    """
    return layers * (width + scale_bytes)
