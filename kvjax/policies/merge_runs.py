"""Neighbours with like keys become one token."""

from __future__ import annotations

import functools
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from kvjax.core.codec import Array
from kvjax.core.errors import InputError
from kvjax.core.pytree import pytree

Kernel = Literal["gaussian", "mean"]


@pytree
class Merged:
    """Tokens that stand for runs of tokens, in order of position, empty slots last.

    Attributes:
      key, value: `[..., count, d]` float32.
      positions: `[..., count]` int32, -1 where empty.
      weight: `[..., count]` float32, tokens that a slot stands for, 0 where empty. Attention adds
        `log weight` to the slot's logit.
    """

    key: Array
    value: Array
    positions: Array
    weight: Array


def merge_runs(
    key: Array,
    value: Array,
    positions: Array,
    weight: Array,
    protected: Array,
    count: int,
    *,
    mass: Array | None = None,
    kernel: Kernel = "gaussian",
) -> Merged:
    """Merges tokens into `count` runs of neighbours, where their keys are most alike.

    Of the pairs of neighbours by position, those of largest cosine are joined until `count` runs
    are left. A run S has a pivot p, the token of most `mass`, the first of equals, and becomes

        w_i  = n_i exp(-|k_p - k_i|^2 / (2 sigma^2)),    sigma^2 = mean of |k_p - k_i|^2 over S
        k_S  = sum w_i k_i / sum w_i,    v_S = sum n_i v_i / n_S,    n_S = sum n_i

    at the pivot's position. With a logit bias of log n_S the run keeps its part of the softmax:
    n_S exp(q . k_S) v_S = sum n_i exp(q . k_i) v_i where q finds its keys alike.

    Args:
      key, value: `[..., s, d]`. positions: `[..., s]` int32, -1 where empty, in any order.
      weight: `[..., s]`, tokens that a slot stands for already: 1, or the n of an earlier merge.
      protected: `[..., s]` bool, tokens that stay single. Where `count` cannot be reached without
        them they are merged as well, last.
      count: runs; static. With fewer tokens than that every one is a run, and slots stay empty.
      mass: `[..., s]`, what chooses the pivot: attention in the paper. Default: `weight`.
      kernel: "gaussian" as above; "mean" has w_i = n_i.

    Source: KVMerger, arXiv 2407.08454.
    Differs from the paper: the number of runs is set, not a threshold of the cosine (it is the same
    as the threshold that gives this number); values are averaged by n_i alone and weigh n_S by the
    logit bias, where the paper averages them as keys and multiplies them by |S|; sigma is not
    defined by itself.

    Raises:
      InputError: a count below 1, another kernel.

    Example:
      >>> import jax.numpy as jnp
      >>> k = jnp.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
      >>> merged = merge_runs(k, k, jnp.arange(3), jnp.ones(3), jnp.zeros(3, bool), 2)
      >>> merged.weight
      Array([2., 1.], dtype=float32)
    """
    if count < 1 or kernel not in get_args(Kernel):
        raise InputError(
            "merge_runs",
            got=f"count {count}, kernel {kernel!r}",
            expected=f"a count of 1 or more, a kernel of {get_args(Kernel)}",
            fix="choose such",
        )
    one = functools.partial(_merge, count=count, gaussian=kernel == "gaussian")
    for _ in range(positions.ndim - 1):
        one = jax.vmap(one)
    return one(key, value, positions, weight, protected, weight if mass is None else mass)


def _merge(
    key: Array,
    value: Array,
    positions: Array,
    weight: Array,
    protected: Array,
    mass: Array,
    *,
    count: int,
    gaussian: bool,
) -> Merged:
    s = positions.shape[0]
    order = jnp.argsort(jnp.where(positions < 0, jnp.iinfo(jnp.int32).max, positions))
    key, value, positions, weight, protected, mass = (
        x[order] for x in (key, value, positions, weight, protected, mass)
    )
    key, value = key.astype(jnp.float32), value.astype(jnp.float32)
    real = positions >= 0
    weight = jnp.where(real, weight, 0.0).astype(jnp.float32)
    run = _runs(key, real, protected, count)  # [s], count where empty: sums leave that out

    def total(x: Array) -> Array:
        return jax.ops.segment_sum(x, run, num_segments=count)

    top = jax.ops.segment_max(mass, run, num_segments=count)
    slot = jnp.arange(s)
    best = jnp.where(mass == top.at[run].get(mode="fill", fill_value=0), slot, s)
    pivot = jax.ops.segment_min(best, run, num_segments=count)  # [count]; beyond s where empty
    pivot = jnp.minimum(pivot, s - 1)

    kernel = weight
    if gaussian:
        center = key[pivot].at[run].get(mode="fill", fill_value=0)  # [s, d]
        apart = ((key - center) ** 2).sum(-1) * real
        size = total(real.astype(jnp.float32))
        width = (total(apart) / jnp.maximum(size, 1)).at[run].get(mode="fill", fill_value=0)
        kernel = weight * jnp.exp(-apart / jnp.maximum(2 * width, 1e-30))
    merged = total(weight)

    def mean(x: Array, w: Array) -> Array:
        return total(x * w[:, None]) / jnp.maximum(total(w), 1e-30)[:, None]

    at = jnp.where(merged > 0, positions[pivot], -1)
    return Merged(mean(key, kernel), mean(value, weight), at, merged)


def _runs(key: Array, real: Array, protected: Array, count: int) -> Array:
    """The run of each token, `[s]`, for tokens in order of position, empty ones last."""
    unit = key / jnp.maximum(jnp.linalg.norm(key, axis=-1, keepdims=True), 1e-12)
    like = (unit[1:] * unit[:-1]).sum(-1)  # [s - 1], between -1 and 1
    like = jnp.where(protected[1:] | protected[:-1], like - 4, like)
    like = jnp.where(real[1:], like, -jnp.inf)
    rank = jnp.argsort(jnp.argsort(-like, stable=True))
    joined = rank < real.sum() - count
    starts = jnp.concatenate([jnp.ones(1, bool), ~joined])
    return jnp.where(real, jnp.cumsum(starts) - 1, count)
