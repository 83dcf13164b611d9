"""The error that a method puts into attention logits, per layer and KV head, on held-out tokens."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.calibrate.moments import SKIP
from kvjax.core.codec import Codec
from kvjax.core.errors import InputError
from kvjax.core.method import Method
from kvjax.generate.plan import check_finite
from kvjax.models.causal import causal_attend
from kvjax.models.config import ModelConfig, layer_runs
from kvjax.models.decoder import Params, decode_layers, rope_frequencies

Array = jax.Array
Progress = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Exact keys of some windows of text, and moments of the same tokens as `Moments` has them.

    Attributes:
      keys: per window `[l, h, t, d]`, after RoPE, from position 4 on, in the model's dtype.
      query_gram, key_mean, key_cov, key_cov_pre: see `kvjax.calibrate.moments.Moments`.
    """

    keys: tuple[np.ndarray, ...]
    query_gram: np.ndarray
    key_mean: np.ndarray
    key_cov: np.ndarray
    key_cov_pre: np.ndarray


def held_out(
    params: Params,
    config: ModelConfig,
    windows: Sequence[np.ndarray],
    progress: Progress = lambda message: None,
) -> HeldOut:
    """One exact pass over each window.

    Args:
      windows: `[t]` int32 each.
    Raises:
      InputError: no windows, too short ones, or NaN in a layer, named.
    """
    if not len(windows) or min(map(len, windows)) <= SKIP:
        raise InputError(
            "text",
            got=f"{len(windows)} windows",
            expected=f"at least one of more than {SKIP} tokens",
            fix="give a longer text",
        )
    keys, gram, count = [], np.zeros(()), 0
    for i, tokens in enumerate(windows):
        progress(f"exact keys, window {i + 1} of {len(windows)}")
        seen, sums, finite = jax.device_get(_record(params, config, jnp.asarray(tokens, jnp.int32)))
        check_finite(finite)
        keys.append(seen)
        gram = gram + sums.astype(np.float64)
        count += seen.shape[2]
    runs = layer_runs(config)
    frequencies = [
        rope_frequencies(run, config.head_dim) for run in runs for _ in range(run.length)
    ]
    return HeldOut(tuple(keys), gram / (count * config.q_per_kv), *_key_moments(keys, frequencies))


@functools.partial(jax.jit, static_argnums=1)
def _record(params: Params, config: ModelConfig, tokens: Array) -> tuple[Array, Array, Array]:
    """Keys `[l, h, t, d]`, `sum q q^T [l, h, d, d]`, both past the sinks, and `finite [l, 2]`."""
    runs, t = layer_runs(config), tokens.shape[0]
    positions = jnp.arange(t)[None]
    exact = causal_attend(runs, positions)

    def attend(run, layer, cache, q, k, v, extra):
        out, _ = exact(run, layer, None, q, k, v, extra)
        q = q[0, SKIP:].astype(jnp.float32)
        gram = jnp.einsum("thgd,thge->hde", q, q, precision=jax.lax.Precision.HIGHEST)
        new = k[0, SKIP:].swapaxes(0, 1), gram
        return out, jax.tree.map(lambda a, b: a.at[layer].set(b), cache, new)

    h, d = config.kv_heads, config.head_dim
    blank = lambda run: (
        jnp.zeros((run.length, h, t - SKIP, d), params.embed.dtype),
        jnp.zeros((run.length, h, d, d)),
    )
    caches = [blank(run) for run in runs]
    _, seen, finite = decode_layers(params, config, tokens[None], positions, attend, caches)
    keys, gram = jax.tree.map(lambda *a: jnp.concatenate(a), *seen)
    return keys, gram, finite


def _key_moments(keys: Sequence[np.ndarray], frequencies: Sequence[np.ndarray]):
    """key_mean, key_cov and key_cov_pre of all windows, float64, layer by layer."""
    found = []
    for layer, frequency in enumerate(frequencies):
        x = np.concatenate([k[layer] for k in keys], 1).astype(np.float64)  # [h, n, d]
        angles = np.concatenate([SKIP + np.arange(k.shape[2]) for k in keys])[:, None] * frequency
        turning = _turned(_turned(x, -angles).mean(1, keepdims=True), angles)
        gram = lambda x: x.swapaxes(-1, -2) @ x / x.shape[1]
        mean = x.mean(1)
        found.append((mean, gram(x - mean[:, None]), gram(x - turning)))
    return (np.stack(a) for a in zip(*found, strict=True))


def _turned(x: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """RoPE in float64: x `[h, n, d]`, angles `[n, d/2]`."""
    first, second = np.split(x, 2, -1)
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


def logit_error_db(methods: Method | Sequence[Method], held: HeldOut) -> np.ndarray:
    """`[l, h]`: logit error over logit variance, in dB.

        10 log10( tr(S_q Cov_e) / tr(S_q Cov_k) ),   e = k_hat - k

    with S_q the second moment of the held-out queries of a KV head and both covariances over the
    held-out tokens: what errors have in common shifts all logits alike, and softmax does not see
    it. Every token from position 4 on is packed, in pages of the method's layout at its position;
    the last page is filled up with its last token.

    Args:
      methods: one for all layers, or one per layer; those of equal structure compile once.
    Raises:
      InputError: another number of methods than layers.
    """
    layers, heads, d = held.query_gram.shape[:3]
    methods = (methods,) * layers if isinstance(methods, Method) else tuple(methods)
    if len(methods) != layers:
        raise InputError(
            "methods",
            got=f"{len(methods)} of them",
            expected=f"one for each of the {layers} layers",
            fix="give one method for all, or a tuple with one per layer",
        )
    ratios = np.empty((layers, heads))
    for layer, method in enumerate(methods):
        total, gram, count = np.zeros((heads, d)), np.zeros((heads, d, d)), 0
        for keys in held.keys:
            sums = jax.device_get(_error_sums(method.key, keys[layer], method.layout.page))
            total, gram = total + sums[0], gram + sums[1]  # float32 to float64
            count += keys.shape[2]
        mean = total / count
        cov = gram / count - mean[:, :, None] * mean[:, None]
        metric, signal = held.query_gram[layer], held.key_cov[layer]
        ratios[layer] = (metric * cov).sum((1, 2)) / (metric * signal).sum((1, 2))
    return 10 * np.log10(np.maximum(ratios, 1e-30))


@functools.partial(jax.jit, static_argnames="page")
def _error_sums(codec: Codec, keys: Array, page: int) -> tuple[Array, Array]:
    """keys `[h, t, d]` -> sums over tokens of e and of e e^T, `[h, d]` and `[h, d, d]`."""
    h, t, d = keys.shape
    padded = jnp.pad(keys.astype(jnp.float32), ((0, 0), (0, -t % page), (0, 0)), mode="edge")
    positions = SKIP + jnp.arange(padded.shape[1]).reshape(1, 1, -1, page)
    code = codec.encode(padded.reshape(1, h, -1, page, d), positions)
    error = (codec.decode(code).reshape(padded.shape) - padded)[:, :t]
    gram = jnp.einsum("htd,hte->hde", error, error, precision=jax.lax.Precision.HIGHEST)
    return error.sum(1), gram
