"""What `logits_only` computes, in plain jnp: the keys unpacked, then one product."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.packed import Packed, unpack

Array = jax.Array


def logits_only_reference(
    q: Array,
    key: Packed,
    lengths: Array,
    *,
    layer: Array | int = 0,
    table: Array | None = None,
) -> Array:
    """As `logits_only`, with all keys unpacked."""
    keys = unpack(jax.tree.map(lambda a: a if a.ndim == 1 else a[layer], key))
    if table is not None:
        keys = jnp.moveaxis(keys[jnp.maximum(table, 0)], 1, 2)
    keys = keys.reshape(*keys.shape[:2], -1, keys.shape[-1])  # [b, h, t, d]
    logits = jnp.einsum("bhgd,bhtd->bhgt", q.astype(jnp.float32), keys)
    lengths = jnp.broadcast_to(lengths if lengths.ndim == 2 else lengths[:, None], q.shape[:2])
    seen = jnp.arange(keys.shape[2]) < lengths[..., None]
    return jnp.where(seen[:, :, None], logits, -1e30)
