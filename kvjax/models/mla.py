"""Multi-head latent attention (MLA): one latent per token is the key and the value of all heads.

    c = W_DKV x, normed        k_R = RoPE(W_KR x)                     the cache: [c (r) | k_R]
    q_n, q_R = W_Q x           W_Q may be low rank, W_UQ norm(W_DQ x)
    logit of head i = (q_n,i . W_UK,i c + RoPE(q_R,i) . k_R) * scale
    output = W_O concat_i W_UV,i sum_s p_i,s c_s

W_UK and W_UV are absorbed: heads ask with `[W_UK,i^T q_n,i | RoPE(q_R,i)]` and get sums of latents,
so keys and values of single heads never exist. To a cache that is one KV head whose query group is
all heads, with values that are the keys' first r channels (see `kvjax.codecs.View`).

How `decoder.Layers` names the weights (all [in, out], n the position-free channels of a head, d_R
its rotary ones, d_v its value's): `wq` [D or q rank, H*(n + d_R)], `w_dq` and `q_norm` where
queries are low rank, `wk` [D, r + d_R] is W_DKV beside W_KR, `k_norm` [r], `w_uk` [r, H*n], `wv`
[r, H*d_v], `wo` [H*d_v, D].

Source: DeepSeek-V2, arXiv 2405.04434, section 2.1.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kvjax.models.config import Latent, ModelConfig
from kvjax.models.primitives import apply_rope, rms_norm

Array = jax.Array


def queries(config: ModelConfig, weights, x: Array, angles: tuple[Array, Array]) -> Array:
    """x [b, t, D] after its norm -> absorbed q [b, t, 1, H, r + d_R], times the attention scale."""
    latent = of(config)
    if latent.q_rank is not None:
        x = rms_norm(x @ weights.w_dq, weights.q_norm, config.norm_eps)
    q = (x @ weights.wq).reshape(*x.shape[:2], config.q_heads, -1)  # [b, t, H, n + d_R]
    free, turning = q[..., : latent.nope_dim], q[..., latent.nope_dim :]
    turned = _turn(latent, turning, *(a[:, :, None] for a in angles))
    if latent.nope_dim:
        up = weights.w_uk.reshape(latent.rank, config.q_heads, latent.nope_dim)
        free = jnp.einsum("bthn,rhn->bthr", free, up, preferred_element_type=jnp.float32)
    else:  # all is rotary: the latent is values only
        free = jnp.zeros((*q.shape[:3], latent.rank), jnp.float32)
    q = jnp.concatenate([free, turned], -1) * config.attention_scale
    return q[:, :, None].astype(x.dtype)


def keys_values(
    config: ModelConfig, weights, x: Array, angles: tuple[Array, Array]
) -> tuple[Array, Array]:
    """x [b, t, D] after its norm -> what is cached, k [b, t, 1, r + d_R], and its view v: the same
    latent, with zeros for the rotary channels, so that all who read values find them."""
    latent = of(config)
    made = x @ weights.wk  # [b, t, r + d_R]
    c, turning = made[..., : latent.rank], made[..., latent.rank :]
    if latent.norm:
        c = rms_norm(c, weights.k_norm, config.norm_eps)
    turned = _turn(latent, turning, *angles).astype(x.dtype)
    key = jnp.concatenate([c, turned], -1)
    value = jnp.concatenate([c, jnp.zeros_like(turned)], -1)
    return key[:, :, None], value[:, :, None]


def outputs(config: ModelConfig, weights, out: Array) -> Array:
    """Sums of latents [b, t, 1, H, r + d_R] -> outputs of the heads [b, t, H*d_v], before `wo`."""
    latent = of(config)
    sums = out[:, :, 0, :, : latent.rank].astype(weights.wv.dtype)
    up = weights.wv.reshape(latent.rank, config.q_heads, latent.value_dim)
    made = jnp.einsum("bthr,rhv->bthv", sums, up)
    return made.reshape(*made.shape[:2], -1)


def attention_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of each attention weight of one layer as checkpoints hold it: matrices [out, in]."""
    latent, D, heads = of(config), config.d_model, config.q_heads
    q_in, turning = latent.q_rank or D, latent.rotary_dim * latent.rotary_heads
    shapes: dict[str, tuple[int, ...]] = {
        "wq": (heads * (latent.nope_dim + turning), q_in),
        "wk": (latent.rank + turning, D),
        "wv": (heads * latent.value_dim, latent.rank),
        "wo": (D, heads * latent.value_dim),
    }
    if latent.nope_dim:
        shapes["w_uk"] = (heads * latent.nope_dim, latent.rank)
    if latent.q_rank is not None:
        shapes |= {"w_dq": (latent.q_rank, D), "q_norm": (latent.q_rank,)}
    if latent.norm:
        shapes["k_norm"] = (latent.rank,)
    return shapes


def of(config: ModelConfig) -> Latent:
    assert config.latent is not None
    return config.latent


def _turn(latent: Latent, x: Array, cos: Array, sin: Array) -> Array:
    """Each rotary head of x [..., d_R] by itself, float32; cos, sin broadcast to [..., d/2]."""
    heads = x.reshape(*x.shape[:-1], latent.rotary_heads, latent.rotary_dim)
    return apply_rope(heads, cos[..., None, :], sin[..., None, :]).reshape(x.shape)
