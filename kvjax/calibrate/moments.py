"""What a model's queries, keys and values look like: second moments per layer and KV head."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.calibrate.drift import bucket_edges, bucket_sums, from_bucket, token_scales
from kvjax.calibrate.turned import average
from kvjax.core.errors import InputError
from kvjax.models.causal import causal_attend
from kvjax.models.config import ModelConfig, layer_runs
from kvjax.models.decoder import Params, apply_rope, decode_layers, rope_angles, rope_frequencies

Array = jax.Array

SKIP = 4  # first tokens of a window are sinks: they stay exact, and look like nothing else

_SCALES = ("key_scales", "value_scales")


@dataclasses.dataclass(frozen=True)
class Moments:
    """Statistics of calibration tokens, float64 on the host; l layers, h KV heads, d channels.

    All are after RoPE but where they say otherwise, over the tokens from position 4 of each window
    on; queries carry the attention scale, so that `q k` is a logit.

    Attributes:
      tokens: how many were seen.
      query_gram: `[l, h, d, d]`, mean of `q q^T` over the queries of a KV head.
      key_mean: `[l, h, d]`. key_mean_pre: `[l, h, d]`, of the keys before RoPE.
      key_cov: `[l, h, d, d]`, about `key_mean`. key_cov_pre: about `R_position key_mean_pre`.
      value_mean: `[l, h, d]`. value_cov: `[l, h, d, d]`.
      output_gram: `[l, h, d, d]`, mean over tokens of `sum_g o o^T`, outputs `o = S V`: the
        score-weighted second moment `V^T S^T S V` of OSCAR's paper.
      value_proxy: `[l, h, d, d]`, mean of `w_t v v^T` with `w_t ~ k_t^T G k_t`, G the Gram of the
        window's own queries: what OSCAR's code has in its place.
      out_gram: `[l, h, d, d]`, sum over the group of `W_O W_O^T`: how the model weighs outputs.
      frequencies: `[l, d / 2]`, radians per position.
      key_fisher, value_fisher: `[l, h, d, d]`, what errors cost in predictions, or None where
        `measure_sensitivity` has not been run.
      key_scales, value_scales: `[l, h, 3, 2]`, mean and variance of a token's norm, of the natural
        log of it and of its largest magnitude (`drift.SCALES`): how much a scale per token is
        worth, and what it must cover. None, like all below, in calibrations that had none yet.
      key_cov_pre_rope: `[l, h, d, d]`, of the keys before RoPE, about `key_mean_pre`.
      query_gram_pre_rope: `[l, h, d, d]`, the Gram of queries as a key before RoPE meets them:
        `R_s q` with q before RoPE, s from 0 to the window evenly, or to the layer's own.
      key_fisher_pre_rope: `[l, h, d, d]`, what errors of keys before RoPE cost in predictions.
      bucket_edges: `[b + 1]`, the first position of each bucket of the window, and the end.
      key_bucket_mean: `[l, h, b, d]`, of the keys of a bucket. key_bucket_var: `[l, h, b]`, the
        trace of their covariance about it. `drift.drift_share` makes one number of them.
    """

    tokens: int
    query_gram: np.ndarray
    key_mean: np.ndarray
    key_mean_pre: np.ndarray
    key_cov: np.ndarray
    key_cov_pre: np.ndarray
    value_mean: np.ndarray
    value_cov: np.ndarray
    output_gram: np.ndarray
    value_proxy: np.ndarray
    out_gram: np.ndarray
    frequencies: np.ndarray
    key_fisher: np.ndarray | None = None
    value_fisher: np.ndarray | None = None
    key_cov_pre_rope: np.ndarray | None = None
    query_gram_pre_rope: np.ndarray | None = None
    key_fisher_pre_rope: np.ndarray | None = None
    key_scales: np.ndarray | None = None
    value_scales: np.ndarray | None = None
    bucket_edges: np.ndarray | None = None
    key_bucket_mean: np.ndarray | None = None
    key_bucket_var: np.ndarray | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """Layers, KV heads, channels."""
        layers, heads, d = self.key_mean.shape
        return layers, heads, d


def measure_moments(
    params: Params,
    config: ModelConfig,
    windows: Sequence[np.ndarray],
    progress: Callable[[str], None] = lambda message: None,
) -> Moments:
    """Two exact passes over the windows: means, then second moments about them.

    Memory is that of one window and the sums. The same windows give the same bits.

    Args:
      windows: `[t]` int32 each, all of one length.
    Raises:
      InputError: no windows, too short ones, or NaN in a layer, named.
    """
    if config.latent is not None:
        raise InputError(
            "calibration",
            got=f"{config.name}, whose values are a part of its keys",
            expected="a model with keys and values",
            fix="calibrate what it was converted from, or use a recipe without calibration",
        )
    check_windows(windows, SKIP)
    counted = len(windows) * (len(windows[0]) - SKIP)

    def over_windows(one: Callable[[Array], dict[str, Array]], what: str) -> dict[str, np.ndarray]:
        total: dict[str, np.ndarray] = {}
        for i, tokens in enumerate(windows):
            progress(f"{what}, window {i + 1} of {len(windows)}")
            sums = jax.device_get(one(jnp.asarray(tokens, jnp.int32)))
            for name, a in sums.items():
                total[name] = total.get(name, 0.0) + np.asarray(a, np.float64)
        return {name: a / counted for name, a in total.items()}

    first = over_windows(lambda tokens: _means(params, config, tokens), "means")
    check_sums(first)
    edges = bucket_edges(SKIP, len(windows[0]))
    of_bucket = (edges[-1] - edges[0]) / np.diff(edges)  # tokens of all for each of its own
    first["key_bucket_mean"] *= of_bucket[:, None]
    centres = {name: jnp.asarray(a, jnp.float32) for name, a in first.items()}
    second = over_windows(lambda tokens: _products(params, config, tokens, centres), "products")
    check_sums(second)
    second["query_gram"] /= config.q_per_kv
    second["key_bucket_var"] *= of_bucket
    scales = {name: np.stack([first.pop(name), second.pop(name)], -1) for name in _SCALES}
    runs = layer_runs(config)
    per_run = [rope_frequencies(run, config.head_dim) for run in runs]
    frequencies = np.repeat(per_run, [run.length for run in runs], axis=0).astype(np.float64)
    length = len(windows[0])
    distances = np.array([min(sees or length, length) for sees in layer_windows(config)])
    second["query_gram_pre_rope"] = average(
        second["query_gram_pre_rope"] / config.q_per_kv, frequencies[:, None], distances[:, None]
    )
    return Moments(
        tokens=counted,
        **first,
        **second,
        **scales,
        bucket_edges=edges.astype(np.float64),
        out_gram=_out_gram(params, config),
        frequencies=frequencies,
    )


def sum_pass(params, config: ModelConfig, tokens: Array, layer_sums, centres=None):
    """Sums per layer of `layer_sums(q, k, v, out, pre, centre)`, as `[layers, ...]` arrays."""
    runs = layer_runs(config)
    positions = jnp.arange(tokens.shape[0])[None]
    exact = causal_attend(runs, positions)

    def attend(run, layer, cache, q, k, v, extra):
        out, _ = exact(run, layer, None, q, k, v, extra)
        cos, sin = rope_angles(runs[run], config.head_dim, positions)
        cos, sin = cos[0, :, None], sin[0, :, None]  # [t, 1, d/2]
        rope = lambda x, sign: apply_rope(x, cos, sign * sin)
        some = [a[0].astype(jnp.float32) for a in (q, k, v, out)]
        sums = layer_sums(*some, rope, extra)
        put = lambda a, new: a.at[layer].set(new)
        return out, jax.tree.map(put, cache, sums)

    h, g, d = config.kv_heads, config.q_per_kv, config.head_dim
    t = tokens.shape[0]
    spec = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    centre = None if centres is None else {name: spec(*a.shape[1:]) for name, a in centres.items()}
    rope = lambda x, sign: x
    shapes = jax.eval_shape(
        lambda q, k, v, o, c: layer_sums(q, k, v, o, rope, c),
        *(spec(t, h, g, d), spec(t, h, d), spec(t, h, d), spec(t, h, g, d), centre),
    )
    blank = lambda run: jax.tree.map(lambda s: jnp.zeros((run.length, *s.shape)), shapes)
    xs = None
    if centres is not None:
        xs = [{name: a[run.start : run.stop] for name, a in centres.items()} for run in runs]
    _, sums, _ = decode_layers(
        params, config, tokens[None], positions, attend, [blank(run) for run in runs], xs=xs
    )
    return jax.tree.map(lambda *a: jnp.concatenate(a), *sums)


@functools.partial(jax.jit, static_argnums=1)
def _means(params: Params, config: ModelConfig, tokens: Array) -> dict[str, Array]:
    edges = bucket_edges(SKIP, len(tokens))

    def layer_sums(q, k, v, out, rope, extra):
        return {
            "key_mean": k[SKIP:].sum(0),
            "key_mean_pre": rope(k, -1)[SKIP:].sum(0),
            "value_mean": v[SKIP:].sum(0),
            "key_bucket_mean": bucket_sums(k, edges),
            "key_scales": token_scales(k[SKIP:]).sum(0),
            "value_scales": token_scales(v[SKIP:]).sum(0),
        }

    return sum_pass(params, config, tokens, layer_sums)


@functools.partial(jax.jit, static_argnums=1)
def _products(params: Params, config: ModelConfig, tokens: Array, centres) -> dict[str, Array]:
    edges = bucket_edges(SKIP, len(tokens))

    def layer_sums(q, k, v, out, rope, centre):
        gram = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
        turning = rope(jnp.broadcast_to(centre["key_mean_pre"], k.shape), 1)
        apart = from_bucket(k, centre["key_bucket_mean"], edges)
        still_k = rope(k, -1) - centre["key_mean_pre"]
        still_q = rope(q.reshape(len(tokens), -1, config.head_dim), -1).reshape(q.shape)
        some = (q, k, v, out, turning, still_q, still_k)
        q, k, v, out, turning, still_q, still_k = (a[SKIP:] for a in some)
        outer = lambda x: gram("thd,the->hde", x, x)
        grouped = lambda x: gram("thgd,thge->hde", x, x)
        query = grouped(q)
        weight = gram("thd,hde,the->th", k, query, k)
        weight = weight / weight.mean(0)
        spread = lambda x, name: ((token_scales(x) - centre[name]) ** 2).sum(0)
        return {
            "query_gram": query,
            "key_cov": outer(k - centre["key_mean"]),
            "key_cov_pre": outer(k - turning),
            "key_cov_pre_rope": outer(still_k),
            "query_gram_pre_rope": grouped(still_q),
            "value_cov": outer(v - centre["value_mean"]),
            "output_gram": grouped(out),
            "value_proxy": gram("th,thd,the->hde", weight, v, v),
            "key_bucket_var": bucket_sums((apart**2).sum(-1), edges),
            "key_scales": spread(k, "key_scales"),
            "value_scales": spread(v, "value_scales"),
        }

    return sum_pass(params, config, tokens, layer_sums, centres)


def _out_gram(params: Params, config: ModelConfig) -> np.ndarray:
    """`[l, h, d, d]`: `sum_g W_O,g W_O,g^T` with `W_O,g: [d, D]`."""
    shape = (config.kv_heads, config.q_per_kv, config.head_dim)
    parts = []
    for layers in params.runs:
        wo = np.asarray(layers.wo, np.float64).reshape(layers.wo.shape[0], *shape, -1)
        parts.append(np.einsum("lhgdw,lhgew->lhde", wo, wo, optimize=True))
    return np.concatenate(parts)


def layer_windows(config: ModelConfig) -> list[int | None]:
    """How far each layer sees, None for all."""
    return [run.window for run in layer_runs(config) for _ in range(run.length)]


def check_windows(windows: Sequence[np.ndarray], least: int, multiple: int = 1) -> None:
    """Raises `InputError` unless there are windows of more than `least` tokens, and a multiple."""
    length = len(windows[0]) if len(windows) else 0
    if length <= least or length % multiple:
        raise InputError(
            "calibration text",
            got=f"{len(windows)} windows of {length} tokens",
            expected=f"at least one of more than {least}"
            + (f", a multiple of {multiple}" if multiple > 1 else ""),
            fix="give a longer text, or another length",
        )


def check_sums(sums: dict[str, np.ndarray]) -> None:
    """Raises `InputError` that names the first layer with a NaN or an infinity."""
    bad = {name: ~np.isfinite(a).reshape(len(a), -1).all(-1) for name, a in sums.items()}
    first = {name: int(layers.argmax()) for name, layers in bad.items() if layers.any()}
    if first:
        name = min(first, key=lambda name: first[name])
        raise InputError(
            f"layer {first[name]}",
            got=f"NaN or infinity in {name}",
            expected="finite activations",
            fix="check the weights, or use a wider dtype",
        )
