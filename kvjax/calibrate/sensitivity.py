"""What errors in keys and values cost in the model's predictions: Fisher information per head."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.calibrate.moments import Moments, check_sums, check_windows
from kvjax.core.layout import Layout
from kvjax.core.rng import fold
from kvjax.models.causal import masked_softmax
from kvjax.models.config import ModelConfig, layer_runs
from kvjax.models.decoder import Params, apply_rope, decode_layers, logits, rope_angles

Array = jax.Array

PREDICTIONS = 128  # at a time, so that their logits take [128, V]


def measure_sensitivity(
    params: Params,
    config: ModelConfig,
    windows: Sequence[np.ndarray],
    moments: Moments,
    *,
    rng: Array,
    layout: Layout | None = None,
    progress: Callable[[str], None] = lambda message: None,
) -> Moments:
    """One pass forward and back per window.

        KL per predicted token  ~  1/2 sum_lh trace(key_lh E_lh),   E_lh = mean of e e^T

    for errors e of zero mean that do not depend on each other from token to token, and whose
    length follows that of what is coded. With y ~ softmax(logits) a token drawn from the model's
    own predictions, G_t the gradient of `sum log p(y)` with respect to the key (or value) of token
    t, and r_t its squared length over the mean one,

        key = mean over tokens of r_t G_t G_t^T.

    Drawn labels make products of different predictions vanish on average, so one backward pass per
    window does for all of them. Only queries count that read the token packed: those `recent` or
    more after it, and sinks never. That softmax does not see what is common to all keys, how much
    a token is looked at, what its value differs, and what later layers make of it is all in G.

    Args:
      windows: `[t]` int32 each, all of one length, a multiple of 128.
      moments: of the same model; lengths of keys are counted in their covariance.
      rng: for the labels. layout: which tokens are exact, by default sink 4 and recent 64.
    Returns:
      The moments with `key_fisher`, `key_fisher_pre_rope` and `value_fisher`, `[l, h, d, d]`.
    Raises:
      InputError: no windows, too short or odd ones, or NaN in a layer, named.

    Source: empirical Fisher information of cache entries as a metric for their codes is ours; as
    weights of single values see KVQuant (arXiv 2401.18079).
    """
    layout = layout or Layout(sink=4, recent=64, page=64)
    check_windows(windows, layout.sink + layout.recent, multiple=PREDICTIONS)
    d = config.head_dim
    ridge = 1e-4 * np.trace(moments.key_cov_pre, axis1=-2, axis2=-1)[..., None, None] / d
    single = lambda a: jnp.asarray(a, jnp.float32)
    known = (
        single(np.linalg.inv(moments.key_cov_pre + ridge * np.eye(d)) / d),
        single(moments.key_mean_pre),
        single(np.trace(moments.value_cov, axis1=-2, axis2=-1) + (moments.value_mean**2).sum(-1)),
    )
    total: dict[str, np.ndarray] = {}
    for i, tokens in enumerate(windows):
        progress(f"gradients, window {i + 1} of {len(windows)}")
        drawn = fold(rng, "labels", i)
        sums = _window(params, config, layout, jnp.asarray(tokens, jnp.int32), known, drawn)
        for name, a in jax.device_get(sums).items():
            total[name] = total.get(name, 0.0) + np.asarray(a, np.float64) / len(windows)
    check_sums(total)
    return dataclasses.replace(
        moments,
        key_fisher=total["key_fisher"],
        key_fisher_pre_rope=total["key_fisher_pre_rope"],
        value_fisher=total["value_fisher"],
    )


@functools.partial(jax.jit, static_argnums=(1, 2))
def _window(params: Params, config: ModelConfig, layout: Layout, tokens: Array, known, rng: Array):
    """The three metrics, `[l, h, d, d]`, of one window."""
    t, h, d = tokens.shape[0], config.kv_heads, config.head_dim

    def turned(run, x, sign):
        cos, sin = rope_angles(run, d, jnp.arange(t))  # [t, d/2]
        return apply_rope(x, cos[:, None], sign * sin[:, None])

    def squared_lengths(run, k, v, known):
        key_metric, key_mean, value_size = known
        rest = k - turned(run, jnp.broadcast_to(key_mean, (t, h, d)), 1)
        key_length = jnp.einsum("thd,hde,the->th", rest, key_metric, rest)
        return jnp.stack([key_length, (v**2).sum(-1) / value_size])  # [2, t, h]

    gradients, lengths = error_gradients(
        params, config, layout, tokens, rng, squared_lengths, known
    )
    gram = functools.partial(jnp.einsum, "lth,lthd,lthe->lhde", precision="highest")
    key, value = gradients
    runs = [run for run in layer_runs(config) for _ in range(run.length)]
    before = jnp.stack([turned(run, g, -1) for run, g in zip(runs, key, strict=True)])
    return {
        "key_fisher": gram(lengths[:, 0] / t, key, key),
        "key_fisher_pre_rope": gram(lengths[:, 0] / t, before, before),
        "value_fisher": gram(lengths[:, 1] / t, value, value),
    }


def error_gradients(
    params: Params,
    config: ModelConfig,
    layout: Layout,
    tokens: Array,
    rng: Array,
    record: Callable[..., Array],
    known: Any = None,
) -> tuple[tuple[Array, Array], Array]:
    """How the log-likelihood of drawn labels moves with errors of packed keys and values.

    Args:
      layout: errors count for queries that read a token packed: those `recent` or more after it,
        and sinks never.
      tokens: `[t]`, t a multiple of `PREDICTIONS`.
      record: `(run, k, v, known)`, with k and v `[t, h, d]` float32 of a layer, k after RoPE, to
        what is kept of it; `known` is its slice of arrays that lead with `[l]`.
    Returns:
      Gradients of keys and values, `[l, t, h, d]` each, and what was recorded, `[l, ...]`.
    """
    t, h, d = tokens.shape[0], config.kv_heads, config.head_dim
    runs = layer_runs(config)
    positions = jnp.arange(t)
    distance = positions[:, None] - positions

    @functools.partial(jax.checkpoint, static_argnums=0)
    def attention(window, q, k, v, k_error, v_error):
        seen = (distance >= 0) & (distance < window if window else True)
        packed = (distance >= layout.recent) & (positions >= layout.sink)  # [t, t]
        scores = jnp.einsum("shgd,thd->hgst", q, k)
        scores += packed * jnp.einsum("shgd,thd->hgst", q, k_error)
        p = masked_softmax(scores, seen)
        out = jnp.einsum("hgst,thd->shgd", p, v)
        return out + jnp.einsum("hgst,thd->shgd", p * packed, v_error)

    def attend(run, layer, cache, q, k, v, extra):
        errors, own = extra
        wide = [a[0].astype(jnp.float32) for a in (q, k, v)]
        kept = record(runs[run], *wide[1:], own)
        cache = cache.at[layer].set(jax.lax.stop_gradient(kept))
        return attention(runs[run].window, *wide, *errors)[None], cache

    vector = jax.ShapeDtypeStruct((t, h, d), jnp.float32)
    first = jax.tree.map(lambda a: a[0], known)
    kept = jax.eval_shape(functools.partial(record, runs[0]), vector, vector, first)

    def log_likelihood(errors):
        xs = [jax.tree.map(lambda a, r=r: a[r.start : r.stop], (errors, known)) for r in runs]
        blank = [jnp.zeros((run.length, *kept.shape)) for run in runs]
        hidden, recorded, _ = decode_layers(
            params, config, tokens[None], positions[None], attend, blank, xs=xs
        )
        return drawn_log_likelihood(params, config, hidden[0], rng), jnp.concatenate(recorded)

    nothing = jnp.zeros((config.layers, t, h, d))
    return jax.grad(log_likelihood, has_aux=True)((nothing, nothing))


def drawn_log_likelihood(params: Params, config: ModelConfig, hidden: Array, rng: Array) -> Array:
    """The log-likelihood of one token per position, drawn from the predictions themselves."""

    @jax.checkpoint
    def some(inputs):
        hidden, rng = inputs
        scores = jax.nn.log_softmax(logits(params, config, hidden))  # [128, V]
        label = jax.random.categorical(rng, jax.lax.stop_gradient(scores))
        return jnp.take_along_axis(scores, label[:, None], 1).sum()

    blocks = hidden.reshape(-1, PREDICTIONS, hidden.shape[-1])
    return jax.lax.map(some, (blocks, jax.random.split(rng, len(blocks)))).sum()
