"""A model over compressed caches: which method serves which layers, and one block of tokens."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from kvjax.cache import Cache, append, attend, extend, init
from kvjax.cache.working_set import WorkingSet, take_in
from kvjax.core.errors import InputError
from kvjax.core.method import Method
from kvjax.core.pytree import pytree, static
from kvjax.models.config import ModelConfig, layer_runs
from kvjax.models.decoder import Params, decode_layers, rope_frequencies
from kvjax.parallel.place import keep_placed, make_cache, repeat_method
from kvjax.parallel.processes import fetch
from kvjax.parallel.rules import ShardingRules, cache_specs, method_specs, param_specs
from kvjax.policies.eviction import Eviction

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Group:
    """Layers of one run whose methods have one structure: one cache, and one compiled body.

    Attributes:
      layers: their numbers in the model, rising. run: as of `layer_runs`. window: of that run.
    """

    layers: tuple[int, ...]
    run: int
    window: int | None


@pytree
class Plan:
    """Methods by group of layers. A pytree: arrays of the methods are traced, all else is static.

    Attributes:
      methods: one per group; where layers of a group have arrays of their own, these are stacked.
      stacked: per group, whether that is so.
      groups: in order of their runs; caches come one per group.
      rules: how it is spread over devices, or None. `config` then has a KV head for every device.
      copies: how often each KV head is there, with a part of its queries each.
    """

    methods: tuple[Method, ...]
    stacked: tuple[bool, ...] = static()
    groups: tuple[Group, ...] = static()
    config: ModelConfig = static()
    rules: ShardingRules | None = static(default=None)
    copies: int = static(default=1)

    def in_run(self, run: int) -> list[int]:
        """The groups of a run."""
        return [i for i, group in enumerate(self.groups) if group.run == run]


def make_plan(
    config: ModelConfig,
    method: Method | Sequence[Method],
    *,
    rules: ShardingRules | None = None,
) -> Plan:
    """Spreads a method, or one method per layer, over a model.

    A run of alike layers is one loop. Where its layers' methods differ in arrays only (calibration)
    these are stacked; where they differ in structure, each structure is compiled once and the loop
    chooses, so ten layers of two kinds cost two bodies in whatever order they come.

    Args:
      rules: spreads the model over the devices of a mesh; its weights come from
        `kvjax.parallel.place_params`.
    Raises:
      InputError: methods that do not fit the head_dim, or not one per layer; heads, batch or
        codecs that the mesh does not split.
    """
    if rules is not None:
        single = isinstance(method, Method)
        methods = (method,) if isinstance(method, Method) else tuple(method)
        rules.check(config, methods, rules.data)
        copies = rules.copies(config)
        repeated = [repeat_method(one, config.kv_heads, copies) for one in methods]
        config = dataclasses.replace(config, kv_heads=config.kv_heads * copies)
        plan = make_plan(config, repeated[0] if single else repeated)
        return dataclasses.replace(plan, rules=rules, copies=copies)
    runs = layer_runs(config)
    if isinstance(method, Method):
        method.check(config.head_dim)
        groups = tuple(
            Group(tuple(range(r.start, r.stop)), i, r.window) for i, r in enumerate(runs)
        )
        return Plan((method,) * len(runs), (False,) * len(runs), groups, config)
    methods = tuple(method)
    if len(methods) != config.layers:
        raise InputError(
            "methods",
            got=f"{len(methods)} of them",
            expected=f"one for each of the {config.layers} layers",
            fix="give one method for all, or a tuple with one per layer",
        )
    for one in methods:
        one.check(config.head_dim)
    kinds = [(jax.tree.structure(m), tuple(a.shape for a in jax.tree.leaves(m))) for m in methods]
    members: dict[tuple[int, Any], list[int]] = {}
    for i, run in enumerate(runs):
        for layer in range(run.start, run.stop):
            members.setdefault((i, kinds[layer]), []).append(layer)
    groups = tuple(Group(tuple(own), key[0], runs[key[0]].window) for key, own in members.items())
    stack = lambda group: jax.tree.map(lambda *a: jnp.stack(a), *(methods[n] for n in group.layers))
    return Plan(tuple(map(stack, groups)), (True,) * len(groups), groups, config)


def init_caches(plan: Plan, *, batch: int, capacity: int, dtype=jnp.bfloat16) -> tuple[Cache, ...]:
    """Empty caches, one per group of layers; `dtype` is that of their exact windows.

    Raises:
      InputError: a capacity beyond the model's positions.
    """
    config = plan.config
    if capacity > config.max_positions:
        raise InputError(
            "context",
            got=f"{capacity} tokens",
            expected=f"at most the {config.max_positions} positions of {config.name}",
            fix="use a shorter context, or a model with more positions",
        )
    rules = plan.rules
    if rules is not None:
        rules.check(config, plan.methods, batch)
    shards = 1 if rules is None else rules.sequence

    def one(method, stacked, group):
        of = jax.tree.map(lambda a: a[0], method) if stacked else method
        options = {
            "capacity": capacity,
            "kv_heads": config.kv_heads,
            "head_dim": config.head_dim,
            "batch": batch,
            "layers": len(group.layers),
            "window": group.window,
            "dtype": dtype,
            "shards": shards,
            "axis": "sequence" if shards > 1 else None,
            "parts": 1 if rules is None else rules.data,
        }
        return make_cache(rules, init, of, **options)

    return tuple(map(one, plan.methods, plan.stacked, plan.groups))


def forward_block(
    plan: Plan,
    params: Params,
    caches: tuple[Cache | WorkingSet, ...],
    tokens: Array,
    count: Array | None = None,
    *,
    eviction: Eviction | None = None,
    probe: bool = False,
) -> tuple[Array, tuple[Any, ...], Array]:
    """The model over the next tokens of each sequence, through the caches.

    Args:
      tokens: int32 `[b, t]`. count: `[b]`, how many of them are real; they come first. With t = 1
        a count of 0 leaves the sequence as it is.
      eviction: what working sets among the caches are judged by; evicting is left to the caller.
      probe: the tokens are only there to judge; no cache takes them in.
    Returns:
      hidden `[b, t, D]`, caches, and `finite` bool `[layers, 2]` (keys, values).
    Raises:
      InputError: working sets without the eviction that they were made for.
    """
    if eviction is None and any(isinstance(cache, WorkingSet) for cache in caches):
        raise InputError(
            "eviction",
            got="none, with working sets among the caches",
            expected="the one that they were made for",
            fix="pass eviction=keep.eviction",
        )
    if plan.rules is not None and eviction is None:
        return _forward_sharded(plan, plan.rules, params, caches, tokens, count)
    # A policy may look at all heads of a layer: XLA finds out what it needs of other devices.
    hidden, caches, finite = _forward(plan, params, caches, tokens, count, eviction, probe)
    return hidden, tuple(keep_placed(plan.rules, cache) for cache in caches), finite


def _forward_sharded(plan, rules, params, caches, tokens, count):
    """`_forward` on every device of a mesh, over its heads and pages of its sequences.

    Per layer it takes one merge over "sequence" (a maximum and a sum) and one sum over "heads".
    """
    spec, config = PartitionSpec, plan.config
    heads = config.kv_heads // rules.heads
    queries = {"kv_heads": heads, "q_heads": heads * config.q_per_kv}
    local_config = dataclasses.replace(config, **queries)

    def reduce(part, x):
        split = rules.heads > 1 and (part == "heads" or rules.mlp)
        return jax.lax.psum(x, "heads") if split else x

    def local(methods, params, caches, tokens, count):
        own = dataclasses.replace(plan, methods=methods, config=local_config, rules=None)
        hidden, caches, finite = _forward(own, params, caches, tokens, count, reduce=reduce)
        return hidden, caches, finite[None, None]

    own = tuple(map(method_specs, plan.methods, itertools.repeat(config.kv_heads), plan.stacked))
    on = tuple(map(cache_specs, caches))
    count = jnp.full(tokens.shape[:1], tokens.shape[1], jnp.int32) if count is None else count
    hidden, caches, finite = jax.shard_map(
        local,
        mesh=rules.mesh,
        in_specs=(own, param_specs(rules, params), on, spec("data"), spec("data")),
        out_specs=(spec("data"), on, spec("data", "heads")),
        check_vma=False,
    )(plan.methods, params, caches, tokens, count)
    return hidden, caches, finite.all((0, 1))


def _forward(plan, params, caches, tokens, count, eviction=None, probe=False, reduce=None):
    """`forward_block` on one device."""
    t = tokens.shape[1]
    positions = caches[0].length[0][:, None] + jnp.arange(t)  # [b, t]

    def one_layer(run, method, cache, slot, q, k, v):
        if isinstance(cache, WorkingSet):
            assert eviction is not None
            turns = jnp.asarray(rope_frequencies(layer_runs(plan.config)[run], q.shape[-1]))
            given = {"layer": slot, "count": count, "scale": 1.0, "probe": probe}
            return take_in(eviction, cache, q, k, v, frequencies=turns, **given)
        if t > 1:
            out, new = _extend(method, cache, slot, q, k, v, count)
            return out, (cache if probe else new)
        active = None if count is None else count > 0
        new = append(method, cache, k[:, 0], v[:, 0], layer=slot, active=active)
        out = attend(method, new, q[:, 0], layer=slot, scale=1.0)[:, None]
        return out, (cache if probe else new)

    def layer_attend(run, layer, own, q, k, v, extra):
        groups = plan.in_run(run)
        if len(groups) == 1:
            method = extra if plan.stacked[groups[0]] else plan.methods[groups[0]]
            out, cache = one_layer(run, method, own[0], layer, q, k, v)
            return out, (cache,)
        kind, slot = extra
        out, caches = jnp.zeros_like(q, jnp.float32), []
        for at, (i, cache) in enumerate(zip(groups, own, strict=True)):

            def body(carry, i=i):
                method = jax.tree.map(lambda a: a[slot], plan.methods[i])
                out, cache = one_layer(run, method, carry[1], slot, q, k, v)
                return out.astype(jnp.float32), cache  # a block comes in the dtype of the model

            out, cache = _only_if(kind == at, body, (out, cache))
            caches.append(cache)
        return out, tuple(caches)

    by_run = [plan.in_run(run) for run in range(len(layer_runs(plan.config)))]
    hidden, nested, finite = decode_layers(
        params,
        plan.config,
        tokens,
        positions,
        layer_attend,
        [tuple(caches[i] for i in groups) for groups in by_run],
        xs=[_layer_inputs(plan, groups) for groups in by_run],
        reduce=reduce,
    )
    flat = {
        i: cache
        for groups, own in zip(by_run, nested, strict=True)
        for i, cache in zip(groups, own, strict=True)
    }
    return hidden, tuple(flat[i] for i in range(len(caches))), finite


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


def _only_if(condition: Array, body: Callable, carry):
    """`body(carry)` or `carry`, as a loop of one turn or none: XLA updates the carry of a loop in
    place, and copies what goes through a branch."""
    step = lambda state: (jnp.bool_(False), body(state[1]))
    return jax.lax.while_loop(lambda state: state[0], step, (condition, carry))[1]


def _layer_inputs(plan: Plan, groups: list[int]):
    """What each layer of a run is given: its method, or which of the groups it is in and where."""
    if len(groups) == 1:
        return plan.methods[groups[0]] if plan.stacked[groups[0]] else None
    places = {
        layer: (kind, slot)
        for kind, i in enumerate(groups)
        for slot, layer in enumerate(plan.groups[i].layers)
    }
    kind, slot = np.array([places[layer] for layer in sorted(places)], np.int32).T
    return jnp.asarray(kind), jnp.asarray(slot)


def block_size(plan: Plan, longest: int, wanted: int = 256) -> int:
    """Tokens per prefill block for prompts of up to `longest`: at most `wanted`, no more padding
    than the next power of two, and a page at most where a sliding window demands it."""
    sizes = [min(wanted, max(16, 1 << (longest - 1).bit_length()))]
    for method, group in zip(plan.methods, plan.groups, strict=True):
        if group.window is not None:
            sizes.append(method.layout.page)
    return min(sizes)


def check_finite(finite: Array) -> None:
    """Raises `InputError` that names the first layer whose keys or values are not finite."""
    finite = fetch(finite)
    if finite.all():
        return
    layer = int((~finite.all(-1)).argmax())
    side = "keys" if not finite[layer, 0] else "values"
    raise InputError(
        f"layer {layer}",
        got=f"NaN or infinity in its {side}",
        expected="finite numbers",
        fix="check the checkpoint, or run it in float32",
    )
