"""Low-rank changes of the weights that make keys and values, and of a codec's own numbers."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from kvjax.core.errors import InputError
from kvjax.core.pytree import pytree
from kvjax.core.rng import fold
from kvjax.generate.plan import Plan
from kvjax.models.decoder import Params

Array = jax.Array

LEARNED = ("levels", "mean")  # fields of codecs that `Adapter.books` may change


@pytree
class LowRankChange:
    """`weight + down @ up` for the l layers of a run: `[l, D, r]` and `[l, r, h * d]`."""

    down: Array
    up: Array


@pytree
class Adapter:
    """What training changes; all else of model and method stays as it is.

    Attributes:
      key, value: per run of layers, changes of W_K and W_V.
      books: added to the levels and means of the codecs of each group, or None: the leaves of
        `learned(plan)` in its order.
    """

    key: tuple[LowRankChange, ...]
    value: tuple[LowRankChange, ...]
    books: tuple[Array, ...] | None = None


def init_adapter(
    plan: Plan, params: Params, *, rank: int, rng: Array, books: bool = False
) -> Adapter:
    """An adapter that changes nothing yet (`up` is zero).

    Args:
      rank: of the changes. books: whether levels and means of the codecs are learned too.
    Raises:
      InputError: a rank under 1 or over the width of keys; nothing to learn in the codecs.

    Source: LoRA, arXiv 2106.09685, on W_K and W_V alone.
    """
    width = params.runs[0].wk.shape[-1]
    if not 1 <= rank <= width:
        raise InputError(
            "rank",
            got=rank,
            expected=f"1 to {width}, the width of the keys of a layer",
            fix="choose such a rank",
        )
    found = learned(plan)
    if books and not found:
        raise InputError(
            "books",
            got=f"{plan.methods[0].name}, whose codecs have no levels or means",
            expected="a codebook, or a mean that is taken out",
            fix="leave books out, or train another method",
        )

    def change(name: str, run: int, weight: Array) -> LowRankChange:
        layers, rows, columns = weight.shape
        down = jax.random.normal(fold(rng, name, run), (layers, rows, rank)) / rows**0.5
        return LowRankChange(down, jnp.zeros((layers, rank, columns)))

    make = lambda name: tuple(
        change(name, i, getattr(run, name)) for i, run in enumerate(params.runs)
    )
    return Adapter(make("wk"), make("wv"), tuple(map(jnp.zeros_like, found)) if books else None)


def adapt(adapter: Adapter, params: Params) -> Params:
    """The weights with the changes of keys and values added; same shapes and dtypes.

    Example:
      >>> changed = adapt(adapter, model.params)  # doctest: +SKIP
    """
    add = lambda weight, c: (weight + c.down @ c.up).astype(weight.dtype)
    runs = tuple(
        dataclasses.replace(run, wk=add(run.wk, key), wv=add(run.wv, value))
        for run, key, value in zip(params.runs, adapter.key, adapter.value, strict=True)
    )
    return dataclasses.replace(params, runs=runs)


def adapt_plan(adapter: Adapter, plan: Plan) -> Plan:
    """The plan with learned levels and means; the same codes and bytes."""
    if adapter.books is None:
        return plan
    changes = iter(adapter.books)
    add = lambda path, leaf: leaf + next(changes) if _is_learned(path, leaf) else leaf
    methods = jax.tree_util.tree_map_with_path(add, plan.methods)
    return dataclasses.replace(plan, methods=methods)


def learned(plan: Plan) -> list[Array]:
    """The arrays of the plan's codecs that may be learned."""
    leaves = jax.tree_util.tree_leaves_with_path(plan.methods)
    return [leaf for path, leaf in leaves if _is_learned(path, leaf)]


def _is_learned(path, leaf) -> bool:
    return str(path[-1]).lstrip(".") in LEARNED and jnp.issubdtype(leaf.dtype, jnp.floating)
