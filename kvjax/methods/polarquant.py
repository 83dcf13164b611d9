"""PolarQuant, twice: two papers of one name. Neither is what vLLM calls so (`vllm_turboquant`)."""

from __future__ import annotations

from typing import Literal

import jax

from kvjax.codecs import Dense, rotated
from kvjax.codecs.polar import Polar
from kvjax.codecs.polar_pairs import PolarPairs
from kvjax.core.method import Method
from kvjax.core.rng import fold


def polarquant(
    head_dim: int,
    *,
    rng: jax.Array,
    bits: tuple[int, ...] = (4, 2, 2, 2),
    rotation: Literal["haar", "hadamard"] = "haar",
) -> Method:
    """Random rotation, then the recursive polar transform in blocks of `2**len(bits)` channels.

    With 4 levels of 4, 2, 2 and 2 bits and a float16 radius per 16 channels: 3.875 true bits per
    value and an error of .0321 on unit vectors of 128, which TurboQuant reaches with 3.125 bits.
    Seven levels (4, 2, 2, 2, 2, 2, 2), one radius per token, have .0352 at 3.11 bits.

    Args:
      head_dim: a multiple of the block.
      bits: of the angles of each level.
      rotation: "haar" (dense, as in the paper) or "hadamard"; keys and values share it.

    Source: PolarQuant, arXiv 2502.02617.
    Differs from the paper: see `Polar`; and tokens made while generating are quantized too, where
    the paper keeps them exact.

    Example:
      >>> import jax
      >>> polarquant(64, rng=jax.random.key(0)).name
      'polarquant'
    """
    codec = rotated(rotation, head_dim, Polar.lloyd_max(bits), rng=fold(rng, "rotation"))
    return Method(codec, codec, name="polarquant")


def polarquant_pairs(
    radius_bits: int = 4,
    angle_bits: int = 4,
    *,
    pairing: Literal["halves", "adjacent"] = "halves",
) -> Method:
    """Keys as radius and angle of the pairs that RoPE turns together; values in bf16.

    `(radius_bits + angle_bits) / 2` bits per key channel, and a scale and minimum per pair and
    page: 4.25 at 4 and 4 bits with pages of 64.

    Args:
      pairing: which channels RoPE pairs; "halves" in all models here.

    Source: PolarQuant, arXiv 2502.00527; its code calls this setting "polar44".
    Differs from the paper: see `PolarPairs`.

    Example:
      >>> polarquant_pairs().name
      'polarquant-pairs-4-4'
    """
    key = PolarPairs(radius_bits, angle_bits, pairing)
    return Method(key, Dense(), name=f"polarquant-pairs-{radius_bits}-{angle_bits}")
