"""Exact tokens of which a policy keeps a budget: how a history of any length is taken in."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.cache.kept import Exact
from kvjax.core.codec import Array
from kvjax.core.errors import InputError
from kvjax.core.layout import Layout
from kvjax.core.partial import dense_partial
from kvjax.core.pytree import pytree, static
from kvjax.core.rng import fold
from kvjax.core.storage import kept_dtype, narrow_like, widen
from kvjax.policies.cam import merge_values
from kvjax.policies.eviction import Eviction
from kvjax.policies.merge_runs import merge_runs
from kvjax.policies.policy import Policy, Seen
from kvjax.policies.retain import keep


@pytree
class WorkingSet:
    """Tokens of l layers, b sequences and h KV heads while a history is processed.

    The last `block` slots take the next block, the others hold what was kept: s slots in all.

    Attributes:
      key, value: `[l, b, h, s, d]` as kept (see `core.storage`).
      positions: `[l, b, h, s]` int32, -1 where empty.
      weight: `[l, b, h, s]` float32, how many tokens were merged into each; None where none are.
      mass, score: `[l, b, h, s]` float32, the policy's notes and last verdict.
      memory: the policy's other notes, leaves `[l, b, ...]`.
      length: `[l, b]` int32, tokens seen so far: the position of the next one.
      block: slots of a block.
    """

    key: Array
    value: Array
    positions: Array
    weight: Array | None
    mass: Array
    score: Array
    memory: Any
    length: Array
    block: int = static()


def init_working_set(
    eviction: Eviction,
    *,
    kv_heads: int,
    queries: int,
    head_dim: int,
    batch: int = 1,
    layers: int = 1,
    dtype=jnp.bfloat16,
) -> WorkingSet:
    """An empty working set; `queries` is the number of query heads per KV head."""
    slots = (layers, batch, kv_heads, eviction.slots + eviction.block)
    memory = eviction.policy.start(batch, kv_heads, queries, head_dim)
    # Filled rather than shared: every leaf needs its own buffer to be donated.
    return WorkingSet(
        key=jnp.zeros((*slots, head_dim), kept_dtype(dtype)),
        value=jnp.zeros((*slots, head_dim), kept_dtype(dtype)),
        positions=jnp.full(slots, -1, jnp.int32),
        weight=jnp.ones(slots, jnp.float32) if eviction.merge == "runs" else None,
        mass=jnp.zeros(slots, jnp.float32),
        score=jnp.zeros(slots, jnp.float32),
        memory=jax.tree.map(lambda a: jnp.zeros((layers, *a.shape), a.dtype) + a, memory),
        length=jnp.zeros((layers, batch), jnp.int32),
        block=eviction.block,
    )


def take_in(
    eviction: Eviction,
    tokens: WorkingSet,
    q: Array,
    k: Array,
    v: Array,
    *,
    layer: Array | int = 0,
    count: Array | None = None,
    frequencies: Array,
    scale: float | None = None,
    probe: bool = False,
    again: Array | bool = False,
) -> tuple[Array, WorkingSet]:
    """Adds a block to the free slots, with the attention of its queries and the policy's verdict.

    Args:
      q: `[b, t, h, g, d]`. k, v: `[b, t, h, d]`, keys after RoPE; t is at most `block`.
      count: `[b]` int32, how many of the t tokens are real (they come first). A sequence that has
        none keeps its last verdict.
      frequencies: `[d / 2]`, radians per position of each rotated pair.
      probe: the block only judges: its tokens see themselves and all that is there, the policy
        scores by its queries, and nothing is added. As long as you like.
      again: bool, the block is in already, and these are the queries of another layer that reads
        the same keys and values: `k` and `v` are those of the first time, and tokens are judged by
        all queries so far. A policy that keeps notes has them added up there; verdicts of others
        are summed where they depend on queries.
    Returns:
      Outputs `[b, t, h, g, d]` and the working set; call `evict` before the next block.
    Raises:
      InputError: more tokens than there are free slots.
    """
    b, t, h, g, d = q.shape
    if t > tokens.block and not probe:
        raise InputError(
            "block",
            got=f"{t} tokens",
            expected=f"at most {tokens.block}, the free slots of the working set",
            fix="use smaller blocks, or `with_block`",
        )
    scale = d**-0.5 if scale is None else scale
    count = jnp.full((b,), t, jnp.int32) if count is None else count
    again = jnp.asarray(again)
    free = tokens.positions.shape[-1] - tokens.block
    before = tokens.length[layer] - (0 if probe else jnp.where(again, count, 0))
    offsets = jnp.arange(t)
    rows = jnp.where(offsets < count[:, None], before[:, None] + offsets, -1)  # [b, t]
    block = tuple(a.swapaxes(1, 2) for a in (k, v))  # [b, h, t, d]
    at = jnp.broadcast_to(rows[:, None], (b, h, t))
    positions = tokens.positions[layer]
    if not probe:
        positions = jnp.where(again & (jnp.arange(positions.shape[-1]) >= free), -1, positions)
    stored = held = tuple(a[layer] for a in (tokens.key, tokens.value))
    if eviction.positions == "cache":
        turned = Exact(widen(held[0]), held[1], positions).close_up(before, frequencies)
        held = (narrow_like(turned.key, tokens.key), held[1])
    new = tuple(narrow_like(a, tokens.key) for a in block)
    if probe:
        key, value = (jnp.concatenate(pair, 2) for pair in zip(held, new, strict=True))
        visible = jnp.concatenate([positions, at], 2)
    else:
        put = lambda a, part: jax.lax.dynamic_update_slice_in_dim(a, part, free, 2)
        key, value = map(put, held, new)
        stored = tuple(map(put, stored, new))
        visible = positions = put(positions, at)
    query = q.astype(jnp.float32).transpose(0, 2, 3, 1, 4) * scale  # [b, h, g, t, d]
    mask = (visible[:, :, None] >= 0) & (visible[:, :, None] <= rows[:, None, :, None])
    mask = jnp.tile(mask, (1, 1, g, 1))  # [b, h, g * t, s]
    bias = None
    if tokens.weight is not None:
        weight = tokens.weight[layer]
        extra = mask.shape[-1] - weight.shape[-1]
        bias = jnp.log(jnp.pad(weight, [(0, 0)] * 2 + [(0, extra)], constant_values=1.0))
        bias = bias[:, :, None]
    out = dense_partial(query.reshape(b, h, g * t, d), key, value, mask, bias).out
    out = out.reshape(b, h, g, t, d).transpose(0, 3, 1, 2, 4).astype(q.dtype)

    policy = eviction.policy
    changes: dict[str, Any] = {}
    if not probe:
        changes = {"key": stored[0], "value": stored[1], "positions": positions}
        changes["length"] = before + count
    if probe or "probe" not in policy.needs:
        slots = positions.shape[-1]
        seen = Seen(
            key=widen(key[:, :, :slots]),
            value=widen(value[:, :, :slots]),
            positions=positions,
            query=query,
            query_positions=rows,
            mass=tokens.mass[layer],
            memory=jax.tree.map(lambda a: a[layer], tokens.memory),
            frequencies=frequencies,
        )
        mass, memory = policy.observe(seen)
        seen = dataclasses.replace(seen, mass=mass, memory=memory)
        judged = (count > 0)[:, None, None]
        last = tokens.score[layer]
        score = policy.score(seen)
        if verdicts_add(policy, tokens.memory):
            score += jnp.where(again, last, 0.0)
        score = jnp.where(judged, score, last)
        changes |= {"mass": mass, "memory": memory, "score": score}
    write = lambda a, new: jax.lax.dynamic_update_index_in_dim(a, new.astype(a.dtype), layer, 0)
    changes = {
        name: jax.tree.map(write, getattr(tokens, name), new) for name, new in changes.items()
    }
    return out, dataclasses.replace(tokens, **changes)


def verdicts_add(policy: Policy, memory: Any) -> bool:
    """Whether verdicts of several layers on the same tokens are summed: those of queries are,
    unless the policy judges by notes, to which every layer has added."""
    return bool(policy.needs) and policy.notes is None and not jax.tree.leaves(memory)


def evict(
    eviction: Eviction, sets: tuple[WorkingSet, ...], layout: Layout | None
) -> tuple[WorkingSet, ...]:
    """Keeps the best tokens of every head and frees the slots of the next block.

    Args:
      sets: of all layers that have one, whose heads may compete.
      layout: of the method that the tokens are for: its windows stay.
    """
    join = lambda name: jnp.concatenate([getattr(one, name) for one in sets])
    positions, length = join("positions"), join("length")
    budgets = jnp.broadcast_to(jnp.asarray(eviction.budgets, jnp.int32), length.shape[:1])
    sure = always_kept(eviction, layout, positions, length)
    if eviction.merge == "runs":
        return _each(_merge, sets, sure)
    stays = keep(
        join("score"),
        positions >= 0,
        sure,
        budgets,
        compete=eviction.compete,
        floor=eviction.floor,
        most=eviction.slots,
    )
    if eviction.merge == "values":
        assert eviction.rng is not None
        keys = (fold(eviction.rng, "values", number) for number in range(len(sets)))
        sets = _each(lambda one, stays: _hand_on(next(keys), one, stays), sets, stays)
    single = sets[0].block == 1 and eviction.compete == "head"
    return _each(_replace if single else _compact, sets, stays)


def _each(change, sets: tuple[WorkingSet, ...], of_layer: Array) -> tuple[WorkingSet, ...]:
    """`change(set, its part of of_layer)` for arrays `[all layers, ...]`."""
    ends = np.cumsum([one.length.shape[0] for one in sets])
    return tuple(map(change, sets, jnp.split(of_layer, ends[:-1])))


def with_block(tokens: WorkingSet, block: int) -> WorkingSet:
    """The same tokens with another number of free slots; call it after `evict`."""
    room = tokens.positions.shape[-1] - tokens.block

    def resize(a, axis, fill=0):
        kept = jax.lax.slice_in_dim(a, 0, room, axis=axis)
        widths = [(0, block if i == axis else 0) for i in range(a.ndim)]
        return jnp.pad(kept, widths, constant_values=fill)

    return dataclasses.replace(
        tokens,
        key=resize(tokens.key, 3),
        value=resize(tokens.value, 3),
        positions=resize(tokens.positions, 3, -1),
        weight=None if tokens.weight is None else resize(tokens.weight, 3, 1),
        mass=resize(tokens.mass, 3),
        score=resize(tokens.score, 3),
        block=block,
    )


def always_kept(
    eviction: Eviction, layout: Layout | None, positions: Array, length: Array
) -> Array:
    """Which slots hold sink or recent tokens, bool like `positions: [l, b, h, s]`."""
    first = length - max(eviction.recent, eviction.policy.window)
    if layout is not None:
        first = jnp.minimum(first, layout.sink + layout.page * layout.packed_pages(length))
    sink = (positions >= 0) & (positions < eviction.sink_of(layout))
    return sink | (positions >= first[:, :, None, None])


def _compact(tokens: WorkingSet, stays: Array) -> WorkingSet:
    """Survivors in the first slots, in order of position; the last `block` slots empty."""
    room = tokens.positions.shape[-1] - tokens.block

    def one(layer, tokens):
        held = Exact(tokens.key[layer], tokens.value[layer], tokens.positions[layer])
        order = jnp.argsort(jnp.where(stays[layer], held.positions, jnp.iinfo(jnp.int32).max), -1)
        order = order[..., :room]
        valid = jnp.arange(room) < stays[layer].sum(-1, keepdims=True)
        left = held.take(order, valid)
        noted = lambda a: jnp.where(valid, jnp.take_along_axis(a[layer], order, -1), 0.0)
        changes = {
            "key": left.key,
            "value": left.value,
            "mass": noted(tokens.mass),
            "score": noted(tokens.score),
        }

        def write(a, new):
            start = (layer, *[0] * (a.ndim - 1))
            return jax.lax.dynamic_update_slice(a, new[None], start)

        whole = jnp.pad(left.positions, [(0, 0)] * 2 + [(0, tokens.block)], constant_values=-1)
        written = {name: write(getattr(tokens, name), new) for name, new in changes.items()}
        mass = written["mass"].at[layer, :, :, room:].set(0.0)
        written |= {"positions": write(tokens.positions, whole), "mass": mass}
        return dataclasses.replace(tokens, **written)

    return jax.lax.fori_loop(0, tokens.length.shape[0], one, tokens)


def _merge(tokens: WorkingSet, sure: Array) -> WorkingSet:
    """All tokens as `budget` runs of neighbours."""
    room = tokens.positions.shape[-1] - tokens.block

    def one(layer, tokens):
        held = exact_tokens(tokens, layer)
        mass, weight = tokens.mass[layer], held.weight
        assert weight is not None
        # Means of values are by weight: so this channel becomes the mean mass of a single token.
        value = jnp.concatenate([held.value, (mass / jnp.maximum(weight, 1))[..., None]], -1)
        runs = merge_runs(held.key, value, held.positions, weight, sure[layer], room, mass=mass)
        empty = lambda fill: jnp.full((*runs.weight.shape[:2], tokens.block), fill)
        notes = {
            "positions": jnp.concatenate([runs.positions, empty(-1)], -1),
            "weight": jnp.concatenate([jnp.maximum(runs.weight, 1), empty(1.0)], -1),
            "mass": jnp.concatenate([runs.value[..., -1] * runs.weight, empty(0.0)], -1),
        }
        changes = {name: getattr(tokens, name).at[layer].set(a) for name, a in notes.items()}
        for name, a in (("key", runs.key), ("value", runs.value[..., :-1])):
            kept = getattr(tokens, name)
            new = narrow_like(a, kept)[None]
            changes[name] = jax.lax.dynamic_update_slice(kept, new, (layer, 0, 0, 0, 0))
        return dataclasses.replace(tokens, **changes)

    return jax.lax.fori_loop(0, tokens.length.shape[0], one, tokens)


def _hand_on(rng: Array, tokens: WorkingSet, stays: Array) -> WorkingSet:
    """Values of tokens that leave, added to those that stay."""

    def one(layer, tokens):
        # The sum: it grows with every block, also when the longest sequence has ended.
        fed = tokens.length[layer].sum()
        value = merge_values(
            widen(tokens.value[layer]),
            tokens.positions[layer],
            stays[layer],
            tokens.mass[layer],
            rng=fold(rng, layer, fed),
        )
        new = tokens.value.at[layer].set(narrow_like(value, tokens.value))
        return dataclasses.replace(tokens, value=new)

    return jax.lax.fori_loop(0, tokens.length.shape[0], one, tokens)


def _replace(tokens: WorkingSet, stays: Array) -> WorkingSet:
    """`_compact` for one new token, in the last slot: it takes the slot of the one that leaves."""
    last = tokens.positions.shape[-1] - 1
    free = ~stays[..., :last]  # empty already, or to be dropped
    target = jnp.where(stays[..., last] & free.any(-1), free.argmax(-1), last)  # [l, b, h]
    at = (*jnp.indices(target.shape, sparse=True), target)
    move = lambda a: a.at[at].set(a[..., last, :] if a.ndim == 5 else a[..., last])
    moved = {name: move(getattr(tokens, name)) for name in ("key", "value", "mass", "score")}
    positions = jnp.where(stays, tokens.positions, -1)
    positions = positions.at[at].set(positions[..., last]).at[..., last].set(-1)
    moved["mass"] = moved["mass"].at[..., last].set(0.0)
    return dataclasses.replace(tokens, **moved, positions=positions)


def exact_tokens(tokens: WorkingSet, layer: Array | int) -> Exact:
    """What one layer holds."""
    return Exact(
        widen(tokens.key[layer]),
        widen(tokens.value[layer]),
        tokens.positions[layer],
        None if tokens.weight is None else tokens.weight[layer],
    )
