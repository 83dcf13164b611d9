"""What `packed_decode` computes, in plain jnp: the pages unpacked, then softmax attention."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.packed import Packed, unpack

Array = jax.Array


def packed_decode_reference(
    q: Array,
    key: Packed,
    value: Packed,
    lengths: Array,
    *,
    layer: Array | int = 0,
    table: Array | None = None,
    dtype=jnp.float32,
) -> tuple[Array, Array]:
    """As `packed_decode`, with all tokens unpacked: of any size in memory."""
    layered = lambda packed: jax.tree.map(lambda a: a if a.ndim == 1 else a[layer], packed)
    keys, values = unpack(layered(key)), unpack(layered(value))
    if table is not None:
        at = jnp.maximum(table, 0)
        keys, values = (jnp.moveaxis(x[at], 1, 2) for x in (keys, values))  # [b, h, n, t, d]
    flat = lambda x: x.reshape(*x.shape[:2], -1, x.shape[-1]).astype(dtype)
    keys, values = flat(keys), flat(values)
    logits = jnp.einsum("bhgd,bhtd->bhgt", q.astype(dtype), keys)
    lengths = jnp.broadcast_to(lengths if lengths.ndim == 2 else lengths[:, None], q.shape[:2])
    seen = jnp.arange(keys.shape[2]) < lengths[..., None]
    logits = jnp.where(seen[:, :, None], logits, -jnp.inf)
    top = jnp.maximum(logits.max(-1), -1e30)
    p = jnp.exp(logits - top[..., None])
    total = p.sum(-1)
    out = jnp.einsum("bhgt,bhtd->bhgd", p, values)
    some = total > 0
    out = out / jnp.where(some, total, 1)[..., None]
    return out, jnp.where(some, top + jnp.log(jnp.where(some, total, 1)), -1e30)
