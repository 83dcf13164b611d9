"""QuaRot's cache: a Hadamard rotation per head, then clipped integers per token."""

from __future__ import annotations

import jax

from kvjax.codecs import Uniform, rotated
from kvjax.core.method import Method
from kvjax.core.rng import fold

GROUP = 128  # channels that share a scale


def quarot(bits: int, head_dim: int, *, rng: jax.Array, clip: float = 0.95) -> Method:
    """Randomized Hadamard rotation, then asymmetric integers per token in groups of 128 channels.

    Heads that no multiple of 128 fills are one group. It is `hadamard_int` with the group and the
    clip of the paper: of each range the share `clip` is kept.

    Args:
      bits: 1 to 8; 4 in the paper.
      clip: see `Uniform`.

    Source: QuaRot, arXiv 2404.00456: its cache only, not its weights and activations.
    Differs from the paper: random signs before the transform (the released code: none on heads, and
    one scale per head for keys, whatever its size); values are rotated back once per step, not in
    the weights (`calibrate.fold` does that); the clip shrinks a range about its middle, where the
    released one scales both of its ends and has zero in every range; zero points are 16-bit
    numbers, not whole codes.

    Example:
      >>> import jax
      >>> method = quarot(4, 64, rng=jax.random.key(0))
      >>> method.name, method.key.inner.clip, method.key.inner.group
      ('quarot-4', 0.95, None)
    """
    group = GROUP if head_dim % GROUP == 0 else None
    make = lambda side: rotated(
        "hadamard",
        head_dim,
        Uniform(bits, group=group, clip=clip),
        rng=fold(rng, "rotation", side),
    )
    return Method(make("key"), make("value"), name=f"quarot-{bits}")
