"""What caches take: exact bytes from the shapes that would be allocated, before allocating any."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from kvjax.cache import cache_bytes, history_bits_per_value
from kvjax.core.errors import InputError
from kvjax.core.layout import Layout
from kvjax.core.method import Method
from kvjax.generate.plan import init_caches, make_plan
from kvjax.models.config import ModelConfig, layer_runs
from kvjax.models.decoder import Layers, Params
from kvjax.models.load import leaf_shapes
from kvjax.parallel.rules import ShardingRules, cache_specs, param_specs


@dataclasses.dataclass(frozen=True)
class Footprint:
    """One method's cache for one model and context.

    Attributes:
      method: its name.
      bits_per_value: of the packed history, all side information counted; the mean over layers
        that have a cache.
      bytes_per_token: what one more token costs once windows are full, over all layers that keep
        growing (those without a sliding window).
      cache_bytes: all leaves at this context and batch, windows included.
      ratio: of cache_bytes to a plain bf16 cache of all tokens.
      bits_by_layer: true bits per value of what every layer reads, its own or another's.
    """

    method: str
    bits_per_value: float
    bytes_per_token: float
    cache_bytes: int
    ratio: float
    bits_by_layer: tuple[float, ...]


def plain_bytes(config: ModelConfig, context: int, batch: int = 1) -> int:
    """Bytes of an uncompressed bf16 cache that keeps every token in every layer."""
    return int(config.kv_bytes_per_token(2)) * context * batch


def footprint(
    config: ModelConfig, method: Method | Sequence[Method], *, context: int, batch: int = 1
) -> Footprint:
    """Exact sizes of the caches that `init_caches` would make.

    Args:
      method: one, or one per layer.
    Raises:
      InputError: a method that does not fit, or a context beyond the model's positions.

    Example:
      >>> from kvjax.methods import get
      >>> from kvjax.models.config import known_configs
      >>> llama = known_configs()["llama-3.1-70b"]
      >>> plain_bytes(llama, 131_072) / 2**30
      40.0
      >>> round(footprint(llama, get("int4", 128), context=131_072).bits_per_value, 2)
      4.25
    """
    plan = make_plan(config, method)
    caches = jax.eval_shape(lambda: init_caches(plan, batch=batch, capacity=context))
    bits, growing = [0.0] * config.layers, 0.0
    for own, cache, group in zip(plan.methods, caches, plan.groups, strict=True):
        per_value = history_bits_per_value(own, cache)
        for layer in group.layers:
            bits[layer] = per_value
        if group.window is None:
            width = cache.window_key.shape[-1] + cache.window_value.shape[-1]
            growing += len(group.layers) * config.kv_heads * width * per_value / 8
    bits = [bits[owner] for owner in config.owners]
    mean = sum(bits[n] for n in set(config.owners)) / len(set(config.owners))
    total = sum(cache_bytes(cache) for cache in caches)
    ratio = total / plain_bytes(config, context, batch)
    name = plan.methods[0].name
    return Footprint(name, mean, growing, total, ratio, tuple(bits))


@dataclasses.dataclass(frozen=True)
class CacheUnits:
    """Bytes of a group of alike layers for one sequence, one KV head and one page.

    Attributes:
      layout, window: which pages there are.
      by_axes: bytes by the mesh axes over which the rules split them.
    """

    layout: Layout
    window: int | None
    by_axes: Mapping[tuple[str, ...], int]

    def on_device(self, *, sequences: int, heads: int, context: int, shards: int) -> int:
        """Bytes on a device that has so many sequences and KV heads, and every `shards`-th page."""
        pages = -(-self.layout.page_slots(context, self.window) // shards)
        own = {"data": sequences, "heads": heads, "sequence": pages}
        total = 0
        for axes, size in self.by_axes.items():
            for axis in axes:
                size *= own[axis]
            total += size
        return total


def cache_units(config: ModelConfig, method: Method | Sequence[Method]) -> tuple[CacheUnits, ...]:
    """What `init_caches` allocates, taken apart along the axes of a mesh, by group of layers.

    Raises:
      InputError: a method that does not fit, or pages in a shared pool, whose size is given.
    """
    alone = dataclasses.replace(config, q_heads=1, kv_heads=1)
    plan = make_plan(alone, method)
    for one in plan.methods:
        if one.layout.pool is not None:
            raise InputError(
                "layout",
                got=f"a shared pool of {one.layout.pool} pages",
                expected="contiguous pages where devices share a cache",
                fix="leave out the pool",
            )
    caches = jax.eval_shape(lambda: init_caches(plan, batch=1, capacity=1))
    units = []
    for one, cache, group in zip(plan.methods, caches, plan.groups, strict=True):
        sizes: dict[tuple[str, ...], int] = {}

        def add(spec, part, sizes=sizes):
            axes = tuple(axis for axis in spec if axis is not None)
            sizes[axes] = sizes.get(axes, 0) + cache_bytes(part)

        dealt = dataclasses.replace(cache, shards=2, axis="sequence")  # as over several devices
        jax.tree.map(add, cache_specs(dealt), dealt, is_leaf=_is_spec)
        units.append(CacheUnits(one.layout, group.window, sizes))
    return tuple(units)


def weight_bytes(config: ModelConfig, rules: ShardingRules, dtype=jnp.bfloat16) -> tuple[int, int]:
    """Bytes of weights that `place_params` puts on every device, and those that a step reads.

    A step reads all but the table of embeddings, of which it takes a row per sequence; where the
    table is tied to the head, that too. Norms are float32.

    Args:
      rules: may have a `jax.sharding.AbstractMesh`: no devices are needed.
    Raises:
      InputError: heads that the mesh does not divide.
    """
    heads = config.kv_heads * rules.copies(config)
    params = weight_shapes(dataclasses.replace(config, kv_heads=heads), dtype)
    sizes = jax.tree.map(
        lambda spec, leaf: _nbytes(NamedSharding(rules.mesh, spec).shard_shape(leaf.shape), leaf),
        param_specs(rules, params),
        params,
        is_leaf=_is_spec,
    )
    held = sum(jax.tree.leaves(sizes))
    return held, held if params.head is None else held - sizes.embed


def weight_shapes(config: ModelConfig, dtype=jnp.bfloat16) -> Params:
    """The weights as `load` would make them, shapes only."""

    def shape(dims: tuple[int, ...], name: str) -> Any:
        return jax.ShapeDtypeStruct(dims, jnp.float32 if "norm" in name else dtype)

    runs = tuple(
        Layers(
            **{
                name: shape((run.length, *dims[::-1]), name)
                for name, dims in leaf_shapes(config).items()
            }
        )
        for run in layer_runs(config)
    )
    table = shape((config.vocab_size, config.d_model), "embed")
    return Params(
        embed=table,
        runs=runs,
        final_norm=shape((config.d_model,), "final_norm"),
        head=None if config.tie_embeddings else table,
    )


def _nbytes(dims: tuple[int, ...], leaf: Any) -> int:
    size = leaf.dtype.itemsize
    for dim in dims:
        size *= dim
    return size


def _is_spec(leaf: Any) -> bool:
    return isinstance(leaf, PartitionSpec)
