"""A cache for another number of devices: pages dealt anew, KV heads repeated or taken once."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from kvjax.cache import Cache
from kvjax.core.errors import InputError
from kvjax.parallel.processes import fetch


def reshard(cache: Cache, shards: int = 1, *, slots: int | None = None) -> Cache:
    """The same cache with its pages dealt to `shards` devices of the axis "sequence".

    Page i is on device `i mod shards`, in its slot `i div shards`, and slots of a device lie
    together: so the order of the slots depends on the number of devices, and there are as many for
    each. Slots are permuted, padded with empty ones, and cut where nothing is in them.

    Args:
      cache: whole, or over devices of one process or several (which must all call this).
      slots: page slots of a sequence, over all devices; None rounds up those that there are.
    Returns:
      A cache of arrays on the host. `jax.device_put(cache, shardings(rules, cache_specs(cache)))`
      places it.
    Raises:
      InputError: a shared pool; slots that are no multiple of `shards`, or too few for the pages
        that queries still see.

    Example:
      >>> import kvjax
      >>> method = kvjax.methods.get("int4", head_dim=64)
      >>> cache = kvjax.init(method, capacity=700, kv_heads=2, head_dim=64)
      >>> [reshard(cache, shards).page_starts.shape[-1] for shards in (1, 4, 8)]
      [9, 12, 16]
    """
    if cache.page_table is not None:
        raise _error("a shared pool of pages", "contiguous pages", "use a layout without a pool")
    had = cache.page_starts.shape[-1]
    slots = -(-had // max(shards, 1)) * shards if slots is None else slots
    if shards < 1 or slots < 1 or slots % shards:
        raise _error(
            f"{slots} slots over {shards} devices", "a multiple, of 1 or more", "choose such"
        )
    whole: Any = fetch(cache)  # numpy's
    _check_room(whole, slots)
    packed = whole.packed[..., None]  # [l, b, 1]
    slot = np.arange(slots)
    # In the new order, which page the ring of slots has: the newest that falls on the slot.
    ring = slot % (slots // shards) * shards + slot // (slots // shards)
    page = packed - 1 - (packed - 1 - ring) % slots  # [l, b, slots]
    there = page >= np.maximum(packed - had, 0)
    old, each = page % had, had // cache.shards
    source = np.where(there, old % cache.shards * each + old // cache.shards, 0)

    def deal(a: np.ndarray, axis: int, empty: int) -> Any:
        index, keep = (
            x.reshape(*x.shape[:2], *[1] * (axis - 2), slots, *[1] * (a.ndim - axis - 1))
            for x in (source, there)
        )
        alike = (source == source[:1, :1]).all()
        taken = a.take(source[0, 0], axis) if alike else np.take_along_axis(a, index, axis)
        return taken if there.all() else np.where(keep, taken, a.dtype.type(empty))

    pages = jax.tree.map(lambda a: deal(a, 3, 0), (whole.key_pages, whole.value_pages))
    return dataclasses.replace(
        whole,
        key_pages=pages[0],
        value_pages=pages[1],
        page_starts=deal(whole.page_starts, 2, -1),
        shards=shards,
        axis="sequence" if shards > 1 else None,
    )


def repeat_heads(cache: Cache, heads: int, kv_heads: int) -> Cache:
    """The cache with `heads` heads, as a mesh wants them: each of the model's own `kv_heads` as
    often as needed, where the cache has it as often as another mesh wanted.

    Raises:
      InputError: numbers that are no multiples of `kv_heads`, or heads that a policy has evicted
        from.
    """
    had = cache.window_key.shape[2]
    if had == heads:
        return cache
    if had % kv_heads or heads % kv_heads:
        raise _error(
            f"{had} KV heads of a model that has {kv_heads}, for {heads}",
            "multiples of those of the model",
            "restore it for the model that it was made with",
        )
    if cache.kept is not None:
        raise _error(
            f"{had} KV heads that a policy has evicted from, for {heads}",
            "as many",
            "use a mesh with the same number of devices on its axis heads",
        )
    fit: Any = lambda a: np.asarray(a)[:, :, :: had // kv_heads].repeat(heads // kv_heads, 2)
    names = ("window_key", "window_value", "key_pages", "value_pages")
    return dataclasses.replace(cache, **{n: jax.tree.map(fit, getattr(cache, n)) for n in names})


def _check_room(cache: Any, slots: int) -> None:
    """Raises `InputError` where fewer slots would lose a page that queries to come can see."""
    had = cache.page_starts.shape[-1]
    most = int(cache.packed.max(initial=0))
    if slots >= had or most <= slots:
        return
    if cache.window is not None:
        # The pages of a sequence follow each other: the distance of their starts is their size.
        starts = np.where(cache.page_starts < 0, -1, cache.page_starts)
        newest = starts.max(-1)  # [l, b]
        held = (starts >= 0).sum(-1)
        oldest = np.where(starts < 0, np.iinfo(np.int32).max, starts).min(-1)
        page = (newest - oldest) // np.maximum(held - 1, 1)
        lost = newest - page * slots + page - 1  # the last token of the newest page that is lost
        if not ((held > slots) & (lost > cache.length - cache.window)).any():
            return
    raise _error(
        f"{slots} page slots", f"at least the {most} pages that are packed", "make the cache larger"
    )


def _error(got: str, expected: str, fix: str) -> InputError:
    return InputError("cache", got=got, expected=expected, fix=fix)
