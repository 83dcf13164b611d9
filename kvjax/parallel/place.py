"""Putting weights and caches where the rules say."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from kvjax.cache.state import Cache
from kvjax.core.method import Method
from kvjax.models.config import ModelConfig
from kvjax.models.decoder import Params
from kvjax.parallel.repeat import repeat_heads
from kvjax.parallel.rules import ShardingRules, cache_specs, param_specs


def place_params(rules: ShardingRules, params: Params, config: ModelConfig) -> Params:
    """Weights on the devices that need them; KV heads repeated where there are more devices.

    Raises:
      InputError: heads that the mesh does not divide.

    Example:
      >>> rules = ShardingRules(make_mesh(heads=3))  # doctest: +SKIP
      >>> plan = make_plan(model.config, method, rules=rules)  # doctest: +SKIP
      >>> params = place_params(rules, model.params, model.config)  # doctest: +SKIP
      >>> tokens, state = generate(plan, params, prompts, max_new=64)  # doctest: +SKIP
    """
    params, _ = repeat_heads(params, config, rules.copies(config))
    return jax.device_put(params, shardings(rules, param_specs(rules, params)))


def make_cache(rules: ShardingRules, make: Callable[[], Cache]) -> Cache:
    """A new cache whose every part is allocated on its own device."""
    shape = jax.eval_shape(make)
    return jax.jit(make, out_shardings=shardings(rules, cache_specs(shape)))()


def shardings(rules: ShardingRules, specs: Any) -> Any:
    """`NamedSharding`s of the rules' mesh for a tree of `PartitionSpec`s."""
    is_spec = lambda a: isinstance(a, PartitionSpec)
    return jax.tree.map(functools.partial(NamedSharding, rules.mesh), specs, is_leaf=is_spec)


def repeat_method(method: Method, heads: int, copies: int) -> Method:
    """A method whose arrays by KV head, `[h, 1, ...]`, are there for every copy of a head."""

    def one(leaf):
        by_head = leaf.ndim >= 2 and leaf.shape[:2] == (heads, 1)
        return jnp.repeat(leaf, copies, axis=0) if by_head and copies > 1 else leaf

    return jax.tree.map(one, method)
