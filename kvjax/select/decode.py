"""Decoding with a selection: each layer reads what its group has chosen, from packed caches."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kvjax.cache import Cache, append, attend, extend
from kvjax.core.codec import Array
from kvjax.core.errors import InputError
from kvjax.core.pytree import pytree, static
from kvjax.generate.plan import Plan, init_caches
from kvjax.models.config import layer_runs
from kvjax.models.decoder import Params
from kvjax.select.attend import attend_chosen
from kvjax.select.choose import choose_tokens
from kvjax.select.index_cache import IndexCache, append_index, init_index, read_index
from kvjax.select.indexer import Indexer, index_keys, index_queries, index_scores
from kvjax.select.layers import layers_with_input
from kvjax.select.share import DENSE, FULL, check_pattern, kinds_of


@pytree
class Selection:
    """Which layers choose, with what, and how much.

    Attributes:
      indexers: of the F layers of the pattern, leaves `[f, ...]`.
      pattern: of the layers that see everything, see `share`.
      k: packed tokens that a layer reads, beyond the exact windows of the cache.
    """

    indexers: Indexer
    pattern: str = static()
    k: int = static(default=256)

    def __post_init__(self):
        check_pattern(self.pattern, len(self.pattern))
        if self.k < 1:
            raise InputError("k", got=self.k, expected="1 or more", fix="choose some tokens")


@pytree
class SelectedState:
    """Caches of a model whose layers share selections.

    Attributes:
      caches: one per run of layers. index: of the F layers. chosen: `[b, k]`, positions that the
        last F layer has chosen.
    """

    caches: tuple[Cache, ...]
    index: IndexCache
    chosen: Array


def init_selected(
    plan: Plan, selection: Selection, *, batch: int, capacity: int, dtype=jnp.bfloat16
) -> SelectedState:
    """Empty caches.

    Raises:
      InputError: a pattern of other layers; layers of a run with methods of different structure; a
        plan over several devices.
    """
    kinds_of(selection.pattern, plan.config)
    if plan.rules is not None or len(plan.groups) != len(layer_runs(plan.config)):
        raise InputError(
            "plan",
            got="several devices" if plan.rules is not None else "groups within a run",
            expected="one device, and methods that are alike in a run of layers",
            fix="make the plan with one method",
        )
    width = selection.indexers.width
    full = selection.pattern.count("F")
    return SelectedState(
        caches=init_caches(plan, batch=batch, capacity=capacity, dtype=dtype),
        index=init_index(layers=full, batch=batch, capacity=capacity, width=width),
        chosen=jnp.full((batch, min(selection.k, capacity)), -1, jnp.int32),
    )


def forward_selected(
    plan: Plan,
    params: Params,
    selection: Selection,
    state: SelectedState,
    tokens: Array,
) -> tuple[Array, SelectedState]:
    """The model over the next tokens of each sequence.

    One token reads what its layers choose; a block of more, as of a prompt, reads everything, and
    leaves its index keys.

    Args:
      tokens: int32 `[b, t]`.
    Returns:
      hidden `[b, t, D]` and the new state.
    """
    t = tokens.shape[1]
    positions = state.caches[0].length[0][:, None] + jnp.arange(t)  # [b, t]

    def layer_attend(run, state, x, q, k, v, extra):
        slot, method, mine = extra
        method = plan.methods[run] if method is None else method
        cache = state.caches[run]
        if mine is None or t > 1:
            out, cache = _read_all(method, cache, q, k, v, slot)
        if mine is None:
            return out, _with_cache(state, run, cache), None
        kind, indexer_slot = mine
        own = jax.tree.map(lambda a: a[indexer_slot], selection.indexers)
        keys = index_keys(own, x, positions)
        at = jnp.where(kind == FULL, positions, -1)  # only a layer with an indexer keeps keys
        index = append_index(state.index, keys, at, layer=indexer_slot)
        state = SelectedState(state.caches, index, state.chosen)
        if t > 1:
            return out, _with_cache(state, run, cache), None
        cache = append(method, cache, k[:, 0], v[:, 0], layer=slot)

        def anew():
            scores = index_scores(
                *index_queries(own, x, positions), read_index(index, layer=indexer_slot)
            )[:, 0]
            packed = method.layout.sink + method.layout.page * cache.packed[slot]  # [b]
            seen = (
                jnp.arange(scores.shape[-1]) >= method.layout.sink
            )  # exact tokens are read anyway
            scores = jnp.where(seen, scores, -jnp.inf)
            return choose_tokens(scores, packed - 1, state.chosen.shape[1])

        chosen = jax.lax.cond(kind == FULL, anew, lambda: state.chosen)
        everything = lambda: attend(method, cache, q[:, 0], layer=slot, scale=1.0)
        some = lambda: attend_chosen(method, cache, q[:, 0], chosen, layer=slot, scale=1.0)
        out = jax.lax.cond(kind == DENSE, everything, some)[:, None]
        return out, _with_cache(SelectedState(state.caches, index, chosen), run, cache), None

    hidden, state, _ = layers_with_input(
        params,
        plan.config,
        tokens,
        layer_attend,
        state=state,
        xs=_layer_inputs(plan, selection),
        positions=positions,
    )
    return hidden, state


def _read_all(method, cache: Cache, q, k, v, slot):
    """Exact choice of everything: a block, or a token of a layer with a sliding window."""
    if q.shape[1] > 1:
        return extend(method, cache, q, k, v, layer=slot, scale=1.0)
    cache = append(method, cache, k[:, 0], v[:, 0], layer=slot)
    return attend(method, cache, q[:, 0], layer=slot, scale=1.0)[:, None], cache


def _with_cache(state: SelectedState, run: int, cache: Cache) -> SelectedState:
    caches = (*state.caches[:run], cache, *state.caches[run + 1 :])
    return SelectedState(caches, state.index, state.chosen)


def _layer_inputs(plan: Plan, selection: Selection):
    """Per run: slots in its cache, its methods if each layer has one, and of the layers that see
    everything their kind and the place of the indexer that serves them."""
    kinds = kinds_of(selection.pattern, plan.config)
    before = jnp.cumsum(kinds == FULL) - 1
    slots = jnp.maximum(before, 0)
    inputs, first = [], 0
    for i, run in enumerate(layer_runs(plan.config)):
        mine = None
        if run.window is None:
            here = slice(first, first + run.length)
            mine = (kinds[here], slots[here])
            first += run.length
        method = plan.methods[i] if plan.stacked[i] else None
        inputs.append((jnp.arange(run.length), method, mine))
    return inputs
