"""OSCAR: attention-aware rotations, clipped 2-bit integers, and windows that stay exact."""

from __future__ import annotations

from typing import Literal

import jax.numpy as jnp

from kvjax.codecs import Linear, Transform
from kvjax.codecs.clipped_uniform import ClippedUniform, Rule
from kvjax.core.errors import InputError
from kvjax.core.layout import Layout
from kvjax.core.method import Method

Variant = Literal["int2", "lloyd_max"]

_RULES: dict[str, Rule] = {"int2": "min_max", "lloyd_max": "lloyd_max"}

# Pages of 64: their ring then has 320 slots where OSCAR's, which packs 8 tokens at a time, has 263.
# With pages of 256 it would have 512, 0.03 bits per value more at 128K tokens.
LAYOUT = Layout(sink=64, recent=256, page=64)


def oscar(
    key: Transform,
    value: Transform,
    *,
    variant: Variant = "int2",
    key_clip: float = 0.96,
    value_clip: float = 0.92,
    group: int | None = None,
    scale_dtype: jnp.dtype | str = "float16",
    layout: Layout = LAYOUT,
) -> Method:
    """OSCAR for one layer, from its two calibrated rotations.

        k' = k R_K,  v' = v R_V;   2-bit integers with a float scale and zero per token

    There is no OSCAR without calibration: rotations come from `calibrate.oscar` or, for the models
    that the authors have measured, from `calibrate.zoo`.

    Args:
      key, value: rotations of keys and of values, one for all KV heads or one for each.
      variant: "int2" (min/max), or "lloyd_max" as released: thresholds of the optimum, even levels.
      key_clip, value_clip: see `ClippedUniform`. The released settings have 0.96 for keys and 0.92
        for values of Qwen3-4B and 8B; Qwen3-32B 0.96 for both (as others quote it).
      group: channels per scale; None is one scale per token.
      scale_dtype: "float16" makes 2.28 bits per value at 128K tokens and head_dim 128, windows
        included, "float32" (what is shipped) 2.53.
      layout: sink 64 and recent 256, as in the paper.
    Raises:
      InputError: an unknown variant, or what `ClippedUniform` refuses.

    Source: OSCAR, arXiv 2605.17757. Another method is OScaR (arXiv 2605.19660).
    Differs from the paper: 64 tokens are packed at a time, not 8, so up to 319 recent tokens are
    exact and not 263; windows hold unrotated tokens, which is the same attention; rotations are
    float32, not bf16; with "lloyd_max"
    every page is coded so (released: only those of the prompt); values are rotated back once per
    step, not in the weights.

    Example:
      >>> import jax
      >>> from kvjax.codecs import Orthogonal
      >>> key, value = (Orthogonal.random(64, rng=jax.random.key(i)) for i in range(2))
      >>> method = oscar(key, value)  # rotations of a calibration, in earnest
      >>> method.name, method.layout.sink, method.value.inner.clip
      ('oscar', 64, 0.92)
    """
    if variant not in _RULES:
        raise InputError(
            "variant", got=repr(variant), expected=f"one of {tuple(_RULES)}", fix="name one of them"
        )

    def side(rotation: Transform, clip: float) -> Linear:
        integers = ClippedUniform(
            2, clip=clip, group=group, rule=_RULES[variant], scale_dtype=jnp.dtype(scale_dtype)
        )
        return Linear(rotation, integers)

    name = "oscar" if variant == "int2" else "oscar-lloyd-max"
    return Method(side(key, key_clip), side(value, value_clip), layout, name)
