"""What a selection loses: attention mass that it misses, and how far the model moves."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.core.codec import Array
from kvjax.core.errors import InputError
from kvjax.core.pytree import pytree
from kvjax.models.causal import causal_attend
from kvjax.models.config import ModelConfig, layer_runs
from kvjax.models.decoder import Params, logits
from kvjax.select.choose import choose_tokens
from kvjax.select.choosers import Choice, Chooser, attention_weights, by_attention
from kvjax.select.indexer import Indexer, index_keys, index_queries, index_scores
from kvjax.select.layers import layers_with_input
from kvjax.select.observe import Observed
from kvjax.select.share import DENSE, FULL, kinds_of, seeing_all

QUERIES = 256  # at a time: their logits take [h, g, 256, t]
PREDICTIONS = 128  # at a time: their logits take [128, V]


@pytree
class History:
    """What the layers of each run have of a text read with exact attention.

    Attributes:
      x: `[l, t, D]` normed inputs. key, value: `[l, t, h, d]`, keys after RoPE.
    """

    x: Array
    key: Array
    value: Array


@pytree
class Restricted:
    """Stretches of text whose attention reads what was chosen alone.

    Attributes:
      hidden: `[b, n, D]` after the final norm.
      recall: `[l, b, n]`, of the layers that see everything: share of the attention that a query
        would pay to all tokens that falls on those it reads, mean over heads.
    """

    hidden: Array
    recall: Array


@functools.partial(jax.jit, static_argnames="config")
def read_exactly(params: Params, config: ModelConfig, tokens: Array) -> tuple[History, ...]:
    """The model over `tokens: [t]` with exact attention: a history per run of layers."""
    exact = causal_attend(layer_runs(config), jnp.arange(tokens.shape[0])[None])

    def attend(run, state, x, q, k, v, extra):
        out, _ = exact(run, 0, None, q, k, v, None)
        return out, state, History(x[0], k[0], v[0])

    return layers_with_input(params, config, tokens[None], attend)[2]


def restricted_pass(
    params: Params,
    config: ModelConfig,
    tokens: np.ndarray,
    *,
    chooser: Chooser | None,
    choice: Choice,
    own: Any = None,
    pattern: str | None = None,
    history: tuple[History, ...] | None = None,
    starts: Sequence[int] = (0,),
) -> Restricted:
    """The model over stretches of a text, each query reading only what is chosen for it.

    Without a history the one stretch is the whole text, and layers build on what restricted ones
    made. With the exact history of the text the stretches `tokens[start : start + n]` follow exact
    keys and values, as decoding does after an exact prefill; each sees its own restricted ones too.
    Layers with a sliding window stay as they are; no value is quantized.

    Args:
      tokens: `[t]`, or with a history `[b, n]` that begin at `starts` of it.
      chooser: see `choosers`; None reads everything.
      own: what it needs of each layer that sees everything, leaves `[l, ...]`: the indexers.
      pattern: of the layers that see everything, see `share`; None chooses anew in all of them.
    Raises:
      InputError: a pattern that does not fit; lengths that blocks do not divide; stretches that are
        not of the text.
    """
    layers = len(seeing_all(config))
    if chooser is None:
        pattern, chooser = "D" * layers, by_attention
    kinds = kinds_of("F" * layers if pattern is None else pattern, config)
    stretches = jnp.atleast_2d(jnp.asarray(tokens, jnp.int32))
    n = stretches.shape[1]
    t = n if history is None else _length(history)
    if n == 0 or n % min(QUERIES, n) or t % (choice.page or 1):
        raise InputError(
            "tokens",
            got=f"{n} tokens",
            expected=f"at most {QUERIES} or a multiple, and whole pages",
            fix="cut the text",
        )
    if len(starts) != len(stretches) or min(starts) < 0 or max(starts) + n > t:
        raise InputError(
            "starts",
            got=f"{tuple(starts)} for {len(stretches)} stretches of {n} tokens",
            expected=f"one for each, within the {t} tokens of the text",
            fix="begin them earlier, or read a longer history",
        )
    at = jnp.asarray(starts, jnp.int32)
    return _restricted(params, config, stretches, at, history, kinds, own, chooser, choice)


def _length(history: tuple[History, ...]) -> int:
    return history[0].x.shape[1]


@functools.partial(jax.jit, static_argnames=("config", "chooser", "choice"))
def _restricted(params, config, tokens, starts, history, kinds, own, chooser, choice):
    runs = layer_runs(config)
    b, n = tokens.shape
    t = n if history is None else _length(history)
    step = min(QUERIES, n)
    cut = lambda a: a.reshape(a.shape[0] // step, step, *a.shape[1:])  # blocks of queries

    def attend(run, masks, x, q, k, v, extra):
        (kind, mine), past = extra
        window = runs[run].window

        def stretch(inputs):
            start, mask, x, q, k, v = inputs
            queries = tuple(map(cut, (x, q, start + jnp.arange(n))))
            if past is not None:
                put = jax.lax.dynamic_update_slice_in_dim
                x, k, v = (put(a, new, start, 0) for a, new in zip(past, (x, k, v), strict=True))
            if window is None:

                def anew():
                    rows = chooser(x.astype(jnp.float32), k, mine, choice)
                    return jax.lax.map(lambda block: rows(*block), queries)

                mask = jax.lax.cond(kind == FULL, anew, lambda: mask)

            def read(block):
                seen, (_, q, at) = block
                weights = attention_weights(q, k, at, window)  # [h, g, s, t]
                if window is None:
                    weights = jnp.where(seen[:, None] | (kind == DENSE), weights, 0.0)
                mass = weights.sum(-1, keepdims=True)
                out = jnp.einsum("hgst,thd->shgd", (weights / mass).astype(v.dtype), v)
                return out, mass.mean((0, 1))[:, 0]

            out, recall = jax.lax.map(read, (mask, queries))
            return mask, out.reshape(q.shape), recall.reshape(-1)

        masks, out, recall = jax.lax.map(stretch, (starts, masks, x, q, k, v))
        return out, masks, recall

    choices = config.kv_heads if choice.by_head else 1
    masks = jnp.zeros((b, n // step, choices, step, t), bool)
    pasts = [None] * len(runs) if history is None else [(h.x, h.key, h.value) for h in history]
    xs = list(zip(_by_run(config, (kinds, own)), pasts, strict=True))
    positions = starts[:, None] + jnp.arange(n)
    hidden, _, seen = layers_with_input(
        params, config, tokens, attend, state=masks, xs=xs, positions=positions
    )
    recall = [s for s, run in zip(seen, runs, strict=True) if run.window is None]
    return Restricted(hidden, jnp.concatenate(recall))


def _by_run(config: ModelConfig, stacked: Any) -> list[Any]:
    """Leaves `[l, ...]` over the layers that see everything, split by run; Nones for local runs."""
    parts: list[Any] = []
    first = 0
    for run in layer_runs(config):
        if run.window is not None:
            parts.append((None, None))
            continue
        parts.append(jax.tree.map(lambda a, i=first, n=run.length: a[i : i + n], stacked))
        first += run.length
    return parts


@functools.partial(jax.jit, static_argnames="config")
def _kl(params, config, full, ours) -> Array:
    def one(pair):
        p, q = (jax.nn.log_softmax(logits(params, config, h)) for h in pair)
        return (jnp.exp(p) * (p - q)).sum()

    return jax.lax.map(one, (full, ours), batch_size=min(PREDICTIONS, len(full)))


def next_token_kl(params: Params, config: ModelConfig, full: Array, ours: Array) -> np.ndarray:
    """KL(full || ours) of the next token in nats, `[n]`, from hidden states `[n, D]`."""
    return np.asarray(_kl(params, config, full, ours))


def summary(recall: Array, kl: np.ndarray) -> dict[str, Any]:
    """Mean recall over layers and positions, and of each layer; mean KL and its standard error, as
    if positions were independent.

    Args:
      recall: `[l, n]`. kl: `[n]`.
    """
    layers = np.asarray(recall, np.float64).mean(-1)
    return {
        "recall": float(layers.mean()),
        "recall_layers": layers.round(4).tolist(),
        "kl": float(kl.mean()),
        "kl_error": float(kl.std() / len(kl) ** 0.5),
    }


@functools.partial(jax.jit, static_argnames="choice")
def recall_matrix(indexers: Indexer, observed: Observed, choice: Choice) -> Array:
    """`[l, m]`: mass that layer l recalls with what the indexer of layer m chooses, mean over rows.

    What a search of patterns needs: measured once, the rest is arithmetic.

    Args:
      indexers: of all layers of `observed`.
    """
    rows = observed.rows

    def chosen_by(inputs):
        own, x = inputs
        x = x.astype(jnp.float32)
        keys = index_keys(own, x, jnp.arange(x.shape[0]))
        scores = index_scores(*index_queries(own, x[rows], rows), keys)
        chosen = choose_tokens(scores, rows, choice.k, sink=choice.sink, recent=choice.recent)

        def recalled(mass):  # [n, t]
            found = jnp.take_along_axis(mass, jnp.maximum(chosen, 0), -1)
            return jnp.where(chosen >= 0, found, 0).astype(jnp.float32).sum(-1).mean()

        return jax.lax.map(recalled, observed.mass)

    return jax.lax.map(chosen_by, (indexers, observed.x)).T
