"""Plain causal attention for the decoder, without a cache, and a way to look at keys and values."""

from __future__ import annotations

from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

from kvjax.models.config import ModelConfig, Run, layer_runs
from kvjax.models.decoder import Attend, Params, decode_layers, logits

_QUERY_BLOCK = 512  # queries at a time, so that probabilities take [b, h, g, 512, t] at most


def causal_attend(
    runs: Sequence[Run], positions: jax.Array, lengths: jax.Array | None = None
) -> Attend:
    """Exact attention of all tokens to all before them; caches pass through untouched.

    Query i sees key j when `0 <= positions[i] - positions[j] < window` of its run and
    `j < lengths`. A query that sees nothing gives zeros. Softmax is in float32.

    Args:
      runs: the runs that `decode_layers` goes through: windows come from there.
      positions: int32 [b, t].
      lengths: int32 [b], tokens of each sequence that are real; default all.

    Returns:
      An `attend` for `decode_layers`.
    """
    real = None if lengths is None else jnp.arange(positions.shape[1]) < lengths[:, None]  # [b, t]

    def attend(run, layer, cache, q, k, v, extra):
        del layer, extra

        def block(q, at):  # q [b, s, h, g, d], at [b, s]
            visible = _visible(at, positions, real, runs[run].window)  # [b, s, t]
            scores = jnp.einsum("bshgd,bthd->bhgst", q, k, preferred_element_type=jnp.float32)
            weights = masked_softmax(scores, visible[:, None, None])
            return jnp.einsum("bhgst,bthd->bshgd", weights.astype(v.dtype), v)

        return _by_query_blocks(block, q, positions), cache

    return attend


def _visible(at, positions, real, window):
    """Which keys each query sees: at [b, s], positions [b, t] -> bool [b, s, t]."""
    distance = at[:, :, None] - positions[:, None, :]  # [b, s, t]
    visible = distance >= 0
    if window is not None:
        visible &= distance < window
    return visible if real is None else visible & real[:, None, :]


def masked_softmax(scores: jax.Array, visible: jax.Array) -> jax.Array:
    """Softmax over the last axis among what is visible; zeros where nothing is."""
    scores = jnp.where(visible, scores, -jnp.inf)
    peak = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - jnp.where(jnp.isfinite(peak), peak, 0.0))
    return weights / jnp.maximum(jnp.sum(weights, axis=-1, keepdims=True), 1e-30)


def _by_query_blocks(block, q, positions):
    """`block` over at most `_QUERY_BLOCK` queries at a time; q [b, t, h, g, d] -> the same."""
    b, t = positions.shape
    if t <= _QUERY_BLOCK:
        return block(q, positions)
    n = -(-t // _QUERY_BLOCK)
    pad = n * _QUERY_BLOCK - t

    def split(x):  # [b, t, ...] -> [n, b, s, ...]
        x = jnp.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(b, n, _QUERY_BLOCK, *x.shape[2:]), 1, 0)

    out = lax.map(lambda args: block(*args), (split(q), split(positions)))
    return jnp.moveaxis(out, 0, 1).reshape(b, -1, *q.shape[2:])[:, :t]


def forward(
    params: Params,
    config: ModelConfig,
    tokens: jax.Array,
    *,
    lengths: jax.Array | None = None,
    last: int | None = None,
) -> jax.Array:
    """Logits of a whole prompt with exact attention and no cache.

    Layers that borrow (`config.layer_map`) attend to their owner's keys and values here too.

    Args:
      params: weights, stacked by `layer_runs(config)`.
      config: the model.
      tokens: int32 [b, t].
      lengths: int32 [b], real tokens of each sequence; default all.
      last: only the logits of the last so many positions.

    Returns:
      float32 [b, t, V] (or [b, last, V]).
    """
    runs = layer_runs(config)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    attend = causal_attend(runs, positions, lengths)
    hidden, _, _ = decode_layers(params, config, tokens, positions, attend, (None,) * len(runs))
    return logits(params, config, hidden if last is None else hidden[:, -last:])


@flax.struct.dataclass
class Record:
    """Keys (after RoPE) and values that passed through the layers of one run."""

    key: jax.Array  # [l, b, h, t, d]
    value: jax.Array  # [l, b, h, t, d]


def recording(attend: Attend) -> Attend:
    """`attend` that also writes what it is given: its caches are pairs (inner cache, `Record`)."""

    def record(run, layer, cache, q, k, v, extra):
        inner, seen = cache
        out, inner = attend(run, layer, inner, q, k, v, extra)
        k, v = jnp.moveaxis(k, 1, 2), jnp.moveaxis(v, 1, 2)  # [b, h, t, d]
        seen = Record(seen.key.at[layer].set(k), seen.value.at[layer].set(v))
        return out, (inner, seen)

    return record


def empty_records(
    config: ModelConfig, runs: Sequence[Run], batch: int, tokens: int, dtype=jnp.float32
) -> tuple[Record, ...]:
    """One zero `Record` per run, for the caches of `recording`."""
    shape = (batch, config.kv_heads, tokens, config.head_dim)
    zeros = [jnp.zeros((run.length, *shape), dtype) for run in runs]
    return tuple(Record(z, z) for z in zeros)


def keys_and_values(
    params: Params, config: ModelConfig, tokens: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One exact pass that keeps the keys (after RoPE) and values that every layer reads.

    Args:
      tokens: int32 [b, t].

    Returns:
      hidden [b, t, D] after the final norm, keys and values [l, b, h, t, d] over all layers.
    """
    runs = layer_runs(config)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    b, t = tokens.shape
    records = empty_records(config, runs, b, t, params.embed.dtype)
    attend = recording(causal_attend(runs, positions))
    caches = tuple((None, record) for record in records)
    hidden, caches, _ = decode_layers(params, config, tokens, positions, attend, caches)
    keys = jnp.concatenate([record.key for _, record in caches])
    values = jnp.concatenate([record.value for _, record in caches])
    return hidden, keys, values
