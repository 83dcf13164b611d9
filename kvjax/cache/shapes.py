"""Shapes of what goes into a cache, checked before anything is traced into it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.cache.pages import LOST
from kvjax.cache.state import Cache
from kvjax.codecs import View
from kvjax.core.codec import Array
from kvjax.core.errors import InputError
from kvjax.core.layout import Layout
from kvjax.core.method import Method


def check_shapes(
    cache: Cache, layer: Array | int, *, tokens: tuple[int, ...] = (), **arrays: Array
) -> None:
    """Raises `InputError` unless all arrays are floats `[b, *tokens, h, d]` of this cache.

    Args:
      tokens: `(t,)` for blocks, empty for single tokens.
      arrays: by name; "q" has an axis of queries before d.
    """
    layers, b, h, _, d = cache.window_key.shape
    value_width = cache.window_value.shape[-1]
    if cache.page_readers is not None and cache.page_readers.shape[1] != cache.pool_part:
        raise InputError(
            "cache",
            got=f"{cache.page_readers.shape[1]} pages in parts of {cache.pool_part}",
            expected="the part of one device",
            fix="call it inside a `shard_map` over the mesh that the cache was made for",
        )
    if cache.shards > 1:
        _check_axis(cache)
    if isinstance(layer, int) and not 0 <= layer < layers:
        raise InputError(
            "layer",
            got=layer,
            expected=f"0 to {layers - 1}",
            fix="init the cache with that many layers",
        )
    for name, a in arrays.items():
        shape = (*a.shape[:-2], a.shape[-1]) if name == "q" else a.shape
        width = value_width if name == "v" else d
        if shape != (b, *tokens, h, width):
            where = f", tokens {tokens[0]}" if tokens else ""
            raise InputError(
                name,
                got=f"shape {a.shape}",
                expected=f"batch {b}{where}, KV heads {h}, "
                + ("queries per KV head, " if name == "q" else "")
                + f"head_dim {width}",
                fix="reshape it, or make the cache for these sizes",
            )
        if not jnp.issubdtype(a.dtype, jnp.floating):
            raise InputError(
                name, got=a.dtype, expected="a floating dtype", fix="cast it before appending"
            )


def values_kept(method: Method, cache: Cache, k: Array, v: Array | None) -> Array:
    """What a cache keeps of the values: all; of a view of the keys nothing, `[..., 0]`.

    Raises:
      InputError: no values, and keys that do not hold them; a cache of a method that keeps values
        where this one does not, or the other way round; outside jit, values that are not the keys'
        own.
    """
    if (cache.window_value.shape[-1] == 0) != isinstance(method.value, View):
        raise InputError(
            "cache",
            got="one that keeps values" if cache.window_value.shape[-1] else "one without values",
            expected=f"one made for {method.name}",
            fix="init it with this method",
        )
    if not isinstance(method.value, View):
        if v is None:
            raise InputError(
                "v",
                got="None",
                expected=f"values, which {method.name} keeps apart from the keys",
                fix="give them, or use a value codec that is a `View`",
            )
        return v
    own = method.value.of_key(k)
    plain = lambda a: np.asarray(a, np.float32)
    known = v is not None and not any(isinstance(a, jax.core.Tracer) for a in (v, own))
    if known and not np.array_equal(plain(v), plain(own), equal_nan=True):
        raise InputError(
            "v",
            got="values of their own",
            expected=f"channels 0 to {method.value.width - 1} of the keys, then zeros",
            fix="give None, or use a method that keeps values",
        )
    return own[..., :0]


def _check_axis(cache: Cache) -> None:
    assert cache.axis is not None
    try:
        found = jax.lax.axis_size(cache.axis)
    except NameError:
        found = 0
    if found != cache.shards:
        raise InputError(
            "cache",
            got=f"pages dealt to {cache.shards} devices, and "
            + (f"{found} on the axis {cache.axis}" if found else "no such axis around the call"),
            expected="those of the mesh that the cache was made for",
            fix=f"call it inside a `shard_map` over its axis {cache.axis}",
        )


def check_counts(name: str, counts: Array, batch: int, most: int) -> None:
    """Raises `InputError` unless there is a whole number (or a bool) for each sequence; where they
    are known, outside jit, also for less than 0 and more than `most`."""
    if counts.shape != (batch,) or counts.dtype.kind not in "iub":
        raise InputError(
            name,
            got=f"{counts.dtype} of shape {counts.shape}",
            expected=f"whole numbers or bools of shape ({batch},), one for each sequence",
            fix="give such an array, or None for all tokens",
        )
    if isinstance(counts, jax.core.Tracer) or not counts.size:
        return
    known = np.asarray(counts)
    if not 0 <= known.min() <= known.max() <= most:
        raise InputError(
            name,
            got=known.tolist(),
            expected=f"0 to the {most} tokens that there are",
            fix="count the real tokens of each sequence",
        )


def check_values(real: Array, **arrays: Array) -> None:
    """Raises `InputError` for NaN or infinity, where values are known: outside jit.

    Inside, a page with such a token reads as the codec says (see `Normalized`), mostly as NaN.

    Args:
      real: `[b]` or `[b, t]` bool, the tokens that count; arrays lead with the same axes.
    """
    for name, a in arrays.items():
        if isinstance(a, jax.core.Tracer) or isinstance(real, jax.core.Tracer) or not a.size:
            continue
        finite = np.isfinite(np.asarray(a, np.float32)).reshape(*real.shape, -1).all(-1)
        bad = (np.asarray(real) & ~finite).reshape(len(real), -1).any(-1)
        if bad.any():
            raise InputError(
                name,
                got=f"NaN or infinity in sequence {int(bad.argmax())}",
                expected="finite numbers",
                fix="look for what made them: packed, they would spoil a whole page",
            )


def check_room(cache: Cache, layer: Array | int, length: Array, layout: Layout) -> None:
    """Raises `InputError` where sequences would outgrow the cache or find no free page in its pool,
    outside jit; inside, they read as NaN.

    Args:
      length: `[b]`, tokens that each would hold; 0 where nothing is added.
    """
    most = cache.most_tokens(layer)
    if any(isinstance(a, jax.core.Tracer) for a in (length, most)) or length.size == 0:
        return
    over = np.asarray(length) > np.asarray(most)
    if over.any():
        row = int(over.argmax())
        raise InputError(
            "cache",
            got=f"token {int(length[row])}",
            expected=f"at most {int(most[row])} tokens",
            fix="init it with a larger capacity",
        )
    if cache.page_table is not None and not isinstance(cache.page_table, jax.core.Tracer):
        _check_pool(cache, layer, np.asarray(length), layout)


def _check_pool(cache: Cache, layer: Array | int, length: np.ndarray, layout: Layout) -> None:
    """Raises `InputError` for a sequence that has lost a page, or would: what `append` would do,
    on a copy of the page table."""
    assert cache.page_table is not None
    assert cache.page_readers is not None
    table, readers = np.array(cache.page_table[layer]), np.array(cache.page_readers[layer])
    packed, adds = np.array(cache.packed[layer]), length > 0
    lost = adds & (table == LOST).any(-1)
    if lost.any():
        raise InputError(
            "cache",
            got=f"sequence {int(lost.argmax())}, which found no free page before",
            expected="one that can be read",
            fix="`reset` it first",
        )
    due = np.where(adds, layout.packed_pages(length) - packed, 0)
    if due.sum() <= (readers == 0).sum():
        return
    while (due > 0).any():
        for row in np.argsort(-due, kind="stable")[: layout.encode_batch]:
            if due[row] <= 0:
                continue
            slot = packed[row] % table.shape[1]
            if table[row, slot] >= 0:
                readers[table[row, slot]] -= 1
            free = np.flatnonzero(readers == 0)
            if not free.size:
                raise InputError(
                    "cache",
                    got=f"{readers.size} pages in the pool, all read",
                    expected=f"a free one for sequence {row}",
                    fix="`reset` sequences that have ended, or init it with a larger pool",
                )
            table[row, slot], readers[free[0]] = free[0], 1
            packed[row], due[row] = packed[row] + 1, due[row] - 1
