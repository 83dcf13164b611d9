"""Histories of any length into a fixed budget: block by block, then packed for decoding."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.cache import Cache, init
from kvjax.cache.pack_kept import pack, packed_region, pages_for
from kvjax.cache.working_set import WorkingSet, evict, init_working_set
from kvjax.codecs.subspace import most_group_heads
from kvjax.core.errors import InputError
from kvjax.core.method import Method
from kvjax.generate.inputs import pad_rows, token_counts
from kvjax.generate.plan import Plan, forward_block
from kvjax.models.config import layer_runs
from kvjax.models.decoder import Params, rope_frequencies
from kvjax.parallel.place import keep_placed, make_cache
from kvjax.parallel.processes import fetch
from kvjax.parallel.rules import ShardingRules
from kvjax.policies.eviction import Eviction
from kvjax.policies.policy import Policy
from kvjax.policies.weighted import Weighted

Array = jax.Array
Caches = tuple[Any, ...]  # a WorkingSet per group without a sliding window, a Cache per other


@dataclasses.dataclass(frozen=True)
class ProbePrompt:
    """The prompt that a policy judges by, fed after every block and forgotten.

    Args:
      tokens: a prompt for every sequence, or a function from the block's tokens (of every sequence)
        and those of the block before to such prompts (KVzip repeats the block). A sequence that
        has ended has no tokens in a block, and is not judged again.
      longest: prompts are padded to so many tokens; None is the longest of `tokens`, which compiles
        once more for every block where a function gives longer or shorter ones.
    """

    tokens: Sequence[Sequence[int]] | Callable[..., Sequence[Sequence[int]]]
    longest: int | None = None

    def padded(self, block: Sequence[Sequence[int]], before: Sequence[Sequence[int]]):
        """Prompts for a block as int32 `[b, p]`, and their lengths `[b]`."""
        prompts = self.tokens(block, before) if callable(self.tokens) else self.tokens
        lengths = np.array([len(p) for p in prompts], np.int32)
        width = int(lengths.max(initial=0)) if self.longest is None else self.longest
        new = np.array([len(p) > 0 for p in block])
        if lengths.size != new.size or lengths.max(initial=0) > width or (lengths[new] < 1).any():
            raise InputError(
                "probe",
                got=f"prompts of {lengths.tolist()} tokens",
                expected=f"one for each of {len(block)} sequences, of 1 to {width} tokens",
                fix="give such prompts, or raise `longest`",
            )
        return pad_rows(prompts, width), np.where(new, lengths, 0).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class Keep:
    """What a generation keeps of its prompts.

    Args:
      eviction: policy and budget.
      probe: what a policy judges by that needs one.
      pack: encode what was kept, and let new tokens follow; False keeps it exact, and evicts at
        every step: the cache stays at its budget. A probe judges the prompt only: new tokens score
        0, and leave once they are no longer recent.
    """

    eviction: Eviction
    probe: ProbePrompt | None = None
    pack: bool = True


def start_working(plan: Plan, eviction: Eviction, *, batch: int, dtype=jnp.bfloat16) -> Caches:
    """Empty working sets and, for layers with a sliding window, empty caches.

    Raises:
      InputError: a budget below the windows, or not one for each layer that has keys and values;
        methods of several layouts; a policy that layers cannot share; a mesh with more devices on
        its axis heads than there are KV heads.
    """
    config, layout, rules = plan.config, plan.methods[0].layout, plan.rules
    if plan.copies > 1:  # each copy would be judged by the queries of its own device only
        raise InputError(
            "mesh",
            got=f"{plan.copies} devices for each KV head",
            expected="one, where a policy evicts",
            fix="make the axis heads smaller, and data or sequence larger",
        )
    if any(method.layout != layout for method in plan.methods):
        raise InputError(
            "methods",
            got="layers with windows or pages of several sizes",
            expected="one layout for all where a policy evicts",
            fix="give all methods the same layout",
        )
    if config.latent is not None:
        raise InputError(
            "eviction",
            got=f"{config.name}, whose values are a part of its keys",
            expected="a model with keys and values",
            fix="use a method without a policy",
        )
    for method in plan.methods:
        together = max(most_group_heads(method.key), most_group_heads(method.value))
        if together > 1:
            raise InputError(
                "eviction",
                got=f"{method.name}, in which {together} heads share coordinates",
                expected="heads that may keep different tokens",
                fix="fit it with --group-heads 1, or use another method",
            )
    if plan.config.layer_map:
        _check_readers(eviction.policy)
    eviction.check(len(full_layers(plan)), layout)
    sizes: dict[str, Any] = {"kv_heads": config.kv_heads, "head_dim": config.head_dim}
    sizes |= {"batch": batch, "dtype": dtype}
    found: list[Any] = []
    for i, group in enumerate(plan.groups):
        layers = len(group.layers)
        if group.window is None:
            options = sizes | {"layers": layers, "queries": config.q_per_kv}
            found.append(make_cache(rules, init_working_set, eviction, **options))
        else:  # on every device of the axis sequence: it is short
            options = sizes | {"layers": layers, "capacity": config.max_positions}
            options |= {"window": group.window}
            found.append(make_cache(rules, init, _one(plan, i), **options))
    return tuple(found)


def _check_readers(policy: Policy) -> None:
    """Raises `InputError` for a policy that several layers cannot judge by together."""
    if not isinstance(policy, Weighted):
        return
    memories = policy.start(1, 1, 1, 2)
    asked = [
        (part.notes is not None or bool(jax.tree.leaves(memory)), type(part).__name__)
        for (part, _), memory in zip(policy.parts, memories, strict=True)
        if part.needs
    ]
    if len({notes for notes, _ in asked}) > 1:
        raise InputError(
            "policy",
            got=f"{' and '.join(name for _, name in asked)}, of which one keeps notes",
            expected="parts that all keep notes of queries, or none, where layers borrow",
            fix="leave out one of them",
        )


def full_layers(plan: Plan) -> list[int]:
    """Layers without a sliding window that own keys and values, as their working sets come."""
    return [n for group in plan.groups if group.window is None for n in group.layers]


@functools.partial(jax.jit, donate_argnames="caches")
def feed(
    plan: Plan,
    params: Params,
    eviction: Eviction,
    caches: Caches,
    tokens: Array,
    count: Array,
    probe: Array | None = None,
    probe_count: Array | None = None,
) -> tuple[Array, Caches, Array]:
    """One block: its tokens are taken in and judged, and all but the budget is dropped.

    Args:
      tokens: int32 `[b, t]`, t at most the eviction's block. count: `[b]`, how many are real.
      probe, probe_count: `[b, p]` and `[b]`, what a policy that needs a probe judges by.
    Returns:
      hidden `[b, D]` of each last token (of zeros, where count is 0), caches, `finite [layers, 2]`.
    """
    hidden, caches, finite = forward_block(plan, params, caches, tokens, count, eviction=eviction)
    at = jnp.maximum(count - 1, 0)[:, None, None]
    last = jnp.take_along_axis(hidden, at, 1)[:, 0] * (count > 0)[:, None].astype(hidden.dtype)
    if probe is not None:
        _, caches, _ = forward_block(
            plan, params, caches, probe, probe_count, eviction=eviction, probe=True
        )
    return last, drop(plan, eviction, caches), finite


def drop(plan: Plan, eviction: Eviction, caches: Caches) -> Caches:
    """Evicts from every working set, down to the budget."""
    sets = tuple(c for c in caches if isinstance(c, WorkingSet))
    budgets = eviction.budgets
    if len(budgets) > 1:  # they come in the order of the model's layers
        order = np.argsort(np.argsort(full_layers(plan)))
        ranked = tuple(budgets[i] for i in order)
        eviction = dataclasses.replace(eviction, budget=ranked)
    left = (keep_placed(plan.rules, c) for c in evict(eviction, sets, plan.methods[0].layout))
    return tuple(next(left) if isinstance(c, WorkingSet) else c for c in caches)


def take_history(
    plan: Plan,
    params: Params,
    prompts: Sequence[Sequence[int]],
    eviction: Eviction,
    *,
    probe: ProbePrompt | None = None,
    caches: Caches | None = None,
    dtype=jnp.bfloat16,
) -> tuple[Array, Caches, Array]:
    """Feeds histories (their lengths may differ) block by block; one compiled step for all.

    Args:
      caches: working sets to go on with (they are used up); None starts with empty ones.
      dtype: of exact tokens.
    Returns:
      hidden `[b, D]` of each last token, working sets and caches, `finite [layers, 2]`.
    Raises:
      InputError: an empty history, one beyond the model's positions, tokens that it does not have,
        a policy without the probe that it needs, working sets of another eviction or batch.
    """
    if "probe" in eviction.policy.needs and probe is None:
        raise InputError(
            "policy",
            got=f"{type(eviction.policy).__name__} without a probe",
            expected="a prompt that it judges by",
            fix="pass probe=ProbePrompt(tokens)",
        )
    lengths = token_counts(prompts, vocab=params.embed.shape[0], what="history")
    config, block = plan.config, eviction.block
    if caches is None:
        caches = start_working(plan, eviction, batch=len(prompts), dtype=dtype)
    else:
        _check_sets(eviction, caches, len(prompts))
    longest = int((tokens_read(caches, len(prompts)) + lengths).max())
    if longest > config.max_positions:
        raise InputError(
            "history",
            got=f"{longest} tokens",
            expected=f"at most the {config.max_positions} positions of {config.name}",
            fix="shorten it, or use a model with more positions",
        )
    last: Array | None = None
    finite = jnp.ones((config.layers, 2), bool)
    before: list[list[int]] = [[] for _ in prompts]
    for first in range(0, int(lengths.max()), block):
        pieces = [list(p[first : first + block]) for p in prompts]
        tokens = pad_rows(pieces, block)
        count = np.clip(lengths - first, 0, block).astype(np.int32)
        judge = (None, None) if probe is None else probe.padded(pieces, before)
        hidden, caches, ok = feed(plan, params, eviction, caches, tokens, count, *judge)
        last = hidden if last is None else jnp.where((count > 0)[:, None], hidden, last)
        finite, before = finite & ok, pieces
    assert last is not None
    return last, caches, finite


def tokens_read(caches: Caches, batch: int) -> np.ndarray:
    """Tokens that caches have read so far, `[b]`.

    Raises:
      InputError: caches of more or fewer sequences.
    """
    read = fetch(caches[0].length[0])
    if read.size != batch:
        raise InputError(
            "caches",
            got=f"{read.size} sequences",
            expected=f"batch {batch}, one for each prompt",
            fix="go on with the sequences that they were made for",
        )
    return read


def _check_sets(eviction: Eviction, caches: Caches, batch: int) -> None:
    for tokens in (c for c in caches if isinstance(c, WorkingSet)):
        room = tokens.positions.shape[-1] - tokens.block
        got = tokens.length.shape[1], room, tokens.block
        if got != (batch, eviction.slots, eviction.block):
            raise InputError(
                "caches",
                got="batch {}, {} slots and blocks of {}".format(*got),
                expected=f"batch {batch}, {eviction.slots} slots and blocks of {eviction.block}",
                fix="go on with the eviction and the sequences that they were made for",
            )


def pack_all(plan: Plan, eviction: Eviction, caches: Caches, *, room: int) -> tuple[Cache, ...]:
    """Encodes what the working sets hold; the caches go on from there with up to `room` tokens.

    Where heads or layers hold different numbers of tokens their pages come from a pool of just the
    budget's bytes; where all layers compete and there are several groups of layers, each group's
    pool has the whole pages of what it holds.
    """
    layout = plan.methods[0].layout
    sets = [c for c in caches if isinstance(c, WorkingSet)]
    lengths = fetch(sets[0].length[0]) if sets else np.zeros(1, np.int32)
    most = int(lengths.max()) + room
    tail = int(layout.packed_pages(most)) - int(layout.packed_pages(lengths).min())
    shapes = pack_options(plan, eviction, tail=tail)
    several = eviction.compete == "model" and len(sets) > 1
    found = []
    config = plan.config
    turns = [jnp.asarray(rope_frequencies(r, config.head_dim)) for r in layer_runs(config)]
    for method, group, cache, options in zip(
        plan.methods, plan.groups, caches, shapes, strict=True
    ):
        if several and isinstance(cache, WorkingSet):
            options["pool"] = _pages_held(method, cache)
        if eviction.positions == "cache":
            options["frequencies"] = turns[group.run]
        if isinstance(cache, WorkingSet):
            cache = _pack(method, cache, plan.rules, **options)
        found.append(cache)
    return tuple(found)


def pack_options(plan: Plan, eviction: Eviction, *, tail: int) -> list[dict[str, Any]]:
    """The static arguments of `pack` for every group of layers; `tail`: pages for new tokens."""
    layout = plan.methods[0].layout
    rank = {layer: i for i, layer in enumerate(sorted(full_layers(plan)))}
    found = []
    for stacked, group in zip(plan.stacked, plan.groups, strict=True):
        budgets = eviction.budgets
        if group.window is None and len(budgets) > 1:
            budgets = tuple(budgets[rank[n]] for n in group.layers)
        quota = [plan.config.kv_heads * pages_for(layout, tokens) for tokens in budgets]
        quota *= len(group.layers) if len(quota) == 1 else 1
        pool: tuple[int, ...] | int | None = None
        if eviction.compete == "model":
            pool = sum(quota)
        elif eviction.compete == "layer" or len(set(budgets)) > 1:
            pool = tuple(quota)
        slots = max(budgets) if eviction.compete == "head" else eviction.slots
        options: dict[str, Any] = {"pages": pages_for(layout, slots), "pool": pool}
        if plan.rules is not None and plan.rules.sequence > 1:
            options |= {"shards": plan.rules.sequence, "axis": "sequence"}
        options |= {"stacked": stacked, "capacity": plan.config.max_positions}
        found.append(options | {"tail": max(1, tail)})
    return found


def packed_shapes(
    plan: Plan, eviction: Eviction, *, batch: int, tail: int, dtype=jnp.bfloat16
) -> tuple[Cache, ...]:
    """What `pack_all` gives, as shapes only: for sizes before there is anything to pack."""

    def make():
        caches = start_working(plan, eviction, batch=batch, dtype=dtype)
        options = pack_options(plan, eviction, tail=tail)
        return tuple(
            pack(method, cache, **own) if isinstance(cache, WorkingSet) else cache
            for method, cache, own in zip(plan.methods, caches, options, strict=True)
        )

    return jax.eval_shape(make)


@functools.partial(
    jax.jit,
    static_argnames=("rules", "pages", "pool", "stacked", "capacity", "tail", "shards", "axis"),
)
def _pack(method: Method, cache: WorkingSet, rules: ShardingRules | None, **options) -> Cache:
    return keep_placed(rules, pack(method, cache, **options))


def _pages_held(method: Method, tokens: WorkingSet) -> int:
    """Whole pages of what a group of layers holds of each sequence, of the fullest one."""
    held = packed_region(method.layout, tokens.positions, tokens.length).sum((0, 2, 3))  # [b]
    return max(1, int(fetch(held).max()) // method.layout.page)


def _one(plan: Plan, i: int) -> Method:
    method = plan.methods[i]
    return jax.tree.map(lambda a: a[0], method) if plan.stacked[i] else method
