"""A Llama with grouped queries as a model with latent attention: exact, or smaller and measured.

Keys before RoPE are, for each frequency i, complex numbers of h heads, and RoPE turns those of all
heads alike. A real orthogonal U_i over the heads therefore commutes with it:

    <q_j, RoPE k_j>  =  sum_m <U_i[m, j] q_j, RoPE (U_i k)_m>

With U_i from the PCA of calibration keys, the first components hold most. `rope_heads` of the h
keep their rotation, and are the rotary part of the latent's key. The others are read as if they had
none, and go with the values into one latent, by PCA of `[alpha * keys | values]`, alpha such that
both weigh the same. With all h rotated nothing is lost: the latent is the values.

Source: TransMLA, arXiv 2502.07864 (RoRoPE and balanced joint compression).
Differs from the paper: no frequencies are folded together, moments are of keys and values alone,
and nothing is trained afterwards.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.core.errors import InputError
from kvjax.models.causal import causal_attend
from kvjax.models.config import Latent, ModelConfig, layer_runs
from kvjax.models.decoder import Layers, Params, decode_layers, logits, rope_angles
from kvjax.models.load import Model
from kvjax.models.primitives import apply_rope

Array = jax.Array


@functools.partial(jax.jit, static_argnums=1)
def joint_moments(params: Params, config: ModelConfig, tokens: Array) -> Array:
    """Second moments of `[keys before RoPE | values]` of all heads, `[l, 2 h d, 2 h d]` float32.

    Args:
      tokens: int32 `[b, t]`, calibration text.
    """
    runs, b, t = layer_runs(config), *tokens.shape
    positions = jnp.broadcast_to(jnp.arange(t), (b, t))
    exact = causal_attend(runs, positions)

    def attend(run, layer, moments, q, k, v, extra):
        cos, sin = (a[:, :, None] for a in rope_angles(runs[run], config.head_dim, positions))
        plain = apply_rope(k, cos, -sin)
        both = jnp.concatenate([a.reshape(b * t, -1).astype(jnp.float32) for a in (plain, v)], -1)
        out, _ = exact(run, layer, None, q, k, v, extra)
        return out, moments.at[layer].set(both.T @ both / (b * t))

    n = 2 * config.kv_heads * config.head_dim
    empty = tuple(jnp.zeros((run.length, n, n)) for run in runs)
    _, moments, _ = decode_layers(params, config, tokens, positions, attend, empty)
    return jnp.concatenate(moments)


def to_mla(model: Model, moments: Array, *, rank: int, rope_heads: int) -> Model:
    """The model with one latent of `rank` and `rope_heads` rotary heads per token and layer.

    Its cache has `rank + rope_heads * d` numbers per token and layer, where there were `2 h d`.

    Args:
      moments: of `joint_moments`, on text like that to come.
      rank: at most `(2 h - rope_heads) d`, which loses nothing more.
      rope_heads: 1 to h; h is exact, and rank `h d` then keeps all values.
    Raises:
      InputError: another family than Llama; sizes that the model does not have; moments of another
        model, or that are not finite.

    Example:
      >>> model = load("smollm2-135m")  # doctest: +SKIP
      >>> moments = joint_moments(model.params, model.config, tokens)  # doctest: +SKIP
      >>> small = to_mla(model, moments, rank=128, rope_heads=1)  # doctest: +SKIP
    """
    config = model.config
    check(config, rank, rope_heads)
    h, d = config.kv_heads, config.head_dim
    known, dtype = np.asarray(moments, np.float64), model.params.embed.dtype
    _check_moments(config, known)
    latent = Latent(
        rank=rank,
        rotary_dim=d,
        nope_dim=0 if rope_heads == h else d,
        value_dim=d,
        rotary_heads=rope_heads,
        norm=False,
    )
    made = dataclasses.replace(
        config, arch="mla", kv_heads=1, head_dim=latent.width, latent=latent, windows=()
    )
    runs, first = [], 0
    for layers in model.params.runs:
        count = layers.attn_norm.shape[0]
        parts = [_convert(config, latent, layers, i, known[first + i]) for i in range(count)]
        new = {n: jnp.asarray(np.stack([part[n] for part in parts]), dtype) for n in parts[0]}
        runs.append(dataclasses.replace(layers, **new))
        first += count
    params = dataclasses.replace(model.params, runs=tuple(runs))
    return dataclasses.replace(model, config=made, params=params)


def check(config: ModelConfig, rank: int, rope_heads: int) -> None:
    """Raises `InputError` for another family than Llama, and for sizes that it does not have."""
    h, d = config.kv_heads, config.head_dim
    own = {"qk_norm": config.qk_norm, "biases": config.qkv_bias, "windows": any(config.windows)}
    own |= {f"arch {config.arch}": config.arch != "llama", "shared layers": bool(config.layer_map)}
    if odd := [name for name, there in own.items() if there]:
        raise InputError(
            f"model {config.name}",
            got=", ".join(odd),
            expected="a Llama: no norm between projection and RoPE, no biases, no windows",
            fix="convert a Llama or SmolLM2",
        )
    if not 1 <= rope_heads <= h:
        raise InputError(
            "rope_heads", got=rope_heads, expected=f"1 to the {h} KV heads", fix="choose such"
        )
    most = (2 * h - rope_heads) * d
    if not 1 <= rank <= most:
        raise InputError(
            "rank", got=rank, expected=f"1 to {most}, all that is left", fix="choose such a rank"
        )


def _check_moments(config: ModelConfig, moments: np.ndarray) -> None:
    n = 2 * config.kv_heads * config.head_dim
    if moments.shape != (config.layers, n, n):
        raise InputError(
            "moments",
            got=f"shape {moments.shape}",
            expected=f"{(config.layers, n, n)} for {config.name}",
            fix="measure them with joint_moments on this model",
        )
    power = np.diagonal(moments, axis1=1, axis2=2).reshape(config.layers, 2, -1).sum(-1)
    if not (np.isfinite(moments).all() and (power > 0).all()):
        raise InputError(
            "moments",
            got="NaN or infinity, or a layer whose keys or values are all zero",
            expected="finite second moments of keys and values",
            fix="check the checkpoint, or run it in float32",
        )


def _convert(
    config: ModelConfig, latent: Latent, layers: Layers, layer: int, moment: np.ndarray
) -> dict[str, np.ndarray]:
    """The attention weights of one layer, [in, out] float64."""
    h, g, d = config.kv_heads, config.q_per_kv, config.head_dim
    wq, wk, wv = (np.asarray(getattr(layers, n)[layer], np.float64) for n in ("wq", "wk", "wv"))
    mix = mixing(moment[: h * d, : h * d], h)  # [m d, h d]
    turning, free = np.split(mix, [latent.rotary_heads * d])
    basis, alpha = _basis(moment, free, latent.rank)  # [free d + h d, r]
    n = len(free)
    down = np.concatenate([wk @ free.T * alpha, wv], 1) @ basis  # [D, r]
    heads = wq.reshape(-1, h, g, d)  # [D, h, g, d]
    rotary = np.einsum("Djgd,mjd->Djgm", heads, turning.reshape(-1, h, d))
    q = [rotary] if not n else [heads, rotary]
    out = {
        "wq": np.concatenate(q, -1).reshape(len(wq), -1),
        "wk": np.concatenate([down, wk @ turning.T], 1),
        "wv": _per_head(basis[n:], h, g),
    }
    if n:  # q_j . U_j^T (U k) of the free components
        out["w_uk"] = _per_head(free.T @ basis[:n] / alpha, h, g)
    return out


def _per_head(rows: np.ndarray, h: int, g: int) -> np.ndarray:
    """What each KV head makes of the latent, [h d, r], for all its queries: [r, h*g*d]."""
    each = rows.reshape(h, 1, -1, rows.shape[-1]).repeat(g, 1)
    return each.reshape(-1, rows.shape[-1]).T


def mixing(moment: np.ndarray, heads: int) -> np.ndarray:
    """The orthogonal map [h d, h d] of keys that commutes with RoPE, largest components first.

    Args:
      moment: `[h d, h d]` of keys before RoPE; pairs are (i, i + d/2) of each head.
    """
    d = len(moment) // heads
    by_head = moment.reshape(heads, 2, d // 2, heads, 2, d // 2)
    pairs = np.einsum("japkap->pjk", by_head)  # [d/2, h, h], both members of a pair
    vectors = np.linalg.eigh(pairs)[1][:, :, ::-1]  # [d/2, h, m]
    out = np.zeros((heads, 2, d // 2, heads, 2, d // 2))
    for p, own in enumerate(vectors):
        out[:, 0, p, :, 0, p] = out[:, 1, p, :, 1, p] = own.T
    return out.reshape(heads * d, heads * d)


def _basis(moment: np.ndarray, free: np.ndarray, rank: int) -> tuple[np.ndarray, float]:
    """Principal directions [n, r] of `[alpha * free keys | values]`, and alpha."""
    keys, width = len(free), free.shape[1]
    joint = np.eye(keys + width, 2 * width, width - keys)
    joint[:keys] = np.pad(free, ((0, 0), (0, width)))
    joint = joint @ moment @ joint.T
    energy = np.trace(joint[:keys, :keys]), np.trace(joint[keys:, keys:])
    alpha = float(np.sqrt(energy[1] / energy[0])) if keys else 1.0
    scale = np.where(np.arange(len(joint)) < keys, alpha, 1.0)
    vectors = np.linalg.eigh(joint * scale * scale[:, None])[1]
    return vectors[:, ::-1][:, :rank], alpha


@functools.partial(jax.jit, static_argnames=("config", "other_config"))
def divergence(
    params: Params, config: ModelConfig, other: Params, other_config: ModelConfig, tokens: Array
) -> Array:
    """`[t]`, KL(model || other) of the next token at each position, in nats; both with exact
    attention and no cache.

    Args:
      tokens: int32 `[t]`.
    """
    positions = jnp.arange(tokens.shape[0])[None]

    def hidden(params: Params, config: ModelConfig) -> Array:
        runs = layer_runs(config)
        attend, none = causal_attend(runs, positions), (None,) * len(runs)
        return decode_layers(params, config, tokens[None], positions, attend, none)[0][0]

    def one(pair):  # a row of logits at a time: all would be [t, V] twice
        sure = jax.nn.log_softmax(logits(params, config, pair[0]))
        ours = jax.nn.log_softmax(logits(other, other_config, pair[1]))
        return (jnp.exp(sure) * (sure - ours)).sum(-1)

    pairs = hidden(params, config), hidden(other, other_config)
    return jax.lax.map(one, pairs, batch_size=64)
