"""What one layer does with its cache: it takes the tokens in, or reads what its owner has."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kvjax.cache import Cache, append, attend, extend
from kvjax.cache.borrow import Windows, read_block
from kvjax.cache.working_set import WorkingSet, take_in
from kvjax.core.errors import InputError
from kvjax.core.method import Method
from kvjax.core.pytree import pytree
from kvjax.policies.eviction import Eviction

Array = jax.Array


@pytree
class Held:
    """The cache of a group of layers, and what layers that borrow need of it during a block."""

    cache: Cache | WorkingSet
    windows: Windows | None


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a layer's keys and values are.

    Attributes:
      slot: of the cache's layers. lent: where the window of before the block is held, None where
        nobody borrows.
      owns: bool, whether the layer takes the tokens in. alike: whether all layers of the run do, or
        none does; then `owned` says which.
    """

    slot: Array
    lent: Array | None
    owns: Array | None
    alike: bool
    owned: bool


@dataclasses.dataclass(frozen=True)
class Tokens:
    """A block of tokens, the same for all layers.

    Attributes:
      before: `[b]`, tokens in the caches before it. count: `[b]` or None, how many are real.
      eviction, probe: as in `forward_block`.
    """

    before: Array
    count: Array | None
    eviction: Eviction | None
    probe: bool


def one_layer(
    block: Tokens,
    method: Method,
    held: Held,
    place: Place,
    q: Array,
    k: Array,
    v: Array,
    frequencies: Callable[[], Array],
) -> tuple[Array, Held]:
    """Attention `[b, t, h, g, d]` of a layer, and its cache with the tokens in it.

    Args:
      frequencies: radians per position of each rotated pair, `[d / 2]`.
    """
    cache, t = held.cache, q.shape[1]
    owns = jnp.bool_(place.owned) if place.owns is None else place.owns
    if isinstance(cache, WorkingSet):
        assert block.eviction is not None
        given: dict[str, Any] = {"layer": place.slot, "count": block.count, "scale": 1.0}
        given |= {"probe": block.probe, "again": ~owns, "frequencies": frequencies()}
        out, cache = take_in(block.eviction, cache, q, k, v, **given)
        return out, dataclasses.replace(held, cache=cache)
    if t > 1 and (block.probe or held.windows is None):
        out, new = _extend(method, cache, place.slot, q, k, v, block.count)
    elif t > 1:
        return _lend_or_borrow(block, method, held, place, q, k, v)
    else:
        active = None if block.count is None else block.count > 0
        if not (block.probe or place.alike):
            active = jnp.broadcast_to(owns if active is None else active & owns, q.shape[:1])
        new = cache
        if block.probe or not place.alike or place.owned:
            new = append(method, cache, k[:, 0], v[:, 0], layer=place.slot, active=active)
        out = attend(method, new, q[:, 0], layer=place.slot, scale=1.0)[:, None]
    return out, held if block.probe else dataclasses.replace(held, cache=new)


def _lend_or_borrow(block, method, held, place, q, k, v):
    """A block where layers borrow: its window is put by, or the one put by is read."""
    t, slot = q.shape[1], place.slot
    count = jnp.full(q.shape[:1], t, jnp.int32) if block.count is None else block.count
    if held.cache.window is not None and t > method.layout.page:
        raise InputError(
            "block",
            got=f"{t} tokens",
            expected=f"at most a page of {method.layout.page} where layers borrow the cache of a "
            "layer with a sliding window",
            fix="use smaller blocks",
        )

    def own(state):
        _, held = state
        windows = held.windows.put(place.lent, held.cache, slot)
        out, cache = extend(method, held.cache, q, k, v, layer=slot, count=count, scale=1.0)
        return out, Held(cache, windows)

    def borrow(state):
        _, held = state
        given = {"layer": slot, "slot": place.lent, "before": block.before, "count": count}
        out = read_block(method, held.cache, held.windows, q, k, v, **given, scale=1.0)
        return out, held

    state = jnp.zeros_like(q), held
    if place.alike:
        return (own if place.owned else borrow)(state)
    return only_if(~place.owns, borrow, only_if(place.owns, own, state))


def _extend(method, cache, layer, q, k, v, count):
    """`extend`; in pieces of a page where a sliding window takes no more."""
    t, page = q.shape[1], method.layout.page
    if cache.window is None or t <= page:
        return extend(method, cache, q, k, v, layer=layer, count=count, scale=1.0)
    pad = -t % page
    count = jnp.full(q.shape[:1], t, jnp.int32) if count is None else count
    padded = (jnp.pad(a, [(0, 0), (0, pad)] + [(0, 0)] * (a.ndim - 2)) for a in (q, k, v))
    pieces = [jnp.moveaxis(a.reshape(a.shape[0], -1, page, *a.shape[2:]), 1, 0) for a in padded]

    def one(cache, piece):
        *block, start = piece
        real = jnp.clip(count - start, 0, page)
        out, cache = extend(method, cache, *block, layer=layer, count=real, scale=1.0)
        return cache, out

    cache, outs = jax.lax.scan(one, cache, (*pieces, jnp.arange(0, t + pad, page)))
    return jnp.moveaxis(outs, 0, 1).reshape(q.shape[0], t + pad, *q.shape[2:])[:, :t], cache


def only_if(condition: Array, body: Callable, carry):
    """`body(carry)` or `carry`, as a loop of one turn or none: XLA updates the carry of a loop in
    place, and copies what goes through a branch."""
    step = lambda state: (jnp.bool_(False), body(state[1]))
    return jax.lax.while_loop(lambda state: state[0], step, (condition, carry))[1]
