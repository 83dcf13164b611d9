"""Caches of millions of drawn tokens, filled page by page, with what exact attention makes of them.

One loop draws a few pages, encodes them into the cache, and adds them to the exact attention of all
queries: nothing is ever there of the history but the cache and one block. With a mesh every device
draws and encodes its own pages; random numbers belong to pages, so all meshes hold the same tokens.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from kvjax.attention.page_scan import Chunk, page_scan
from kvjax.cache import Cache, init
from kvjax.cache.pages import page_slots, pages_here, read_chunk
from kvjax.cache.update import slot_positions
from kvjax.core.errors import InputError
from kvjax.core.layout import Layout
from kvjax.core.method import Method
from kvjax.core.partial import EMPTY_LSE, Partial, dense_partial
from kvjax.core.pytree import pytree
from kvjax.core.storage import narrow_like, widen
from kvjax.evals.drawn_layer import DrawnLayer, draw_tokens
from kvjax.parallel import ShardingRules, make_mesh
from kvjax.parallel.place import shardings
from kvjax.parallel.rules import cache_specs, method_specs

Array = jax.Array

BLOCK = 512  # tokens that are drawn and encoded at a time
CHUNK = 512  # tokens unpacked at a time when the cache is read
_SINK = 2**30  # and on: numbers of the pages that sinks are the first tokens of


@pytree
class Tally:
    """What r queries of h heads find in a history, exactly and in codes.

    Attributes:
      exact: `out [h, r, d + 1]`, in the last channel the mean of exact less coded logits under the
        exact weights: with both `lse` it gives the KL of the two attentions.
      top, read_top: `[h, r]`, the largest exact and coded logit.
      read_lse: `[h, r]`, log-sum of the coded logits.
    """

    exact: Partial
    top: Array
    read_top: Array
    read_lse: Array

    @staticmethod
    def of(logits: Array, read: Array, values: Array, seen: Array) -> Tally:
        """Of t tokens: both logits `[h, r, t]`, values `[h, t, d]`, seen `[t]` or as logits."""
        gap = jnp.where(seen, logits - read, 0.0)
        logits, read = (jnp.where(seen, a, -jnp.inf) for a in (logits, read))
        top = jnp.maximum(logits.max(-1), EMPTY_LSE)
        p = jnp.exp(logits - top[..., None])
        total = p.sum(-1)
        out = jnp.concatenate([p @ values, (p * gap).sum(-1, keepdims=True)], -1)
        tiny = jnp.finfo(jnp.float32).tiny
        out = out / jnp.maximum(total, tiny)[..., None]
        lse = jnp.where(total > 0, top + jnp.log(jnp.maximum(total, tiny)), EMPTY_LSE)
        read_top = jnp.maximum(read.max(-1), EMPTY_LSE)
        sums = jnp.exp(read - read_top[..., None]).sum(-1)
        read_lse = jnp.where(sums > 0, read_top + jnp.log(jnp.maximum(sums, tiny)), EMPTY_LSE)
        return Tally(Partial(out, lse), top, read_top, read_lse)

    @staticmethod
    def empty(rows: tuple[int, int], d: int) -> Tally:
        """No token seen."""
        none = jnp.full(rows, EMPTY_LSE, jnp.float32)
        return Tally(Partial.empty(rows, d + 1), none, none, none)

    def merge(self, other: Tally) -> Tally:
        """Of the tokens of both."""
        return Tally(
            self.exact.merge(other.exact),
            jnp.maximum(self.top, other.top),
            jnp.maximum(self.read_top, other.read_top),
            jnp.logaddexp(self.read_lse, other.read_lse),
        )

    def merge_axis(self, axis: str) -> Tally:
        """Of the tokens of all devices of a mesh axis, inside a `shard_map`."""
        top = jax.lax.pmax(self.read_lse, axis)
        total = jax.lax.psum(jnp.exp(self.read_lse - top), axis)
        return Tally(
            self.exact.merge_axis(axis),
            jax.lax.pmax(self.top, axis),
            jax.lax.pmax(self.read_top, axis),
            top + jnp.log(total),
        )

    @property
    def kl(self) -> Array:
        """KL of coded from exact attention over all tokens, `[h, r]` nats."""
        return self.exact.out[..., -1] - self.exact.lse + self.read_lse


def one_device() -> ShardingRules:
    """The mesh of a single device."""
    return ShardingRules(make_mesh(1, 1, 1))


def history_length(layout: Layout, context: int) -> int:
    """Tokens of a cache with `context` packed ones: sink and recent window come on top."""
    return layout.sink + context + layout.recent


def empty_cache(
    method: Method, layer: DrawnLayer, context: int, rules: ShardingRules, room: int = 0
) -> Cache:
    """An empty cache of one layer and sequence for `context` packed tokens and `room` more.

    Raises:
      InputError: a context that pages or devices do not divide.
    """
    layout, heads = method.layout, layer.key_mean.shape[0]
    unit = layout.page * rules.sequence
    if context < unit or context % unit or heads % rules.heads or rules.data > 1:
        raise InputError(
            "context",
            got=f"{context} tokens and {heads} heads on a mesh {dict(rules.mesh.shape)}",
            expected=f"a multiple of {unit}, a page of {layout.page} on every device, and heads "
            "that their devices divide",
            fix="choose such a context, or another mesh",
        )

    def make() -> Cache:
        return init(
            method,
            capacity=history_length(layout, context) + room,
            kv_heads=heads,
            head_dim=layer.key_mean.shape[1],
            shards=rules.sequence,
            axis="sequence" if rules.sequence > 1 else None,
        )

    on = shardings(rules, cache_specs(jax.eval_shape(make)))
    return jax.jit(make, out_shardings=on)()


def fill(
    method: Method,
    cache: Cache,
    layer: DrawnLayer,
    q: Array,
    *,
    rng: Array,
    context: int,
    apart: Array,
    rules: ShardingRules,
) -> tuple[Cache, Tally]:
    """The cache with `context` drawn tokens packed, and windows; and what queries find in all.

    The cache is what `kvjax.prefill` would have made of the same tokens.

    Args:
      cache: of `empty_cache`; it is used up.
      q: `[h, r, d]`, scaled.
      apart: `[n]` int32, pages that the tally leaves out: for needles.
    """
    ready = filling(method, cache, layer, q, rng=rng, context=context, apart=apart, rules=rules)
    return ready(method, cache, layer, q, rng, apart)


def filling(
    method: Method,
    cache: Cache,
    layer: DrawnLayer,
    q: Array,
    *,
    rng: Array,
    context: int,
    apart: Array,
    rules: ShardingRules,
) -> jax.stages.Compiled:
    """The compiled program of `fill`, whose `memory_analysis` says what it takes."""
    page = method.layout.page
    here = context // page // rules.sequence  # page slots in use on a device
    together = max(c for c in range(1, here + 1) if here % c == 0 and c * page <= max(BLOCK, page))
    spec, rows = PartitionSpec, PartitionSpec("heads")
    shared = jax.shard_map(
        functools.partial(_fill_here, here=here, together=together, context=context),
        mesh=rules.mesh,
        in_specs=(*_specs(method, cache), _layer_specs(), rows, spec(), spec()),
        out_specs=(cache_specs(cache), rows),
        check_vma=False,
    )
    made = jax.jit(shared, donate_argnums=1)
    return made.lower(method, cache, layer, q, rng, apart).compile()


def _specs(method: Method, cache: Cache) -> tuple[Method, Cache]:
    heads = cache.window_key.shape[2]
    return method_specs(method, heads, stacked=False), cache_specs(cache)


def _layer_specs() -> DrawnLayer:
    specs: dict[str, Any] = {
        field.name: PartitionSpec("heads") for field in dataclasses.fields(DrawnLayer)
    }
    return DrawnLayer(**specs | {"frequencies": PartitionSpec()})


def _fill_here(method, cache, layer, q, rng, apart, *, here: int, together: int, context: int):
    """`fill` on one device: its heads, and every n-th page of them."""
    layout, slots = method.layout, page_slots(cache)
    shards, shard = cache.shards, jax.lax.axis_index("sequence")
    prepared = method.key.prepare(q[None, :, None])

    def block(i, carry):
        cache, tally = carry
        pages = (i * together + jnp.arange(together)) * shards + shard
        k, v = drawn_pages(layer, rng, pages, layout)  # [h, c, p, d]
        code = encode_pages(method, k, v, pages)
        put = lambda a, new: jax.lax.dynamic_update_slice(
            a, new[None], (0, 0, 0, i * together, *[0] * (a.ndim - 4))
        )
        key, value = jax.tree.map(put, (cache.key_pages, cache.value_pages), code)
        cache = dataclasses.replace(cache, key_pages=key, value_pages=value)
        read = method.key.logits(prepared, code[0])[0]  # [h, c, r, p]
        flat = lambda a: a.reshape(a.shape[0], -1, a.shape[-1])  # [h, c * p, d]
        seen = ~(pages[:, None] == apart).any(-1)
        found = Tally.of(
            jnp.einsum("hrd,htd->hrt", q, flat(k)),
            read.swapaxes(1, 2).reshape(*q.shape[:2], -1),
            flat(v),
            jnp.repeat(seen, layout.page),
        )
        return cache, tally.merge(found)

    start = cache, Tally.empty(q.shape[:2], q.shape[2])
    cache, tally = jax.lax.fori_loop(0, here // together, block, start)
    cache, exact = _with_windows(layout, cache, layer, q, rng, context)
    slot = jnp.arange(slots)
    starts = layout.sink + layout.page * (slot * shards + shard)
    starts = jnp.where(slot < here, starts, -1).astype(jnp.int32)
    packed = jnp.full_like(cache.packed, context // layout.page)
    cache = dataclasses.replace(cache, page_starts=starts[None, None], packed=packed)
    return cache, tally.merge_axis("sequence").merge(exact)


def _with_windows(layout: Layout, cache: Cache, layer, q, rng, context: int) -> tuple[Cache, Tally]:
    """The cache with its exact tokens, and what queries find in them."""
    length = history_length(layout, context)
    ring = layout.sink + context - layout.page + jnp.arange(layout.ring)  # positions
    pages = context // layout.page + jnp.arange(-1, layout.recent // layout.page)
    sinks = -(-layout.sink // layout.page)
    numbers = jnp.concatenate([_SINK + jnp.arange(sinks), pages])
    starts = jnp.concatenate([layout.page * jnp.arange(sinks), ring[:: layout.page]])
    drawn = draw_tokens(layer, rng, numbers, starts[:, None] + jnp.arange(layout.page))
    flat = (a.reshape(a.shape[0], -1, a.shape[-1]) for a in drawn)
    after = sinks * layout.page
    k, v = (jnp.concatenate([a[:, : layout.sink], a[:, after:]], 1) for a in flat)
    at = slot_positions(layout, cache, jnp.full_like(cache.length[0], length))  # [1, w]
    index = jnp.where(at[0] < layout.sink, at[0], layout.sink + at[0] - ring[0])
    put = lambda a, new: narrow_like(new[:, index], a)[None, None]
    cache = dataclasses.replace(
        cache,
        window_key=put(cache.window_key, k),
        window_value=put(cache.window_value, v),
        window_positions=at[None],
        length=jnp.full_like(cache.length, length),
    )
    packed = jnp.arange(k.shape[1])
    exact = (packed < layout.sink) | (packed >= layout.sink + layout.page)
    rounded = widen(narrow_like(k, cache.window_key))
    logits = lambda keys: jnp.einsum("hrd,htd->hrt", q, keys)
    return cache, Tally.of(logits(k), logits(rounded), v, exact)


def drawn_pages(layer: DrawnLayer, rng: Array, pages: Array, layout: Layout) -> tuple[Array, Array]:
    """Keys and values `[h, n, p, d]` of pages by their numbers `[n]`."""
    return draw_tokens(layer, rng, pages, _positions(layout, pages))


def _positions(layout: Layout, pages: Array) -> Array:
    return layout.sink + layout.page * pages[:, None] + jnp.arange(layout.page)  # [n, p]


def encode_pages(method: Method, k: Array, v: Array, pages: Array):
    """Codes of keys and values `[h, n, p, d]` as a cache has them, leaves `[1, h, n, ...]`."""
    at = _positions(method.layout, pages)
    k, v = (a.astype(jnp.bfloat16).astype(jnp.float32)[None] for a in (k, v))
    return method.key.encode(k, at[None, None]), method.value.encode(v, at[None, None])


def read_cache(
    method: Method, cache: Cache, q: Array, *, apart: Array, rules: ShardingRules
) -> Partial:
    """What queries `[h, r, d]` read from a cache that is past its last token: `[h, r, d]`.

    As `kvjax.attend`, for any number of queries, with the log-sum kept, and without the pages
    `apart`.
    """
    rows = PartitionSpec("heads")
    shared = jax.shard_map(
        _read_here,
        mesh=rules.mesh,
        in_specs=(*_specs(method, cache), rows, PartitionSpec()),
        out_specs=rows,
        check_vma=False,
    )
    return jax.jit(shared)(method, cache, q, apart)


def _read_here(method: Method, cache: Cache, q: Array, apart: Array) -> Partial:
    layout = method.layout
    count = max(1, min(page_slots(cache), CHUNK // layout.page))

    def read(i):
        chunk = read_chunk(cache, 0, i * count, count)
        page = (chunk.starts - layout.sink) // layout.page  # [1, c]
        hidden = (chunk.starts < 0) | (page[..., None] == apart).any(-1)
        at = jnp.where(hidden[..., None], -1, chunk.starts[..., None] + jnp.arange(layout.page))
        return Chunk(chunk.key, chunk.value, at[:, None])

    visible = lambda at: jnp.broadcast_to(
        at[..., None, :] >= 0, (*at.shape[:-1], q.shape[1], at.shape[-1])
    )
    chunks = -(-pages_here(cache, 0) // count)
    packed = page_scan(method.key, method.value, read, chunks, q[None], visible)
    packed = packed.merge_axis("sequence")
    at = cache.window_positions[0, :, None]  # [1, 1, w]
    mask = (at >= layout.sink + layout.page * cache.packed[0, 0]) | ((at < layout.sink) & (at >= 0))
    exact = dense_partial(q[None], cache.window_key[0], cache.window_value[0], mask[:, None])
    return jax.tree.map(lambda a: a[0], exact.merge(packed))
