"""The plain baselines: bf16, and integers with one scale and zero point per token."""

from __future__ import annotations

import jax.numpy as jnp

from kvjax.codecs import Dense, Uniform
from kvjax.core.method import Method


def bf16() -> Method:
    """No compression: the cache that everything is compared with."""
    return Method(Dense(jnp.bfloat16), Dense(jnp.bfloat16), name="bf16")


def integer(bits: int, *, group: int | None = None) -> Method:
    """Min/max integers per token, for keys and values alike.

    Args:
      bits: 1 to 8.
      group: channels that share a scale and a zero point; None is the whole vector.

    Example:
      >>> integer(8).name
      'int8'
    """
    codec = Uniform(bits, group=group)
    return Method(codec, codec, name=f"int{bits}" if group is None else f"int{bits}-g{group}")
