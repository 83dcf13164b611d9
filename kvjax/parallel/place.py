"""Putting weights and caches where the rules say."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kvjax.core.errors import InputError
from kvjax.core.method import Method
from kvjax.models.config import ModelConfig
from kvjax.models.decoder import Params
from kvjax.parallel.repeat import repeat_heads
from kvjax.parallel.rules import ShardingRules, cache_specs, param_specs


def place_params(rules: ShardingRules, params: Params, config: ModelConfig) -> Params:
    """Weights on the devices that need them; KV heads repeated where there are more devices.

    Where the mesh has devices of several processes, each of them brings all weights and keeps its
    part; that they bring the same is checked (one checksum is exchanged).

    Raises:
      InputError: heads that the mesh does not divide; a mesh without devices of some process;
        processes with different weights.

    Example:
      >>> rules = ShardingRules(make_mesh(heads=3))  # doctest: +SKIP
      >>> plan = make_plan(model.config, method, rules=rules)  # doctest: +SKIP
      >>> params = place_params(rules, model.params, model.config)  # doctest: +SKIP
      >>> tokens, state = generate(plan, params, prompts, max_new=64)  # doctest: +SKIP
    """
    params, _ = repeat_heads(params, config, rules.copies(config))
    on = shardings(rules, param_specs(rules, params))
    if _is_own(rules.mesh):
        return jax.device_put(params, on)
    _check_same(params)
    return jax.tree.map(_put_own_part, params, on)


def make_cache(
    rules: ShardingRules | None, make: Callable[..., Any], of: Any, **options: Any
) -> Any:
    """`make(of, **options)`, a new cache whose every part is allocated on its own device.

    Args:
      rules: None makes it as it is.
      make: `init` or `init_working_set`; compiled once for each of its options.
    Raises:
      InputError: a mesh without devices of some process.
    """
    if rules is None:
        return make(of, **options)
    _is_own(rules.mesh)
    return _make(of, make=make, rules=rules, options=tuple(sorted(options.items())))


@functools.partial(jax.jit, static_argnames=("make", "rules", "options"))
def _make(of, *, make, rules, options):
    return keep_placed(rules, make(of, **dict(options)))


def keep_placed(rules: ShardingRules | None, cache: Any) -> Any:
    """A cache, or a working set, that stays where the rules want it; inside jit."""
    if rules is None:
        return cache
    return jax.lax.with_sharding_constraint(cache, shardings(rules, cache_specs(cache)))


def shardings(rules: ShardingRules, specs: Any) -> Any:
    """`NamedSharding`s of the rules' mesh for a tree of `PartitionSpec`s."""
    is_spec = lambda a: isinstance(a, PartitionSpec)
    return jax.tree.map(functools.partial(NamedSharding, rules.mesh), specs, is_leaf=is_spec)


def _is_own(mesh: Mesh) -> bool:
    """Whether all devices are of this process; an error where only some of several have any."""
    processes = {device.process_index for device in mesh.devices.flat}
    if processes == {jax.process_index()}:
        return True
    if len(processes) < jax.process_count():
        raise InputError(
            "mesh",
            got=f"{mesh.size} devices of {len(processes)} processes",
            expected=f"some of each of the {jax.process_count()} processes",
            fix="make the mesh larger, or start fewer processes",
        )
    return False


def _put_own_part(array: Any, sharding: NamedSharding) -> jax.Array:
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return jax.device_put(array, sharding)  # it is shared already
    own = np.asarray(array)
    return jax.make_array_from_callback(own.shape, sharding, own.__getitem__)


def _check_same(params: Params) -> None:
    """Raises `InputError` where processes bring different weights."""
    total = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        total = zlib.crc32(f"{path} {leaf.shape} {leaf.dtype}".encode(), total)
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
            total = zlib.crc32(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data, total)
    totals = multihost_utils.process_allgather(np.uint32(total)).ravel()
    if other := [n for n, theirs in enumerate(totals) if theirs != totals[0]]:
        raise InputError(
            "params",
            got=f"other weights in process {other[0]} than in process 0",
            expected="the same in all",
            fix="load the same checkpoint, or draw them from the same seed",
        )


def repeat_method(method: Method, heads: int, copies: int) -> Method:
    """A method whose arrays by KV head, `[h, 1, ...]`, are there for every copy of a head."""

    def one(leaf):
        by_head = leaf.ndim >= 2 and leaf.shape[:2] == (heads, 1)
        return jnp.repeat(leaf, copies, axis=0) if by_head and copies > 1 else leaf

    return jax.tree.map(one, method)
