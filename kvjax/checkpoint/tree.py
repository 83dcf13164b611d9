"""What a pytree is made of, as plain data: its structure, and names, shapes, dtypes of leaves."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

import jax
import numpy as np

from kvjax.cache import Cache
from kvjax.core.errors import InputError

_NUMBERS: dict[str, type] = {"bool": bool, "int": int, "float": float, "str": str}


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One leaf, without its numbers.

    Attributes:
      name: its path, such as ".caches[0].window_key". kind: "array", "key" (of `jax.random`) or a
      plain number's type. shape, dtype: of an array, or of a key's words. value: a plain number.
      random: how a key draws.
    """

    name: str
    kind: str
    shape: tuple[int, ...] = ()
    dtype: str = ""
    value: Any = None
    random: str = ""

    @property
    def stored(self) -> bool:
        """Whether it is kept as an array, rather than in the record."""
        return self.kind in ("array", "key") and 0 not in self.shape


def mark(tree: Any) -> str:
    """SHA-256, 16 hex digits, of a tree's structure, static fields and numbers: what tells methods
    apart.

    Example:
      >>> import kvjax
      >>> one, other = (kvjax.methods.get(name, head_dim=64) for name in ("int4", "int8"))
      >>> mark(one) == mark(one), mark(one) == mark(other)
      (True, False)
    """
    digest = hashlib.sha256(str(jax.tree.structure(tree)).encode())
    for leaf in jax.tree.leaves(tree):
        digest.update(np.asarray(words_of(leaf)).tobytes())
    return digest.hexdigest()[:16]


def is_cache(node: Any) -> bool:
    return isinstance(node, Cache)


def undealt(tree: Any) -> Any:
    """The tree with caches that do not say over how many devices they are spread."""
    free = {"shards": 1, "axis": None, "pool_part": None}
    one = lambda node: dataclasses.replace(node, **free) if is_cache(node) else node
    return jax.tree.map(one, tree, is_leaf=is_cache)


def structure_of(tree: Any) -> str:
    """Structure and static fields, whatever devices its caches are spread over."""
    return str(jax.tree.structure(undealt(tree)))


def dealt(cache: Cache) -> list[int | None]:
    """How the pages of a cache lie on devices: its shards, and the part of a pool on each."""
    return [cache.shards, cache.pool_part]


def dealt_of(tree: Any) -> list[list[int | None]]:
    """`dealt` of every cache of a tree, in the order of its leaves."""
    return [dealt(node) for node in jax.tree.leaves(tree, is_leaf=is_cache) if is_cache(node)]


def leaves_of(tree: Any) -> list[tuple[Leaf, Any]]:
    """Every leaf, and its value.

    Raises:
      InputError: a leaf that is no array, key or plain number.
    """
    found = jax.tree_util.tree_leaves_with_path(tree)
    return [(_leaf(jax.tree_util.keystr(path), value), value) for path, value in found]


def is_key(value: Any) -> bool:
    """Whether it is a key of `jax.random`, or the shape of one."""
    return hasattr(value, "dtype") and jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key)


def words_of(value: Any) -> Any:
    """A key as the words that it is made of; all else as it is."""
    return jax.random.key_data(value) if is_key(value) else value


def _leaf(name: str, value: Any) -> Leaf:
    if type(value) in _NUMBERS.values():
        return Leaf(name, type(value).__name__, value=value)
    if not (hasattr(value, "dtype") and hasattr(value, "shape")):
        raise InputError(
            f"state, {name or 'itself'}",
            got=type(value).__name__,
            expected="an array, a key of jax.random or a plain number",
            fix="keep other things in `about`",
        )
    if is_key(value):
        words = jax.eval_shape(jax.random.key_data, value)
        shaped = isinstance(value, jax.ShapeDtypeStruct)  # of which jax does not tell
        random = "" if shaped else str(jax.random.key_impl(value))
        return Leaf(name, "key", words.shape, str(value.dtype), random=random)
    return Leaf(name, "array", tuple(value.shape), str(value.dtype))
