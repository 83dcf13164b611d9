"""What indexers are trained on: the inputs of layers, and the attention that their heads pay."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.core.codec import Array
from kvjax.core.errors import InputError
from kvjax.core.pytree import pytree
from kvjax.models.causal import causal_attend, masked_softmax
from kvjax.models.config import ModelConfig, layer_runs
from kvjax.models.decoder import Params
from kvjax.select.layers import layers_with_input
from kvjax.select.share import seeing_all

QUERIES = 64  # at a time: their logits take [h, g, 64, t]


@pytree
class Observed:
    """One window of text, as the layers that see everything have it.

    Attributes:
      x: `[l, t, D]`, normed inputs. mass: `[l, n, t]`, attention that some queries pay, mean over
        heads: rows sum to 1. Both are float16.
      rows: `[n]` int32, positions of these queries.
    """

    x: Array
    mass: Array
    rows: Array


def draw_rows(t: int, count: int, *, first: int, seed: int = 0) -> np.ndarray:
    """Positions of queries, rising: `count` of those from `first` to t - 1, without repetition.

    Raises:
      InputError: more than there are.

    Example:
      >>> draw_rows(8, 3, first=5).tolist()
      [5, 6, 7]
    """
    if not 1 <= count <= t - first:
        raise InputError(
            "rows",
            got=count,
            expected=f"1 to the {t - first} positions from {first} on",
            fix="draw fewer, or use longer windows",
        )
    picked = np.random.default_rng(seed).choice(np.arange(first, t), count, replace=False)
    return np.sort(picked).astype(np.int32)


@functools.partial(jax.jit, static_argnames="config")
def observe(params: Params, config: ModelConfig, tokens: Array, rows: Array) -> Observed:
    """One exact pass over `tokens: [t]`, which keeps what indexers learn from.

    Args:
      rows: `[n]`, positions of the queries whose attention is kept.
    """
    t = tokens.shape[0]
    runs = layer_runs(config)
    exact = causal_attend(runs, jnp.arange(t)[None])

    def attend(run, state, x, q, k, v, extra):
        out, _ = exact(run, 0, None, q, k, v, None)
        if runs[run].window is not None:
            return out, state, None

        def mass(at):
            scores = jnp.einsum("hgd,thd->hgt", q[0, at], k[0], preferred_element_type=jnp.float32)
            return masked_softmax(scores, jnp.arange(t) <= at).mean((0, 1))

        kept = jax.lax.map(mass, rows, batch_size=min(QUERIES, len(rows)))
        return out, state, (x[0].astype(jnp.float16), kept.astype(jnp.float16))

    _, _, seen = layers_with_input(params, config, tokens[None], attend)
    x, mass = (jnp.concatenate(parts) for parts in zip(*(s for s in seen if s), strict=True))
    return Observed(x, mass, jnp.asarray(rows))


def observe_windows(
    params: Params,
    config: ModelConfig,
    windows: Sequence[np.ndarray],
    *,
    rows: int = 256,
    first: int = 256,
    seed: int = 0,
) -> list[Observed]:
    """`observe` of each window, with other rows in each; all windows of one length.

    On a CPU the arrays stay in its memory: `l t (2 D + 2 n)` bytes a window.

    Raises:
      InputError: a model whose layers all have a sliding window; windows that differ in length.
    """
    if not seeing_all(config):
        raise InputError(
            f"model {config.name}",
            got="sliding windows in all layers",
            expected="layers that see everything",
            fix="an indexer has nothing to choose here",
        )
    lengths = sorted({len(w) for w in windows})
    if len(lengths) != 1:
        raise InputError(
            "windows", got=f"lengths {lengths}", expected="one length", fix="cut them alike"
        )
    return [
        observe(
            params,
            config,
            jnp.asarray(tokens, jnp.int32),
            jnp.asarray(draw_rows(len(tokens), rows, first=first, seed=seed + i)),
        )
        for i, tokens in enumerate(windows)
    ]
