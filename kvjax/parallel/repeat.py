"""A model with more KV heads than it has: each of them on several devices."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from kvjax.models.config import ModelConfig
from kvjax.models.decoder import Params


def repeat_heads(params: Params, config: ModelConfig, copies: int) -> tuple[Params, ModelConfig]:
    """The same function with `copies` times as many KV heads, and as much less queries for each.

    Query heads stay in their order: those of a group are shared out among the copies of its KV
    head. The cache takes `copies` times the bytes, over all devices.

    Args:
      copies: divides the query heads per KV head.
    """
    if copies == 1:
        return params, config
    h, d = config.kv_heads, config.head_dim

    def repeat(a: Any) -> Any:  # [..., h * d] -> [..., h * copies * d]
        if a is None:
            return None
        heads = a.reshape(*a.shape[:-1], h, d)
        return jnp.repeat(heads, copies, axis=-2).reshape(*a.shape[:-1], -1)

    runs = tuple(
        dataclasses.replace(
            layers,
            wk=repeat(layers.wk),
            wv=repeat(layers.wv),
            bk=repeat(layers.bk),
            bv=repeat(layers.bv),
        )
        for layers in params.runs
    )
    return dataclasses.replace(params, runs=runs), dataclasses.replace(config, kv_heads=h * copies)
