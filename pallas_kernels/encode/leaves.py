"""Codes and scales of tokens whose channels are in pieces, on values in registers."""

from __future__ import annotations

import functools
import itertools
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.encode.forms import Grid, Levels
from pallas_kernels.encode.reference import gain

Array = jax.Array

TINY = np.float32(np.finfo(np.float32).tiny)
ROUND = np.float32(1.5 * 2**23)  # adding it leaves a whole number in the low bits


def level_codes(
    y: list[Array], levels: Any, form: Levels, factor: float
) -> tuple[list[Array], Array]:
    """Codes `[rows, size]` uint32 of each piece, and scales `[rows]` float32.

    A token with a number that is not finite gets a scale of NaN, and codes as of zeros: no
    comparison with NaN holds.

    Args:
      y: pieces `[rows, size]`, of which `factor` times is meant.
      levels: a reference to the levels, of which scalars are read.
    """
    half = 2 ** (form.bits - 1)
    upper = [levels[half + i] for i in range(half)]
    # In two steps, because the squares of very small or very large numbers leave float32.
    largest = jnp.maximum(_over_channels(jnp.maximum, jnp.max, [jnp.abs(a) for a in y]), TINY)
    y = [a * (1 / largest)[:, None] for a in y]
    norm = jnp.sqrt(_over_channels(operator.add, jnp.sum, [a * a for a in y]))
    edges = [(a + b) / 2 * norm for a, b in itertools.pairwise(upper)]

    codes, along, length2 = [], [], []
    for a in y:
        size = jnp.abs(a)
        index, level = _nearest(size, edges, upper)
        codes.append(jnp.where(a > 0, index, index ^ (2 * half - 1)))
        along.append(size * level)
        length2.append(level * level)
    scale = norm * (largest * np.float32(factor))
    if form.gain != "none":
        total = functools.partial(_over_channels, operator.add, jnp.sum)
        inverse = 1 / jnp.where(norm > 0, norm, 1.0)
        scale = scale * gain(form.gain, total(along) * inverse, total(length2))
    return codes, scale


def _nearest(size: Array, edges: list[Array], levels: list[Array]) -> tuple[Array, Array]:
    """Which level a value is nearest to, plus the number of levels, and that level: halving.

    Args:
      size: `[rows, size]`. edges: `[rows]` between the levels. levels: scalars, a power of two.
    """
    index = jnp.ones(size.shape, jnp.uint32)
    bounds = [e[:, None] for e in edges]
    while len(levels) > 1:
        half = len(levels) // 2
        above = size > bounds[half - 1]
        narrower = lambda low, high, above=above: [
            jnp.where(above, b, a) for a, b in zip(low, high, strict=True)
        ]
        bounds = narrower(bounds[: half - 1], bounds[half:])
        levels = narrower(levels[:half], levels[half:])
        index = index * 2 + above
    return index, levels[0]


def grid_codes(y: list[Array], form: Grid, factor: float) -> tuple[list[Array], Array, Array]:
    """Codes `[rows, size]` uint32 of the pieces of one group, scales and zeros `[rows]`, rounded.

    Args:
      y: pieces `[rows, size]`, of which `factor` times is meant.
    """
    top = 2**form.bits - 1
    low = _over_channels(jnp.minimum, jnp.min, y) * np.float32(factor)
    high = _over_channels(jnp.maximum, jnp.max, y) * np.float32(factor)
    half = (high - low) * np.float32(form.clip / 2)
    stored = lambda a: a.astype(form.scale_dtype).astype(jnp.float32)
    scale = stored(half * np.float32(2 / top))
    zero = stored((high + low) / 2 - half)
    inverse = 1 / jnp.where(scale == 0, 1.0, scale)
    codes = []
    for a in y:
        if factor != 1:
            a = a * np.float32(factor)
        steps = (a - zero[:, None]) * inverse[:, None]
        whole = jnp.clip(steps, 0.0, np.float32(top)) + ROUND
        codes.append(jax.lax.bitcast_convert_type(whole, jnp.uint32) & top)
    return codes, scale, zero


def _over_channels(op: Any, reduce: Any, pieces: list[Array]) -> Array:
    """One number per row of all pieces: those of one size meet before lanes exchange anything."""
    sizes = sorted({a.shape[1] for a in pieces})
    alike = [[a for a in pieces if a.shape[1] == size] for size in sizes]
    return functools.reduce(op, [reduce(functools.reduce(op, some), axis=1) for some in alike])
