"""What a policy kept of a history: packed pages of any tokens, different ones in every head."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from kvjax.attention.encode_kernel import encode_page
from kvjax.attention.page_scan import Chunk, page_scan
from kvjax.core.codec import Array, Code
from kvjax.core.method import Method
from kvjax.core.partial import Partial
from kvjax.core.pytree import pytree
from kvjax.policies.rerotate import rerotate

_LAST = jnp.iinfo(jnp.int32).max


@pytree
class Kept:
    """Packed survivors of an eviction, of l layers, b sequences and h KV heads; only read.

    Invariants: a head's tokens are in order of position, from its first page on; pages that no
    head holds take no memory when there is a pool.

    Attributes:
      key, value: codes, leaves `[l, b, h, n, ...]`, or `[pool, ...]` with a table.
      positions: int32 `[l, b, h, n, p]` or `[pool, p]`, where every token's key stands in the
        rotary frame, -1 where there is none.
      bias: float16, added to the logits (the log of how many tokens were merged into one), shaped
        like positions; or None.
      table: `[l, b, h, n]` int32 into the pool, -1 for none; None where all heads hold n pages.
      used: `[l]` int32, pages that some head of the layer holds.
      most: `[l, b]` int32, tokens in all that the pages of the cache around it have room for.
    """

    key: Code
    value: Code
    positions: Array
    bias: Array | None
    table: Array | None
    used: Array
    most: Array

    @property
    def page(self) -> int:
        """Tokens per page."""
        return self.positions.shape[-1]


@pytree
class Exact:
    """Tokens of one layer, exact, in any order.

    Attributes:
      key, value: `[b, h, s, d]` float32. positions: `[b, h, s]` int32, -1 where there is none.
      weight: `[b, h, s]` float32, how many tokens each stands for; None is one.
      place: `[b, h, s]` int32, where the key is turned to; None is its position.
    """

    key: Array
    value: Array
    positions: Array
    weight: Array | None = None
    place: Array | None = None

    def take(self, index: Array, valid: Array) -> Exact:
        """Slots `index: [b, h, n]`; where `valid` is False there is no token."""
        rows = lambda a: jnp.take_along_axis(a, index[..., None], 2)
        notes = lambda a: jnp.take_along_axis(a, index, 2)
        return Exact(
            rows(self.key),
            rows(self.value),
            jnp.where(valid, notes(self.positions), -1),
            None if self.weight is None else notes(self.weight),
            None if self.place is None else notes(self.place),
        )

    def close_up(self, length: Array, frequencies: Array) -> Exact:
        """Keys turned so that the last token stands just before position `length: [b]`, and no gap
        is left between them."""
        order = jnp.argsort(jnp.where(self.positions < 0, _LAST, self.positions), axis=-1)
        rank = jnp.argsort(order, axis=-1)
        held = (self.positions >= 0).sum(-1, keepdims=True)
        place = (length[:, None, None] - held + rank).astype(jnp.int32)
        place = jnp.where(self.positions < 0, self.positions, place)
        key = rerotate(self.key, self.positions, place, frequencies)
        return dataclasses.replace(self, key=key, place=place)

    def first(self, count: int, wanted: Array) -> Exact:
        """The `count` tokens of lowest position among those wanted, `[b, h, s]` bool.

        Slots past the last one repeat it (so that statistics of a page see real vectors only),
        with position -1.
        """
        order = jnp.argsort(jnp.where(wanted, self.positions, _LAST), axis=-1)
        number = wanted.sum(-1, keepdims=True)  # [b, h, 1]
        slot = jnp.arange(count)
        at = jnp.minimum(slot, jnp.maximum(number - 1, 0))
        at = jnp.minimum(at, order.shape[-1] - 1)
        return self.take(jnp.take_along_axis(order, at, 2), slot < number)


def encode_pages(method: Method, tokens: Exact) -> tuple[Code, Code, Array, Array | None]:
    """Codes of whole pages of tokens.

    Args:
      tokens: `[b, h, n * page, ...]`.
    Returns:
      Key and value codes with leaves `[b, h, n, ...]`, positions `[b, h, n, p]`, bias or None.
    """
    page = method.layout.page
    split = lambda a: a.reshape(*a.shape[:2], -1, page, *a.shape[3:])
    at = split(tokens.positions)
    if tokens.place is not None:
        at = jnp.where(at < 0, at, split(tokens.place))
    encode = functools.partial(encode_page, method, positions=jnp.maximum(at, 0))
    key, value = encode(method.key, split(tokens.key)), encode(method.value, split(tokens.value))
    if tokens.weight is None:
        return key, value, at, None
    bias = jnp.log(jnp.maximum(split(tokens.weight), 1))
    return key, value, at, bias.astype(jnp.float16)


def attend_kept(
    method: Method, kept: Kept, q: Array, layer: Array | int, chunk_tokens: int = 512
) -> Partial:
    """Attention of queries `[b, h, r, d]` (float32, scaled) over all that was kept: it is older
    than any of them."""
    slots = (kept.positions.shape[3:4] if kept.table is None else kept.table.shape[3:])[0]
    count = max(1, min(slots, chunk_tokens // kept.page))

    def read(i):
        first = i * count
        begin = jnp.minimum(first, slots - count)
        unread = (begin + jnp.arange(count) >= first)[:, None]
        if kept.table is None:
            take = lambda a: _slice(a, layer, begin, count)
            positions = take(kept.positions)
        else:
            ids = _slice(kept.table, layer, begin, count)  # [b, h, c]
            take = lambda a: a[jnp.maximum(ids, 0)]
            positions = jnp.where(ids[..., None] >= 0, take(kept.positions), -1)
        key, value = jax.tree.map(take, (kept.key, kept.value))
        bias = None if kept.bias is None else take(kept.bias).astype(jnp.float32)
        return Chunk(key, value, jnp.where(unread, positions, -1), bias)

    visible = lambda positions: (positions >= 0)[..., None, :]
    return page_scan(method.key, method.value, read, -(-kept.used[layer] // count), q, visible)


def _slice(a: Array, layer: Array | int, begin: Array, count: int) -> Array:
    """`a[layer, :, :, begin : begin + count]`."""
    start = [jnp.asarray(s, jnp.int32) for s in (layer, 0, 0, begin, *[0] * (a.ndim - 4))]
    size = [1, *a.shape[1:3], count, *a.shape[4:]]
    return jax.lax.dynamic_slice(a, start, size)[0]
