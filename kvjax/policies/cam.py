"""Values of tokens that leave go to the next tokens that stay."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from kvjax.core.codec import Array
from kvjax.core.errors import InputError
from kvjax.core.rng import fold


def merge_values(
    value: Array,
    positions: Array,
    stays: Array,
    mass: Array,
    *,
    rng: Array,
    window: int = 32,
) -> Array:
    """Values after the tokens that leave were merged into the next ones that stay.

    For each token e that leaves, let W be the next `window` tokens by position that stay (fewer
    near the end). With probability

        p_e = clip(mass_e / mean of mass over W, 0, 1)

    its value is shared out, `v_j += v_e / |W|` for j in W; else it is lost. Keys are as they were.

    Args:
      value: `[..., s, d]`. positions: `[..., s]` int32, -1 where empty, in any order.
      stays: `[..., s]` bool. mass: `[..., s]`, attention gathered so far, 0 or more.
      rng: a key; fold the layer and the block into it, or every one draws alike.
      window: tokens that share a value.
    Returns:
      `[..., s, d]` float32; only values of tokens that stay have changed.

    Source: CaM, ICML 2024 (openreview LCTmppB165); window 32 in its code.
    Differs from the paper: all tokens that leave after a block are merged, not one after each step
    (the same with blocks of one token). A token with mass whose heirs have none always merges.

    Raises:
      InputError: a window below 1.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> v, at = jnp.array([[8.0], [1.0], [2.0]]), jnp.arange(3)
      >>> stays = jnp.array([False, True, True])
      >>> merge_values(v, at, stays, jnp.ones(3), rng=jax.random.key(0))[:, 0]
      Array([8., 5., 6.], dtype=float32)
    """
    if window < 1:
        raise InputError("window", got=window, expected="1 or more", fix="the paper's is 32")
    luck = jax.random.uniform(fold(rng, "cam"), positions.shape)
    one = functools.partial(_merge, window=window)
    for _ in range(positions.ndim - 1):
        one = jax.vmap(one)
    return one(value, positions, stays, mass, luck)


def _merge(
    value: Array, positions: Array, stays: Array, mass: Array, luck: Array, *, window: int
) -> Array:
    s = positions.shape[0]
    real = positions >= 0
    stays, leaves = stays & real, ~stays & real
    order = jnp.argsort(jnp.where(real, positions, jnp.iinfo(jnp.int32).max))
    before = jnp.cumsum(stays[order])[jnp.argsort(order)]  # staying tokens up to here
    place = jnp.where(stays, before - 1, jnp.where(leaves, before, s))  # own, or first heir's

    heirs = jnp.minimum(window, stays.sum() - place)  # of a token that leaves
    heir_mass = jnp.zeros(s).at[jnp.where(stays, place, s)].add(mass, mode="drop")
    # Sums over a window of places, ahead of each (mass of heirs) and behind it (what they get).
    ahead = jax.lax.reduce_window(heir_mass, 0.0, jax.lax.add, (window,), (1,), [(0, window - 1)])
    mean = ahead.at[place].get(mode="fill", fill_value=0) / jnp.maximum(heirs, 1)
    merges = leaves & (heirs > 0) & (luck * mean < mass)

    share = jnp.where(merges, 1 / jnp.maximum(heirs, 1), 0.0)[:, None] * value.astype(jnp.float32)
    given = jnp.zeros((s, value.shape[1])).at[jnp.where(merges, place, s)].add(share, mode="drop")
    got = jax.lax.reduce_window(
        given, 0.0, jax.lax.add, (window, 1), (1, 1), [(window - 1, 0), (0, 0)]
    )
    got = got.at[place].get(mode="fill", fill_value=0)
    return value.astype(jnp.float32) + jnp.where(stays[:, None], got, 0.0)
