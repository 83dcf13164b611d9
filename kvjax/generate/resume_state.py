"""What a saved generation must have been made with, and the shapes and places of its arrays."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from kvjax.cache import Cache
from kvjax.cache.working_set import WorkingSet, with_block
from kvjax.checkpoint import mark
from kvjax.core.errors import InputError
from kvjax.generate.evict import Keep, packed_shapes, start_working
from kvjax.generate.inputs import token_counts
from kvjax.generate.loop import State
from kvjax.generate.plan import Plan, init_caches
from kvjax.models.decoder import Params
from kvjax.models.fingerprint import fingerprint
from kvjax.parallel.place import shardings
from kvjax.parallel.rules import cache_specs

Prompts = Sequence[Sequence[int]]


def facts_of(plan: Plan, params: Params, prompts: Prompts, weights: str | None) -> dict[str, Any]:
    """Model, method and prompts, whatever mesh they are on.

    Raises:
      InputError: prompts that are none; several processes without the fingerprint of the weights.
    """
    token_counts(prompts, vocab=params.embed.shape[0])
    if weights is None and jax.process_count() > 1:
        raise InputError(
            "weights",
            got="none, in several processes",
            expected="the fingerprint of the model's weights",
            fix="pass weights=fingerprint(params), taken before place_params",
        )
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(np.asarray([len(prompt), *prompt], "<i8").tobytes())
    methods = _methods(plan)
    return {
        "model": plan.config.name,
        "weights": fingerprint(params) if weights is None else weights,
        "method": list(dict.fromkeys(method.name for method in methods)),
        "layout": [dataclasses.asdict(method.layout) for method in methods],
        "codec": mark(methods),
        "prompt": digest.hexdigest()[:16],
    }


def keep_facts(keep: Keep | None) -> dict[str, Any] | None:
    """What stays of the prompts. A function that makes probes counts by its name only."""
    if keep is None:
        return None
    tokens = None if keep.probe is None else keep.probe.tokens
    probe = getattr(tokens, "__qualname__", "a function") if callable(tokens) else tokens
    return {"eviction": mark(keep.eviction), "pack": keep.pack, "probe": probe}


def prefill_like(plan: Plan, params: Params, *, batch: int, capacity: int) -> Any:
    """`(caches, hidden, finite)` of a prompt that is being read, as shapes."""
    make = lambda: init_caches(plan, batch=batch, capacity=capacity)
    hidden = jax.ShapeDtypeStruct((batch, plan.config.d_model), params.embed.dtype)
    finite = jax.ShapeDtypeStruct((plan.config.layers, 2), jnp.bool_)
    caches = place_caches(plan, jax.eval_shape(make))
    return caches, _placed(plan, hidden, "data"), _placed(plan, finite)


def state_like(plan: Plan, prompts: Prompts, rng: jax.Array, keep: Keep | None, room: int) -> State:
    """The `State` of a generation, as shapes; pools of kept pages have any size."""
    lengths, batch = token_counts(prompts), len(prompts)
    most = int(lengths.max()) + room

    def working():
        assert keep is not None
        sets = start_working(plan, keep.eviction, batch=batch)
        return tuple(with_block(c, 1) if isinstance(c, WorkingSet) else c for c in sets)

    caches: Any
    if keep is None:
        caches = jax.eval_shape(lambda: init_caches(plan, batch=batch, capacity=most))
    elif keep.pack:
        layout = plan.methods[0].layout
        tail = int(layout.packed_pages(most)) - int(layout.packed_pages(lengths).min())
        caches = packed_shapes(plan, keep.eviction, batch=batch, tail=tail)
    else:
        caches = jax.eval_shape(working)
    row = lambda dtype: _placed(plan, jax.ShapeDtypeStruct((batch,), dtype), "data")
    finite = jax.ShapeDtypeStruct((plan.config.layers, 2), jnp.bool_)
    return State(
        caches=place_caches(plan, caches),
        token=row(jnp.int32),  # type: ignore[arg-type]
        done=row(jnp.bool_),  # type: ignore[arg-type]
        finite=_placed(plan, finite),  # type: ignore[arg-type]
        rng=rng,
        steps=_placed(plan, jax.ShapeDtypeStruct((), jnp.int32)),  # type: ignore[arg-type]
    )


def place_caches(plan: Plan, caches: tuple[Cache | WorkingSet, ...]) -> Any:
    """Shapes of caches with the shardings of the plan's mesh."""
    rules = plan.rules
    if rules is None:
        return caches

    def one(shape, sharding):
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)

    where = lambda cache: jax.tree.broadcast(shardings(rules, cache_specs(cache)), cache)
    return tuple(jax.tree.map(one, cache, where(cache)) for cache in caches)


def _placed(plan: Plan, shape: jax.ShapeDtypeStruct, *axes: str) -> jax.ShapeDtypeStruct:
    if plan.rules is None:
        return shape
    sharding = jax.NamedSharding(plan.rules.mesh, PartitionSpec(*axes))
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)


def _methods(plan: Plan) -> tuple[Any, ...]:
    """The methods as the model has them: arrays by KV head not repeated for the mesh."""

    def of_group(method: Any, stacked: bool) -> Any:
        lead = 1 if stacked else 0

        def one(leaf):
            if leaf.shape[lead : lead + 2] != (plan.config.kv_heads, 1):
                return leaf
            return leaf[(slice(None),) * lead + (slice(None, None, plan.copies),)]

        return jax.tree.map(one, method)

    return tuple(map(of_group, plan.methods, plan.stacked))
