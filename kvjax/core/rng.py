"""Random keys, folded by name: what a key is for decides it, never the order of the calls."""

from __future__ import annotations

import zlib

import jax


def fold(rng: jax.Array, *names: str | int | jax.Array) -> jax.Array:
    """The key for `names` under `rng`.

    Example:
      >>> import jax
      >>> a = fold(jax.random.key(0), "rotation", "key")
      >>> bool((a == fold(jax.random.key(0), "rotation", "value")).all())
      False
    """
    for name in names:
        number = zlib.crc32(name.encode()) if isinstance(name, str) else name
        rng = jax.random.fold_in(rng, number)
    return rng
