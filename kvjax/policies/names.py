"""Policies by the names that the command line and tables use."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax

from kvjax.core.errors import InputError, known
from kvjax.policies.budgets import pyramid, uniform
from kvjax.policies.expected_attention import ExpectedAttention
from kvjax.policies.h2o import H2O
from kvjax.policies.key_diff import KeyDiff
from kvjax.policies.key_norm import KeyNorm
from kvjax.policies.policy import Policy
from kvjax.policies.probe import Probe
from kvjax.policies.snapkv import SnapKV
from kvjax.policies.streaming import Random, Streaming
from kvjax.policies.tova import Tova

# A name is a scorer. What else a paper has is set beside it: `layer_budgets` for PyramidKV, the
# prompt of the probe for KVzip and EpiCache, `recent` of the eviction for H2O's half of the budget.
POLICIES: dict[str, Callable[..., Policy]] = {
    "streaming": Streaming,
    "h2o": H2O,
    "tova": Tova,
    "snapkv": SnapKV,
    "pyramidkv": SnapKV,
    "key-norm": KeyNorm,
    "key-diff": KeyDiff,
    "expected-attention": ExpectedAttention,
    "kvzip": functools.partial(Probe, remember=True),
    "epicache": Probe,
    "random": Random,
}


def get(name: str, *, rng: jax.Array | None = None, **options: Any) -> Policy:
    """The policy of that name.

    Args:
      name: one of `POLICIES`.
      rng: a key, for "random".
      options: fields of the policy that differ from its defaults.
    Raises:
      InputError: an unknown name or option, no `rng` for "random".

    Example:
      >>> get("snapkv", window=16)
      SnapKV(window=16, kernel=5, pool='avg')
    """
    if name not in POLICIES:
        raise InputError("policy", got=repr(name), expected=known(POLICIES), fix="name one of them")
    make: Any = POLICIES[name]
    kind: Any = make.func if isinstance(make, functools.partial) else make
    fields = [field.name for field in dataclasses.fields(kind) if field.name != "rng"]
    if wrong := sorted(set(options) - set(fields)):
        raise InputError(
            f"option of {name}",
            got=", ".join(wrong),
            expected=known(fields) if fields else "no options",
            fix="leave it out, or name one of them",
        )
    if make is not Random:
        return make(**options)
    if rng is None:
        raise InputError(
            "rng of random", got="none", expected="a key", fix="give rng=jax.random.key(seed)"
        )
    return Random(rng)


def layer_budgets(
    name: str, budget: int, layers: int, tokens: int, policy: Policy, sure: int = 0
) -> tuple[int, ...]:
    """Tokens that each layer keeps under the policy of that name: a pyramid for "pyramidkv".

    Args:
      sure: tokens that always stay (sink and recent window of a layout), where that is more than
        the policy's own window: no layer gets less.

    Example:
      >>> layer_budgets("pyramidkv", 64, 4, 1000, get("pyramidkv", window=8))
      (118, 82, 46, 10)
    """
    if name == "pyramidkv":
        return pyramid(budget, layers, tokens, max(policy.window, sure))
    return uniform(budget, layers)
