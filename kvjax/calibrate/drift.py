"""How keys and values differ from token to token: their scales, and their drift with position."""

from __future__ import annotations

import itertools
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array

SCALES = ("norm", "log_norm", "max_abs")  # in the order of `key_scales` and `value_scales`
BUCKETS = 8  # of positions, in a window that has as many tokens

_TINY = float(np.finfo(np.float32).tiny)


class TokenMoments(Protocol):
    """What is known of single tokens: see `Moments`."""

    @property
    def key_scales(self) -> np.ndarray | None: ...
    @property
    def value_scales(self) -> np.ndarray | None: ...
    @property
    def bucket_edges(self) -> np.ndarray | None: ...
    @property
    def key_bucket_mean(self) -> np.ndarray | None: ...
    @property
    def key_bucket_var(self) -> np.ndarray | None: ...


def token_scales(x: Array) -> Array:
    """`[t, h, d]` -> `[t, h, 3]`: norm, its natural log and the largest magnitude of each token.

    The log of a vector of zeros is that of the least normal float32, -87.3.
    """
    norm = jnp.sqrt((x**2).sum(-1))
    return jnp.stack([norm, jnp.log(jnp.maximum(norm, _TINY)), jnp.abs(x).max(-1)], -1)


def bucket_edges(first: int, stop: int) -> np.ndarray:
    """`[b + 1]` positions: bucket i is `edges[i] <= position < edges[i + 1]`, sizes equal to one.

    Example:
      >>> bucket_edges(4, 84)
      array([ 4, 14, 24, 34, 44, 54, 64, 74, 84])
    """
    buckets = min(BUCKETS, stop - first)
    return first + (stop - first) * np.arange(buckets + 1) // buckets


def bucket_sums(x: Array, edges: np.ndarray) -> Array:
    """`[t, h, ...]` of positions from 0 on -> `[h, b, ...]`, sums over the tokens of a bucket."""
    return jnp.stack([x[a:b].sum(0) for a, b in itertools.pairwise(edges)], 1)


def from_bucket(x: Array, means: Array, edges: np.ndarray) -> Array:
    """`[t, h, d]`: x less the mean `[h, b, d]` of its bucket; nothing less outside the buckets."""
    at = means.swapaxes(0, 1)  # [b, h, d]
    parts = [x[a:b] - at[i] for i, (a, b) in enumerate(itertools.pairwise(edges))]
    return jnp.concatenate([x[: edges[0]], *parts, x[edges[-1] :]])


def drift_share(moments: TokenMoments) -> np.ndarray | None:
    """`[l, h]`: the share of the key variance that lies between buckets of positions.

        sum_b w_b |m_b - m|^2 / (sum_b w_b |m_b - m|^2 + sum_b w_b trace C_b)

    with m_b, C_b mean and covariance of the keys (after RoPE) of bucket b, w_b its part of the
    tokens and m the mean of all. 0 says that one mean serves all positions, 1 that keys are a
    function of the position's bucket. Independent tokens without drift give about (b - 1) / tokens,
    and tokens that resemble their neighbours more. Heads whose keys never vary have 0.

    Returns:
      None where the calibration has no buckets.
    """
    edges, means, var = moments.bucket_edges, moments.key_bucket_mean, moments.key_bucket_var
    if edges is None or means is None or var is None:
        return None
    weight = np.diff(edges) / (edges[-1] - edges[0])  # [b]
    mean = np.einsum("b,lhbd->lhd", weight, means)
    between = (weight * ((means - mean[:, :, None]) ** 2).sum(-1)).sum(-1)
    total = between + (weight * var).sum(-1)
    return between / np.where(total > 0, total, 1.0)


def drift_summary(moments: TokenMoments) -> list[str]:
    """What `kvjax calibrate` says at its end: a line on scales, and one on drift."""
    lines = []
    if moments.key_scales is not None and moments.value_scales is not None:
        sides = ("keys", moments.key_scales), ("values", moments.value_scales)
        lines.append("tokens, median over heads: " + "; ".join(_scales(*side) for side in sides))
    share = drift_share(moments)
    if share is not None and moments.bucket_edges is not None:
        layer, head = np.unravel_index(share.argmax(), share.shape)
        lines.append(
            f"drift, median over heads: {np.median(share):.1%} of the key variance lies between "
            f"{len(moments.bucket_edges) - 1} buckets of positions "
            f"(most: {share.max():.1%}, layer {layer} head {head})"
        )
    return lines


def _scales(side: str, scales: np.ndarray) -> str:
    mean = dict(zip(SCALES, np.median(scales[..., 0], (0, 1)), strict=True))
    spread = np.median(np.sqrt(scales[..., SCALES.index("log_norm"), 1]))
    return f"{side} of norm {mean['norm']:.3g} (log +-{spread:.2f}), largest {mean['max_abs']:.3g}"
