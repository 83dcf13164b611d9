"""Rotation and integers: the cheap baseline that everything must beat."""

from __future__ import annotations

import jax

from kvjax.codecs import Uniform, rotated
from kvjax.core.method import Method
from kvjax.core.rng import fold


def hadamard_int(bits: int, head_dim: int, *, rng: jax.Array, group: int | None = None) -> Method:
    """Randomized Hadamard rotation, then min/max integers per token.

    Keys and values get rotations of their own. Random signs cost nothing and guard against
    channels that the plain transform would align.

    Source: the rotation that QuaRot (arXiv 2404.00456) applies online to the cache.

    Example:
      >>> import jax
      >>> hadamard_int(4, 64, rng=jax.random.key(0)).name
      'hadamard-int4'
    """
    make = lambda side: rotated(
        "hadamard", head_dim, Uniform(bits, group=group), rng=fold(rng, "rotation", side)
    )
    return Method(make("key"), make("value"), name=f"hadamard-int{bits}")
