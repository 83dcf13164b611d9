"""Frozen dataclasses that are JAX pytrees, compared by value."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar, dataclass_transform

import jax
import numpy as np

T = TypeVar("T", bound=type)


def static(**kwargs: Any) -> Any:
    """A field that is part of the structure (hashable, compared by jit), not a traced leaf."""
    return dataclasses.field(metadata={"static": True}, **kwargs)


def same(a: Any, b: Any) -> bool:
    """Whether two pytrees have the same structure, static fields and leaf values."""
    leaves_a, tree_a = jax.tree.flatten(a)
    leaves_b, tree_b = jax.tree.flatten(b)
    return bool(tree_a == tree_b) and all(  # type: ignore[operator]
        np.array_equal(_plain(x), _plain(y)) for x, y in zip(leaves_a, leaves_b, strict=True)
    )


def _plain(leaf: Any) -> Any:
    """A key of `jax.random` as its numbers; all else as it is."""
    is_key = isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return jax.random.key_data(leaf) if is_key else leaf


@dataclass_transform(frozen_default=True, field_specifiers=(static, dataclasses.field))
def pytree(cls: T) -> T:
    """Class decorator: a frozen dataclass whose non-`static` fields are pytree children.

    Values are compared with `same`; they are unhashable, since they may hold arrays.
    """
    made: Any = dataclasses.dataclass(frozen=True, eq=False)(cls)
    made.__eq__ = lambda self, other: type(self) is type(other) and same(self, other)
    made.__hash__ = None
    return jax.tree_util.register_dataclass(made)
