"""One decoder for Llama, Qwen 2, Qwen 3, Gemma 3 and MLA; attention and its cache are handed in.

The layers of a run (see `layer_runs`) go through one `jax.lax.scan`, and what a layer does with
its queries, keys and values is the caller's `attend`:

  `out, cache = attend(run, layer, cache, q, k, v, extra)`

with `run` the static index of the run, `layer` the traced int32 index within the run, q
`[b, t, h, g, d]` and k, v `[b, t, h, d]` after RoPE, out `[b, t, h, g, d]`. q is already multiplied
by the attention scale, so logits are plain `q . k`. `cache` holds all layers of the run and is
carried through the scan, so that its buffers can be updated in place.

A layer that borrows (`ModelConfig.layer_map`) makes no keys and values: its `attend` is given those
of its owner, also where there is no cache.

Letters: b batch, t tokens, l layers, h kv heads, g queries per kv head, d head dim, D model width,
F feed-forward width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from kvjax.core.errors import InputError
from kvjax.models import mla
from kvjax.models.config import ModelConfig, Run, layer_runs
from kvjax.models.layer_map import Lending, lending, lending_slots
from kvjax.models.primitives import apply_rope, rms_norm

Attend = Callable[..., tuple[jax.Array, Any]]
Reduce = Callable[[str, jax.Array], jax.Array]


@flax.struct.dataclass
class Layers:
    """Weights of one run of layers, every leaf stacked over its l layers.

    Matrices are [in, out], so that `x @ w` is all there is to it. Norm weights are float32 and
    complete (Gemma's +1 is folded in when loading): norms are always `x * w`.
    """

    attn_norm: jax.Array  # [l, D]
    wq: jax.Array  # [l, D, h*g*d]
    wk: jax.Array  # [l, D, h*d]
    wv: jax.Array  # [l, D, h*d]
    wo: jax.Array  # [l, h*g*d, D]
    mlp_norm: jax.Array  # [l, D]
    w_gate: jax.Array  # [l, D, F]
    w_up: jax.Array  # [l, D, F]
    w_down: jax.Array  # [l, F, D]
    bq: jax.Array | None = None  # [l, h*g*d]
    bk: jax.Array | None = None  # [l, h*d]
    bv: jax.Array | None = None  # [l, h*d]
    q_norm: jax.Array | None = None  # [l, d]
    k_norm: jax.Array | None = None  # [l, d]
    post_attn_norm: jax.Array | None = None  # [l, D]
    post_mlp_norm: jax.Array | None = None  # [l, D]
    w_dq: jax.Array | None = None  # [l, D, q rank]; see `kvjax.models.mla`, also for wq, wk, wv
    w_uk: jax.Array | None = None  # [l, r, H*n]


@flax.struct.dataclass
class Params:
    """All weights. Their dtype (that of `embed`) is the compute dtype."""

    embed: jax.Array  # [V, D]
    runs: tuple[Layers, ...]
    final_norm: jax.Array  # [D]
    head: jax.Array | None = None  # [V, D]; None when tied to `embed`


def rope_frequencies(run: Run, head_dim: int) -> np.ndarray:
    """Radians per position of each rotated pair, float32 [d/2], after the run's scaling."""
    freq = run.rope_theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)  # [d/2]
    scaling = run.rope_scaling
    if scaling is None:
        return freq.astype(np.float32)
    if scaling.kind == "linear":
        return (freq / scaling.factor).astype(np.float32)
    if scaling.kind == "table":
        return (freq / np.asarray(scaling.table)).astype(np.float32)
    # llama3: turns over the trained context decide; few turns are stretched, many are kept.
    turns = scaling.original_positions * freq / (2 * np.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (freq * (keep + (1 - keep) / scaling.factor)).astype(np.float32)


def rope_angles(run: Run, head_dim: int, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos and sin, float32 [b, t, d/2], for positions [b, t]."""
    angles = positions[..., None].astype(jnp.float32) * rope_frequencies(run, head_dim)
    return jnp.cos(angles), jnp.sin(angles)


def decode_layers(
    params: Params,
    config: ModelConfig,
    tokens: jax.Array,
    positions: jax.Array,
    attend: Attend,
    caches: Sequence[Any],
    *,
    runs: tuple[Run, ...] | None = None,
    xs: Sequence[Any] | None = None,
    uses: Sequence[tuple[int, ...]] | None = None,
    reduce: Reduce | None = None,
) -> tuple[jax.Array, tuple[Any, ...], jax.Array]:
    """All layers of the model over some tokens, with attention and caches from outside.

    Args:
      params: weights, stacked by `runs` (see `regroup`).
      config: the model.
      tokens: int32 [b, t].
      positions: int32 [b, t], the logical position of each token.
      attend: what a layer does with q, k, v; see the top of this file.
      caches: one pytree per run, carried through the run's layers.
      runs: how layers are grouped; default `layer_runs(config)`.
      xs: optional, one pytree per run whose leaves are stacked over the run's layers; each layer
        gets its slice as `extra` (None without xs).
      uses: which of the `caches` each run touches, where runs share some; `attend` is then given a
        tuple of these. Default: there is one for each run.
      reduce: for weights that are split over devices, inside a `shard_map`: `reduce("heads", x)`
        sums the parts of what attention adds, `reduce("mlp", x)` those of the feed-forward.

    Returns:
      hidden [b, t, D] after the final norm, the new caches, and `finite` bool [l, 2]: whether all
      keys and all values of each layer are finite.

    Raises:
      InputError: when params, caches or xs do not follow the runs.
    """
    runs = layer_runs(config) if runs is None else runs
    extras = (None,) * len(runs) if xs is None else tuple(xs)
    _check_runs(params, runs, caches if uses is None else uses, extras)
    x = params.embed[tokens]  # [b, t, D]
    x = x * jnp.asarray(config.embed_scale, x.dtype)
    caches, finite, lent = list(caches), [], _room_to_lend(config, x)
    for index, (run, extra) in enumerate(zip(runs, extras, strict=True)):
        angles = rope_angles(run, config.rotary_dim, positions)
        shared = lending(config.owners, run.start, run.stop)

        def step(carry, inputs, index=index, angles=angles, shared=shared):
            x, cache, lent = carry
            weights, layer, extra, turn = inputs
            if shared is None:
                q, k, v = project(config, weights, x, angles)
            else:
                q, k, v, lent = _project_shared(config, weights, x, angles, shared, turn, lent)
            attention = lambda: attend(index, layer, cache, q, k, v, extra)
            (x, cache), ok = layer_block(config, weights, x, (k, v), attention, reduce or whole)
            return (x, cache, lent), ok

        touched = (index,) if uses is None else uses[index]
        held = caches[index] if uses is None else tuple(caches[i] for i in touched)
        inputs = (params.runs[index], _layer_ids(run), extra, _turns(shared))
        (x, held, given), ok = _over_layers(
            step, (x, held, None if shared is None else lent), inputs, run.length
        )
        lent = lent if shared is None else given
        for i, cache in zip(touched, (held,) if uses is None else held, strict=True):
            caches[i] = cache
        finite.append(ok)
    hidden = rms_norm(x, params.final_norm, config.norm_eps)
    return hidden, tuple(caches), jnp.concatenate(finite)  # finite [l, 2]


def _layer_ids(run: Run) -> jax.Array:
    return jnp.arange(run.length, dtype=jnp.int32)


def _over_layers(step, carry, inputs, length: int):
    """`lax.scan`, without the loop when there is one layer only."""
    if length > 1:
        return lax.scan(step, carry, inputs)
    carry, out = step(carry, jax.tree.map(lambda leaf: leaf[0], inputs))
    return carry, out[None]


def whole(part: str, x: jax.Array) -> jax.Array:
    del part
    return x


def layer_block(config, weights, x, keys_values, attention, reduce):
    """One transformer block: x [b, t, D] -> x, with the cache and finite flags [2]."""
    finite = jnp.stack([jnp.isfinite(a).all() for a in keys_values])
    out, cache = attention()
    if config.latent is not None:
        out = mla.outputs(config, weights, out)
    out = out.reshape(*x.shape[:2], -1).astype(x.dtype)  # [b, t, h*g*d]
    out = reduce("heads", out @ weights.wo)  # [b, t, D]
    if config.post_norms:
        out = rms_norm(out, weights.post_attn_norm, config.norm_eps)
    x = x + out
    out = reduce("mlp", _mlp(config, weights, rms_norm(x, weights.mlp_norm, config.norm_eps)))
    if config.post_norms:
        out = rms_norm(out, weights.post_mlp_norm, config.norm_eps)
    return (x + out, cache), finite


def project(config, weights, x, angles):
    """q [b, t, h, g, d] times the attention scale, k and v [b, t, h, d]; q and k rotated."""
    x = rms_norm(x, weights.attn_norm, config.norm_eps)
    return _queries(config, weights, x, angles), *_keys_values(config, weights, x, angles)


def _queries(config, weights, x, angles):
    """x [b, t, D] after its norm -> q [b, t, h, g, d], rotated, times the attention scale."""
    if config.latent is not None:
        return mla.queries(config, weights, x, angles)
    q = x @ weights.wq
    if config.qkv_bias:
        q = q + weights.bq
    q = q.reshape(*x.shape[:2], config.kv_heads, config.q_per_kv, config.head_dim)
    if config.qk_norm:
        q = rms_norm(q, weights.q_norm, config.norm_eps)
    cos, sin = (a[:, :, None, None] for a in angles)  # [b, t, 1, 1, d/2]
    return (apply_rope(q, cos, sin) * config.attention_scale).astype(x.dtype)


def _keys_values(config, weights, x, angles):
    """x [b, t, D] after its norm -> k and v [b, t, h, d], k rotated."""
    if config.latent is not None:
        return mla.keys_values(config, weights, x, angles)
    k, v = x @ weights.wk, x @ weights.wv
    if config.qkv_bias:
        k, v = k + weights.bk, v + weights.bv
    k, v = (a.reshape(*x.shape[:2], config.kv_heads, config.head_dim) for a in (k, v))
    if config.qk_norm:
        k = rms_norm(k, weights.k_norm, config.norm_eps)
    cos, sin = (a[:, :, None] for a in angles)  # [b, t, 1, d/2]
    return apply_rope(k, cos, sin).astype(x.dtype), v


def _project_shared(config, weights, x, angles, shared: Lending, turn, lent):
    """`project` where layers borrow; lent: keys and values [n, b, t, h, d] of the owners in use.

    Where owners and borrowers take turns in a scan, a branch chooses: a borrower's is free.
    """
    owns, slot = turn
    x = rms_norm(x, weights.attn_norm, config.norm_eps)
    q = _queries(config, weights, x, angles)
    own = lambda: tuple(a.astype(x.dtype) for a in _keys_values(config, weights, x, angles))
    borrowed = lambda: tuple(a[slot] for a in lent)
    if not shared.alike:
        k, v = lax.cond(owns, own, borrowed)
    else:
        k, v = own() if shared.owns[0] else borrowed()
    if any(shared.owns):  # a borrower puts back what it took
        put = lambda a, new: lax.dynamic_update_index_in_dim(a, new, slot, 0)
        lent = tuple(map(put, lent, (k, v)))
    return q, k, v, lent


def _room_to_lend(config, x):
    """Zeros [n, b, t, h, d] for keys and for values, n owners in use at a time."""
    n = lending_slots(config.owners)
    shape = (n, *x.shape[:2], config.kv_heads, config.head_dim)
    return (jnp.zeros(shape, x.dtype), jnp.zeros(shape, x.dtype)) if n else None


def _turns(shared: Lending | None):
    """Per layer of a run: whether it owns (where not all do alike), and its slot."""
    if shared is None:
        return None
    owns = None if shared.alike else jnp.asarray(shared.owns)
    return owns, jnp.asarray(shared.slots, jnp.int32)


def _mlp(config, weights, x):
    """Gated feed-forward: [b, t, D] -> [b, t, D]."""
    gate = x @ weights.w_gate  # [b, t, F]
    gate = jax.nn.silu(gate) if config.activation == "silu" else jax.nn.gelu(gate, approximate=True)
    return (gate * (x @ weights.w_up)) @ weights.w_down  # [b, t, D]


def logits(params: Params, config: ModelConfig, hidden: jax.Array) -> jax.Array:
    """Next-token logits, float32 [..., V], from hidden [..., D] after the final norm."""
    head = params.embed if params.head is None else params.head
    return jnp.einsum("...D,VD->...V", hidden, head, preferred_element_type=jnp.float32)


def regroup(params: Params, runs: Sequence[Run]) -> Params:
    """The same weights stacked by other runs (those of `layer_runs(config, extra_keys)`).

    Runs that stay as they were share their arrays with `params`; the others are copied.
    """
    stops = np.cumsum([stacked.attn_norm.shape[0] for stacked in params.runs])
    starts = np.concatenate([[0], stops[:-1]])
    if not runs or runs[-1].stop != stops[-1]:
        raise InputError(
            "runs",
            got=f"layers up to {runs[-1].stop if runs else 0}",
            expected=f"all {stops[-1]} layers of these weights",
            fix="make the runs with layer_runs(config, ...) of the same model",
        )

    def gather(run: Run) -> Layers:
        parts = []
        for stacked, start, stop in zip(params.runs, starts, stops, strict=True):
            first, last = max(run.start, start) - start, min(run.stop, stop) - start
            if (first, last) == (0, stop - start):
                parts.append(stacked)
            elif first < last:
                parts.append(jax.tree.map(lambda leaf, a=first, z=last: leaf[a:z], stacked))
        if len(parts) == 1:
            return parts[0]
        return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)

    return dataclasses.replace(params, runs=tuple(gather(run) for run in runs))


def _check_runs(params, runs, caches, extras) -> None:
    lengths = [run.length for run in runs]
    stacked = [layers.attn_norm.shape[0] for layers in params.runs]
    if stacked != lengths:
        raise InputError(
            "params",
            got=f"layers stacked as {stacked}",
            expected=f"runs of {lengths}",
            fix="call regroup(params, runs) first",
        )
    for what, given in (("caches", caches), ("xs", extras)):
        if len(given) != len(runs):
            raise InputError(
                what,
                got=f"{len(given)} entries",
                expected=f"{len(runs)}, one per run of layers",
                fix="make one for each of layer_runs(config, ...)",
            )
