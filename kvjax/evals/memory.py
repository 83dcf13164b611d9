"""What caches take: exact bytes from the shapes that would be allocated, before allocating any."""

from __future__ import annotations

import dataclasses

import jax

from kvjax.cache import cache_bytes, history_bits_per_value
from kvjax.core.layout import Layout
from kvjax.generate.plan import init_caches, make_plan
from kvjax.methods import get
from kvjax.models.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Footprint:
    """One method's cache for one model and context.

    Attributes:
      method: its name.
      bits_per_value: of the packed history, all side information counted.
      bytes_per_token: what one more token costs once windows are full, over all layers that keep
        growing (those without a sliding window).
      cache_bytes: all leaves at this context and batch, windows included.
      ratio: of cache_bytes to a plain bf16 cache of all tokens.
    """

    method: str
    bits_per_value: float
    bytes_per_token: float
    cache_bytes: int
    ratio: float


def plain_bytes(config: ModelConfig, context: int, batch: int = 1) -> int:
    """Bytes of an uncompressed bf16 cache that keeps every token in every layer."""
    return int(config.kv_bytes_per_token(2)) * context * batch


def footprint(
    config: ModelConfig, name: str, *, context: int, batch: int = 1, layout: Layout | None = None
) -> Footprint:
    """Exact sizes of the caches that `init_caches` would make.

    Raises:
      InputError: unknown method, or a context beyond the model's positions.

    Example:
      >>> from kvjax.models.config import known_configs
      >>> llama = known_configs()["llama-3.1-70b"]
      >>> plain_bytes(llama, 131_072) / 2**30
      40.0
      >>> round(footprint(llama, "int4", context=131_072).bits_per_value, 2)
      4.25
    """
    plan = make_plan(config, get(name, config.head_dim, layout=layout))
    caches = jax.eval_shape(lambda: init_caches(plan, batch=batch, capacity=context))
    bits = [history_bits_per_value(m, c) for m, c in zip(plan.methods, caches, strict=True)]
    growing = [
        2 * len(group.layers) * config.kv_heads * config.head_dim * b / 8
        for group, b in zip(plan.groups, bits, strict=True)
        if group.window is None
    ]
    total = sum(cache_bytes(cache) for cache in caches)
    ratio = total / plain_bytes(config, context, batch)
    return Footprint(name, max(bits), sum(growing), total, ratio)
