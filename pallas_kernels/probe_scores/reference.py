"""What `probe_scores` computes, in plain jnp, with the whole matrix of weights."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.packed import widen
from pallas_kernels.probe_scores.kernel import ProbeScores

Array = jax.Array


def probe_scores_reference(
    q: Array,
    key: Array,
    lengths: Array | None = None,
    *,
    positions: Array | None = None,
    query_positions: Array | None = None,
) -> ProbeScores:
    """As `probe_scores`, in float32."""
    b, h, _, n, _ = q.shape
    t = key.shape[2]
    logits = jnp.einsum("bhgnd,bhtd->bhgnt", q.astype(jnp.float32), widen(key))
    seen = jnp.ones((b, h, n, t), bool)
    if lengths is not None:
        lengths = lengths if lengths.ndim == 2 else lengths[:, None]
        seen &= (jnp.arange(t) < lengths[..., None])[:, :, None]
    at = jnp.arange(t)[None, None] if positions is None else positions
    at = at if at.ndim == 3 else at[:, None]
    seen &= (at >= 0)[:, :, None]
    if query_positions is not None:
        seen &= at[:, :, None] <= query_positions[:, None, :, None]
    mask = seen[:, :, None]
    top = jnp.where(mask, logits, -1e30).max(-1, keepdims=True)
    weights = jnp.where(mask, jnp.exp(logits - top), 0.0)
    weights = weights / jnp.maximum(weights.sum(-1, keepdims=True), 1e-30)
    return ProbeScores(weights.max((2, 3)), weights.sum((2, 3)))
