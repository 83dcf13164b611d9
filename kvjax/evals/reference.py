"""What the model does with its full cache: what compressed caches are measured against."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from kvjax.core.pytree import pytree
from kvjax.models.causal import causal_attend
from kvjax.models.config import ModelConfig, layer_runs
from kvjax.models.decoder import Params, decode_layers

Array = jax.Array

PROBES = 64  # queries per head at which attention is compared


@pytree
class Reference:
    """An exact pass over one window of tokens.

    Attributes:
      hidden: `[t, D]` after the final norm.
      key, value: per run of layers `[l, h, t, d]`, keys after RoPE.
      query: per run `[l, n, h, g, d]`, scaled, at the positions `probes`.
      probes: `[n]` int32.
      finite: bool `[layers, 2]`.
    """

    hidden: Array
    key: tuple[Array, ...]
    value: tuple[Array, ...]
    query: tuple[Array, ...]
    probes: Array
    finite: Array


@functools.partial(jax.jit, static_argnums=1)
def reference_pass(params: Params, config: ModelConfig, tokens: Array) -> Reference:
    """The model over `tokens: [t]` with exact causal attention in the parameters' dtype."""
    t = tokens.shape[0]
    runs = layer_runs(config)
    positions = jnp.arange(t)[None]
    probes = jnp.linspace(t // 4, t - 1, min(PROBES, t)).astype(jnp.int32)
    exact = causal_attend(runs, positions)

    def attend(run, layer, cache, q, k, v, extra):
        key, value, query = cache
        out, _ = exact(run, layer, None, q, k, v, extra)
        put = lambda a, new: a.at[layer].set(new.astype(a.dtype))
        seen = q[0, probes], k[0].swapaxes(0, 1), v[0].swapaxes(0, 1)
        return out, (put(key, seen[1]), put(value, seen[2]), put(query, seen[0]))

    h, g, d = config.kv_heads, config.q_per_kv, config.head_dim
    blank = lambda *shape: jnp.zeros(shape, jnp.float32)
    caches = tuple(
        (blank(r.length, h, t, d), blank(r.length, h, t, d), blank(r.length, len(probes), h, g, d))
        for r in runs
    )
    hidden, caches, finite = decode_layers(params, config, tokens[None], positions, attend, caches)
    key, value, query = zip(*caches, strict=True)
    return Reference(hidden[0], key, value, query, probes, finite)
