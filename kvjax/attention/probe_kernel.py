"""What queries pay to each key, summed up by key by one fused kernel, where the device allows it.

Policies that evict by attention ask for it (`kvjax.policies.policy.columns`): it is the same for
every codec, since keys are exact when a policy judges them.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from kvjax.attention.packed_kernel import GPU_FAMILY
from kvjax.core.codec import Array
from kvjax.core.method import Attention
from pallas_kernels.probe_scores import probe_scores, why_not


def backend(
    attention: Attention, query: Array, key: Array
) -> Literal["triton", "interpret"] | None:
    """What `probe_scores` is to run as, or None for XLA, a block of queries at a time.

    Args:
      attention: as of a `Method`. query: `[b, h, g, n, d]`. key: `[b, h, s, d]`.
    """
    if attention not in ("auto", "triton", "interpret") or why_not(query, key) is not None:
        return None
    if attention == "auto":
        return "triton" if jax.default_backend() in GPU_FAMILY else None
    return "interpret" if attention == "interpret" else "triton"


def column_scores(
    query: Array,
    query_positions: Array,
    key: Array,
    positions: Array,
    *,
    backend: Literal["triton", "interpret"],
) -> tuple[Array, Array, Array]:
    """Total, peak and queries of each key, `[b, h, s]` float32, as `Columns` has them.

    Logits of float32 keys are TF32 products on a GPU, as those of XLA are there.

    Args:
      query: `[b, h, g, n, d]`, scaled. query_positions: `[b, n]` int32, -1 for padding.
      key: `[b, h, s, d]`. positions: `[b, h, s]` int32, -1 where there is no key.
    """
    paid = probe_scores(
        query, key, positions=positions, query_positions=query_positions, backend=backend
    )
    before = jax.vmap(jnp.searchsorted)(jnp.sort(query_positions, -1), positions)
    later = jnp.where(positions < 0, 0, query_positions.shape[-1] - before)
    return paid.total / query.shape[2], paid.peak, later.astype(jnp.float32)
