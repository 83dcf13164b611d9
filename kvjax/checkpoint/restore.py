"""Restoring: what was saved is checked, and put where it belongs."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Sharding

from kvjax.cache import Cache
from kvjax.checkpoint import folder as disk
from kvjax.checkpoint.arrays import read
from kvjax.checkpoint.record import (
    ARRAYS,
    Record,
    another,
    check_about,
    check_files,
    check_structure,
    key_of,
    read_record,
    saved_leaves,
)
from kvjax.checkpoint.reshard import repeat_heads, reshard
from kvjax.checkpoint.tree import Leaf, dealt, is_cache, is_key, leaves_of, undealt
from kvjax.core.errors import InputError


def restore(
    folder: str | os.PathLike,
    like: Any,
    *,
    about: Mapping[str, Any] | None = None,
    number: int | None = None,
    kv_heads: int | None = None,
    any_size: Callable[[str], bool] = lambda name: False,
) -> tuple[Any, dict[str, Any]] | None:
    """The state that counts in a folder, and what was saved about it; None where there is none.

    Arrays come back where `like` has them, whatever mesh saved them: caches are dealt anew to as
    many devices of the axis "sequence" as its own (see `reshard`; those go through the host).
    Arrays without a sharding, and keys of `jax.random`, come to the default device.

    Args:
      like: the same tree of other numbers, or its `jax.eval_shape`, with shardings if wanted.
      about: facts that must be those that it was saved with, by name.
      number: an older state that was kept, by its number.
      kv_heads: of the model itself. With it, caches of a mesh with more devices than KV heads fit
        others, whose heads are there more or less often.
      any_size: names of leaves whose sizes are those that were saved, such as pools of pages.
    Raises:
      InputError: another structure, dtype or shape; other facts; another version; a file that is
        damaged, by its name.
    """
    root = Path(folder).expanduser()
    found = read_record(root, number)
    if found is None:
        return None
    at, record = found
    check_about(root, record, about or {})
    check_structure(root, record, like)
    saved, wanted = saved_leaves(record), leaves_of(like)
    anew = _anew(like, record, saved)
    through_host = {n for one in anew for n in one.leaves}
    for n, (have, (want, _)) in enumerate(zip(saved, wanted, strict=True)):
        free = n in through_host or any_size(want.name)
        _check_leaf(root, have, want, any_size=free)
    _check_all_files(at, record)
    values = _read(at, saved, [value for _, value in wanted], through_host)
    for one in anew:
        fitted = _fit(root, one, [values[n] for n in one.leaves], kv_heads)
        for n, array in zip(one.leaves, fitted, strict=True):
            have = dataclasses.replace(saved[n], shape=array.shape)
            _check_leaf(root, have, wanted[n][0], any_size=any_size(have.name))
            values[n] = array
    # One by one, so that at most one of them is there twice.
    placed = [_place(saved[n], values.pop(n), value) for n, (_, value) in enumerate(wanted)]
    return jax.tree.unflatten(jax.tree.structure(like), placed), record["about"]


def _read(at: Path, saved: list[Leaf], like: list[Any], through_host: set[int]) -> dict[int, Any]:
    """The arrays by the number of their leaf; None for plain numbers."""
    found: dict[int, Any] = dict.fromkeys(range(len(saved)))
    for n, leaf in enumerate(saved):
        if not leaf.stored and leaf.value is None:  # orbax keeps no empty arrays
            found[n] = np.zeros(leaf.shape, np.uint32 if leaf.kind == "key" else leaf.dtype)
    stored = [n for n, leaf in enumerate(saved) if leaf.stored]
    where = {key_of(n): None if n in through_host else _sharding(like[n]) for n in stored}
    try:
        arrays = read(at / ARRAYS, where)
    except Exception as error:  # whatever orbax and what is under it make of it
        raise disk.damaged(at / ARRAYS, error) from error
    return found | {n: arrays.pop(key_of(n)) for n in stored}


def peek(
    folder: str | os.PathLike, number: int | None = None
) -> tuple[Path, dict[str, Any]] | None:
    """The folder that counts and what was saved about its state; None where there is none.

    Raises:
      InputError: a damaged record, or another version.
    """
    found = read_record(Path(folder).expanduser(), number)
    return None if found is None else (found[0], found[1]["about"])


class _Anew(NamedTuple):
    """A cache that other devices saved.

    Attributes:
      leaves: the numbers of its leaves. like: what it is to be like. shards: devices that its pages
      were dealt to. part: pages of a pool that each of them had, or None.
    """

    leaves: range
    like: Cache
    shards: int
    part: int | None


def _anew(like: Any, record: Record, saved: list[Leaf]) -> list[_Anew]:
    found, first, every = [], 0, iter(record["dealt"])
    for node in jax.tree.leaves(like, is_leaf=is_cache):
        leaves = range(first, first + len(jax.tree.leaves(node)))
        first = leaves.stop
        if is_cache(node):
            had = next(every)
            if had != dealt(node) or saved[leaves.start].shape[2] != node.window_key.shape[2]:
                found.append(_Anew(leaves, node, *had))
    return found


def _check_leaf(root: Path, have: Leaf, want: Leaf, *, any_size: bool) -> None:
    """Raises `InputError` for a leaf of another kind, dtype or shape."""
    same = (have.kind, have.dtype) == (want.kind, want.dtype)
    rank = len(have.shape) == len(want.shape)
    number = want.kind == "array" and want.shape == () and _fits(have.value, want.dtype)
    if not number and not (same and rank and (any_size or have.shape == want.shape)):
        shown = lambda leaf: (
            f"{leaf.dtype or leaf.kind} {list(leaf.shape) if leaf.value is None else leaf.value}"
        )
        raise another(root, f"{have.name} {shown(have)}", shown(want))


def _fits(value: Any, dtype: str) -> bool:
    """Whether an array of that dtype can have a plain number, rounded as floats are."""
    if not isinstance(value, bool | int | float):
        return False
    kind = jnp.dtype(dtype)
    if jnp.issubdtype(kind, jnp.integer):
        limits = jnp.iinfo(kind)
        return not isinstance(value, float) and limits.min <= value <= limits.max
    return kind != jnp.bool_ or isinstance(value, bool)


def _check_all_files(at: Path, record: Record) -> None:
    """Every process looks at its share of the files; all raise where one finds damage."""
    own, count = jax.process_index(), jax.process_count()
    found: InputError | None = None
    try:
        check_files(at, record, (own, count))
    except InputError as error:
        found = error
    if count > 1:
        bad = multihost_utils.process_allgather(np.int32(found is not None)).ravel()
        if found is None and bad.any():
            found = disk.damaged(at, f"process {int(bad.argmax())} found damage")
    if found is not None:
        raise found


def _fit(root: Path, one: _Anew, parts: list[Any], kv_heads: int | None) -> list[Any]:
    """The leaves of a cache, for the devices that it is to be on."""
    like = one.like
    if [one.shards, one.part] != dealt(like) and like.page_table is not None:
        had = f"{one.part} pages of a pool on each device of {one.shards} shards"
        raise another(root, had, f"{like.pool_part} on each of {like.shards}")
    cache: Cache = jax.tree.unflatten(jax.tree.structure(undealt(like)), parts)
    cache = dataclasses.replace(cache, shards=one.shards, pool_part=one.part)
    have, heads = cache.window_key.shape[2], like.window_key.shape[2]
    if have != heads and kv_heads is None:
        raise another(root, f"a cache of {have} KV heads", f"{heads}, or kv_heads=... to fit them")
    cache = repeat_heads(cache, heads, kv_heads or heads)
    if one.shards != like.shards:
        cache = reshard(cache, like.shards, slots=like.page_starts.shape[-1])
    return jax.tree.leaves(cache)


def _sharding(value: Any) -> Sharding | None:
    """Where a leaf is to be; None is the default device, or numpy."""
    if is_key(value) or isinstance(value, np.ndarray | np.generic):
        return None
    return value.sharding if getattr(value, "committed", True) else None


def _place(have: Leaf, found: Any, want: Any) -> Any:
    """A leaf as it is wanted."""
    if have.value is not None:
        return jnp.asarray(have.value, want.dtype) if hasattr(want, "dtype") else have.value
    if have.kind == "key":
        return jax.random.wrap_key_data(jnp.array(found), impl=have.random)
    if isinstance(found, jax.Array) or isinstance(want, np.ndarray | np.generic):
        return found
    sharding = _sharding(want)
    if sharding is None:
        return jnp.array(found)
    return jax.make_array_from_callback(found.shape, sharding, found.__getitem__)
