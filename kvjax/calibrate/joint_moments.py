"""Second moments of all KV heads of a layer together, before RoPE, and what its weights matter."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.calibrate.moments import SKIP, check_sums, check_windows, sum_pass
from kvjax.core.errors import InputError
from kvjax.models.causal import causal_attend
from kvjax.models.config import ModelConfig, layer_runs
from kvjax.models.decoder import Params, decode_layers, logits, rope_frequencies

Array = jax.Array

PREDICTIONS = 128  # at a time, so that their logits take [128, V]


@dataclasses.dataclass(frozen=True)
class JointMoments:
    """Statistics of calibration tokens, float64 on the host; l layers, w = h d channels of all KV
    heads of a layer, one head after the other.

    Over the tokens from position 4 of each window on, about 0, not about a mean.

    Attributes:
      tokens: how many were seen. heads: h.
      key: `[l, w, w]`, mean of `k k^T` of the keys before RoPE (after a norm, where there is one).
      value: `[l, w, w]`, of the values.
      query: `[l, w, w]`, sum over the g queries of a KV head of `q q^T`, before RoPE and without
        the attention scale: query j of every head is one vector.
      key_mean, value_mean: `[l, w]`.
      frequencies: `[l, d / 2]`, radians per position.
      fisher: `[l, 2]`, what the weights of keys and of values matter, from `weight_fisher`, or
        None.
    """

    tokens: int
    heads: int
    key: np.ndarray
    value: np.ndarray
    query: np.ndarray
    key_mean: np.ndarray
    value_mean: np.ndarray
    frequencies: np.ndarray
    fisher: np.ndarray | None = None

    @property
    def head_dim(self) -> int:
        return self.key.shape[-1] // self.heads


def measure_joint(
    params: Params,
    config: ModelConfig,
    windows: Sequence[np.ndarray],
    progress: Callable[[str], None] = lambda message: None,
) -> JointMoments:
    """One exact pass over the windows; memory is that of one window and the sums.

    Args:
      windows: `[t]` int32 each, all of one length.
    Raises:
      InputError: no windows, too short ones, a model with latent attention, or NaN in a layer,
        named.
    """
    if config.latent is not None:
        raise InputError(
            f"model {config.name}",
            got="latent attention, whose values are a part of its keys",
            expected="a model with keys and values",
            fix="fit what it was converted from, or use a recipe for the latent",
        )
    check_windows(windows, SKIP)
    counted = len(windows) * (len(windows[0]) - SKIP)
    total: dict[str, np.ndarray] = {}
    for i, tokens in enumerate(windows):
        progress(f"joint moments, window {i + 1} of {len(windows)}")
        sums = jax.device_get(_window(params, config, jnp.asarray(tokens, jnp.int32)))
        for name, a in sums.items():
            total[name] = total.get(name, 0.0) + np.asarray(a, np.float64) / counted
    check_sums(total)
    runs = layer_runs(config)
    per_run = [rope_frequencies(run, config.head_dim) for run in runs]
    frequencies = np.repeat(per_run, [run.length for run in runs], axis=0).astype(np.float64)
    return JointMoments(counted, config.kv_heads, **total, frequencies=frequencies)


@functools.partial(jax.jit, static_argnums=1)
def _window(params: Params, config: ModelConfig, tokens: Array) -> dict[str, Array]:
    t, h, g, d = tokens.shape[0], config.kv_heads, config.q_per_kv, config.head_dim

    def layer_sums(q, k, v, out, rope, extra):
        gram = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
        outer = lambda x: gram("tw,tv->wv", x, x)
        flat = lambda x: x.reshape(t, h * d)[SKIP:]
        q = rope(q.reshape(t, h * g, d), -1).reshape(t, h, g, d) / config.attention_scale
        q = q.swapaxes(1, 2).reshape(t, g, h * d)[SKIP:]
        k, v = flat(rope(k, -1)), flat(v)
        return {
            "key": outer(k),
            "value": outer(v),
            "query": gram("tgw,tgv->wv", q, q),
            "key_mean": k.sum(0),
            "value_mean": v.sum(0),
        }

    return sum_pass(params, config, tokens, layer_sums)


def weight_fisher(
    params: Params,
    config: ModelConfig,
    windows: Sequence[np.ndarray],
    progress: Callable[[str], None] = lambda message: None,
) -> np.ndarray:
    """What the weights of keys and of values of each layer matter, `[l, 2]`.

        F_W = mean over the entries of W of sqrt(mean over windows of (dL / dW)^2)

    with L the mean negative log-likelihood of a window. One pass forward and back per window.

    Args:
      windows: `[t]` int32 each, all of one length, a multiple of 128.
    Raises:
      InputError: no windows, too short or odd ones, or gradients that are not finite.

    Source: Palu's rank search, arXiv 2407.21118.
    """
    check_windows(windows, 1, multiple=PREDICTIONS)
    total: list[np.ndarray] = []
    for i, tokens in enumerate(windows):
        progress(f"gradients, window {i + 1} of {len(windows)}")
        found = jax.device_get(_squared_gradients(params, config, jnp.asarray(tokens, jnp.int32)))
        found = [np.asarray(a, np.float64) / len(windows) for a in found]
        total = found if not total else [a + b for a, b in zip(total, found, strict=True)]
    fisher = np.stack([np.sqrt(a).mean((1, 2)) for a in total], -1)
    check_sums({"gradients": fisher})
    return fisher


@functools.partial(jax.jit, static_argnums=1)
def _squared_gradients(params: Params, config: ModelConfig, tokens: Array) -> tuple[Array, Array]:
    """Squared gradients of all W_K and all W_V, `[l, D, h d]` float32 each."""
    runs = layer_runs(config)
    positions = jnp.arange(tokens.shape[0])[None]
    attend = jax.checkpoint(causal_attend(runs, positions), static_argnums=0)

    @jax.checkpoint
    def some(pair):
        hidden, following = pair
        scores = jax.nn.log_softmax(logits(params, config, hidden))
        return -jnp.take_along_axis(scores, following[:, None], 1)[:, 0]

    def loss(weights):
        own = []
        for layers, (wk, wv) in zip(params.runs, weights, strict=True):
            dtype = layers.wk.dtype
            own.append(dataclasses.replace(layers, wk=wk.astype(dtype), wv=wv.astype(dtype)))
        changed = dataclasses.replace(params, runs=tuple(own))
        caches = (None,) * len(runs)
        hidden = decode_layers(changed, config, tokens[None], positions, attend, caches)[0][0]
        blocks = hidden.reshape(-1, PREDICTIONS, hidden.shape[-1])
        following = jnp.roll(tokens, -1).reshape(-1, PREDICTIONS)
        return jax.lax.map(some, (blocks, following)).reshape(-1)[:-1].mean()

    wide = lambda a: a.astype(jnp.float32)
    gradients = jax.grad(loss)([(wide(layers.wk), wide(layers.wv)) for layers in params.runs])
    key, value = (jnp.concatenate([pair[side] for pair in gradients]) for side in (0, 1))
    return key**2, value**2
