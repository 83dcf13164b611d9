"""What a model's queries look like before RoPE: mean and covariance per query head."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.calibrate.moments import SKIP, check_sums, check_windows
from kvjax.models.causal import causal_attend
from kvjax.models.config import ModelConfig, layer_runs
from kvjax.models.decoder import Params, apply_rope, decode_layers, rope_angles

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class QueryMoments:
    """Of queries with the attention scale, before RoPE; float64 on the host.

    Attributes:
      mean: `[l, h, g, d]`. cov: `[l, h, g, d, d]`, about it.
    """

    mean: np.ndarray
    cov: np.ndarray


def measure_queries(
    params: Params, config: ModelConfig, windows: Sequence[np.ndarray]
) -> QueryMoments:
    """One exact pass over windows of tokens, from position 4 of each on.

    Args:
      windows: `[t]` int32 each, all of one length.
    Raises:
      InputError: no windows, too short ones, or NaN in a layer, named.
    """
    check_windows(windows, SKIP)
    total: dict[str, np.ndarray] = {}
    for tokens in windows:
        for name, a in jax.device_get(_sums(params, config, jnp.asarray(tokens))).items():
            total[name] = total.get(name, 0.0) + np.asarray(a, np.float64)
    check_sums(total)
    counted = len(windows) * (len(windows[0]) - SKIP)
    mean = total["mean"] / counted
    outer = mean[..., :, None] * mean[..., None, :]
    return QueryMoments(mean, total["square"] / counted - outer)


@functools.partial(jax.jit, static_argnums=1)
def _sums(params: Params, config: ModelConfig, tokens: Array) -> dict[str, Array]:
    runs = layer_runs(config)
    positions = jnp.arange(tokens.shape[0])[None]
    exact = causal_attend(runs, positions)

    def attend(run, layer, cache, q, k, v, extra):
        out, _ = exact(run, layer, None, q, k, v, extra)
        cos, sin = (a[0, :, None, None] for a in rope_angles(runs[run], q.shape[-1], positions))
        before = apply_rope(q[0], cos, -sin)[SKIP:]  # [t, h, g, d]
        square = jnp.einsum("thgd,thge->hgde", before, before, precision="highest")
        sums = {"mean": before.sum(0), "square": square}
        return out, jax.tree.map(lambda a, new: a.at[layer].set(new), cache, sums)

    h, g, d = config.kv_heads, config.q_per_kv, config.head_dim
    blank = [
        {"mean": jnp.zeros((r.length, h, g, d)), "square": jnp.zeros((r.length, h, g, d, d))}
        for r in runs
    ]
    _, sums, _ = decode_layers(params, config, tokens[None], positions, attend, blank)
    return jax.tree.map(lambda *a: jnp.concatenate(a), *sums)
