"""A model over compressed caches: which method serves which layers, and one block of tokens."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from kvjax.cache import Cache, init
from kvjax.cache.borrow import windows_like
from kvjax.cache.working_set import WorkingSet
from kvjax.codecs import View
from kvjax.core.errors import InputError
from kvjax.core.method import Method
from kvjax.core.pytree import pytree, static
from kvjax.generate.layer import Held, Place, Tokens, one_layer, only_if
from kvjax.models.config import ModelConfig, Run, layer_runs
from kvjax.models.decoder import Params, decode_layers, rope_frequencies
from kvjax.models.layer_map import lending, lending_slots
from kvjax.parallel.place import keep_placed, make_cache, repeat_method
from kvjax.parallel.processes import fetch
from kvjax.parallel.rules import ShardingRules, cache_specs, method_specs, param_specs
from kvjax.policies.eviction import Eviction

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Group:
    """Layers of one run whose methods have one structure: one cache, and one compiled body.

    Attributes:
      layers: their numbers in the model, rising; those that borrow are in no group.
      run: as of `layer_runs`. window: of that run.
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

    def places(self) -> dict[int, tuple[int, int]]:
        """By layer that has a cache: its group, and where it is in there."""
        return {
            layer: (i, slot)
            for i, group in enumerate(self.groups)
            for slot, layer in enumerate(group.layers)
        }

    def uses(self) -> tuple[tuple[int, ...], ...]:
        """By run: the groups whose caches its layers read, their own or those of their owners."""
        places, owners = self.places(), self.config.owners
        return tuple(
            tuple(sorted({places[owners[layer]][0] for layer in range(run.start, run.stop)}))
            for run in layer_runs(self.config)
        )


def make_plan(
    config: ModelConfig,
    method: Method | Sequence[Method],
    *,
    rules: ShardingRules | None = None,
) -> Plan:
    """Spreads a method, or one method per layer, over a model.

    A run of alike layers is one loop. Where its layers' methods differ in arrays only (calibration)
    these are stacked; where they differ in structure, each structure is compiled once and the loop
    chooses, so ten layers of two kinds cost two bodies in whatever order they come. Where layers
    borrow (`ModelConfig.layer_map`) there are caches for their owners only.

    Args:
      method: of several, one per layer, those of layers that borrow are not used: what they read
        has the method of its owner.
      rules: spreads the model over the devices of a mesh; its weights come from
        `kvjax.parallel.place_params`.
    Raises:
      InputError: methods that do not fit the head_dim, or not one per layer; values that are a view
        of other channels than the model's latent; heads, batch or codecs that the mesh does not
        split.
    """
    if rules is not None:
        single = isinstance(method, Method)
        methods = (method,) if isinstance(method, Method) else tuple(method)
        rules.check(config, methods, rules.data)
        if config.latent is not None and rules.heads > 1:
            raise InputError(
                "mesh",
                got=f"{rules.heads} devices of heads, for a latent that all heads share",
                expected="devices for data and sequence only",
                fix="make the axis heads 1",
            )
        copies = rules.copies(config)
        repeated = [repeat_method(one, config.kv_heads, copies) for one in methods]
        config = dataclasses.replace(config, kv_heads=config.kv_heads * copies)
        plan = make_plan(config, repeated[0] if single else repeated)
        return dataclasses.replace(plan, rules=rules, copies=copies)
    runs = layer_runs(config)
    if isinstance(method, Method):
        _check_method(config, method)
        every = [Group(_owning(config, run), i, run.window) for i, run in enumerate(runs)]
        groups = tuple(group for group in every if group.layers)
        return Plan((method,) * len(groups), (False,) * len(groups), groups, config)
    methods = tuple(method)
    if len(methods) != config.layers:
        raise InputError(
            "methods",
            got=f"{len(methods)} of them",
            expected=f"one for each of the {config.layers} layers",
            fix="give one method for all, or a tuple with one per layer",
        )
    for one in methods:
        _check_method(config, one)
    kinds = [(jax.tree.structure(m), tuple(a.shape for a in jax.tree.leaves(m))) for m in methods]
    members: dict[tuple[int, Any], list[int]] = {}
    for i, run in enumerate(runs):
        for layer in _owning(config, run):
            members.setdefault((i, kinds[layer]), []).append(layer)
    groups = tuple(Group(tuple(own), key[0], runs[key[0]].window) for key, own in members.items())
    stack = lambda group: jax.tree.map(lambda *a: jnp.stack(a), *(methods[n] for n in group.layers))
    return Plan(tuple(map(stack, groups)), (True,) * len(groups), groups, config)


def _check_method(config: ModelConfig, method: Method) -> None:
    """Raises `InputError` for a method of another head_dim, or whose values are a view of keys that
    hold no values, or others: under jit nothing else would tell."""
    method.check(config.head_dim)
    if not isinstance(method.value, View):
        return
    rank = None if config.latent is None else config.latent.rank
    if method.value.width != rank:
        raise InputError(
            f"method {method.name}",
            got=f"values that are channels 0 to {method.value.width - 1} of the keys",
            expected=f"those of {config.name}, "
            + ("which are apart from the keys" if rank is None else f"0 to {rank - 1}"),
            fix="get it with kvjax.calibrate.names.get_for_model for this model",
        )


def _owning(config: ModelConfig, run: Run) -> tuple[int, ...]:
    return tuple(n for n in range(run.start, run.stop) if config.owners[n] == n)


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
    config, t = plan.config, tokens.shape[1]
    runs, uses = layer_runs(config), plan.uses()
    before = caches[0].length[0]
    block = Tokens(before, count, eviction, probe)

    def layer_attend(run, layer, held, q, k, v, extra):
        kind, slot, method, turn = extra
        groups, shared = uses[run], lending(config.owners, runs[run].start, runs[run].stop)
        owns, lent = (None, None) if turn is None else turn
        alike, owned = (True, True) if shared is None else (shared.alike, shared.owns[0])
        place = Place(layer if slot is None else slot, lent, owns, alike, owned)
        frequencies = lambda: jnp.asarray(rope_frequencies(runs[run], q.shape[-1]))

        def through(i, held):
            own = method if method is not None else _method_at(plan, i, place.slot)
            return one_layer(block, own, held, place, q, k, v, frequencies)

        if len(groups) == 1:
            out, new = through(groups[0], held[0])
            return out, (new,)
        out, all_held = jnp.zeros_like(q, jnp.float32), []
        for at, (i, one) in enumerate(zip(groups, held, strict=True)):

            def body(carry, i=i):
                out, new = through(i, carry[1])
                return out.astype(jnp.float32), new  # a block comes in the dtype of the model

            out, one = only_if(kind == at, body, (out, one))
            all_held.append(one)
        return out, tuple(all_held)

    hidden, held, finite = decode_layers(
        params,
        config,
        tokens,
        before[:, None] + jnp.arange(t),  # [b, t]
        layer_attend,
        _hold(plan, caches, lend=t > 1 and not probe),
        xs=[_layer_inputs(plan, run) for run in range(len(runs))],
        uses=uses,
        reduce=reduce,
    )
    return hidden, tuple(one.cache for one in held), finite


def _method_at(plan: Plan, i: int, slot: Array) -> Method:
    return jax.tree.map(lambda a: a[slot], plan.methods[i]) if plan.stacked[i] else plan.methods[i]


def _hold(plan: Plan, caches, *, lend: bool) -> list[Held]:
    """Caches with room for the windows that a block's borrowers need."""
    borrowed = {owner for layer, owner in enumerate(plan.config.owners) if owner != layer}
    slots = lending_slots(plan.config.owners)

    def one(cache, group):
        wanted = lend and isinstance(cache, Cache) and borrowed.intersection(group.layers)
        return Held(cache, windows_like(cache, slots) if wanted else None)

    return list(map(one, caches, plan.groups))


def _layer_inputs(plan: Plan, run: int):
    """What each layer of a run is given, stacked: which of the run's caches it uses (None: the only
    one) and where in there (None: in order), its method (None: that of the cache), and whether it
    owns and where its window is held (None where nobody borrows)."""
    this, owners, groups = layer_runs(plan.config)[run], plan.config.owners, plan.uses()[run]
    shared = lending(owners, this.start, this.stop)
    turn = None
    if shared is not None:
        turn = None if shared.alike else jnp.asarray(shared.owns), jnp.asarray(shared.slots)
    if len(groups) == 1 and plan.groups[groups[0]].layers == tuple(range(this.start, this.stop)):
        return None, None, plan.methods[groups[0]] if plan.stacked[groups[0]] else None, turn
    places = plan.places()
    found = [places[owners[layer]] for layer in range(this.start, this.stop)]
    kind = [groups.index(i) for i, _ in found] if len(groups) > 1 else None
    return (
        None if kind is None else jnp.asarray(kind, jnp.int32),
        jnp.asarray([slot for _, slot in found], jnp.int32),
        None,
        turn,
    )


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
