"""The two loops of an index under jit: encode page by page, and score page by page.

Everything here is shape in, shape out; `Index` checks what it is given and keeps the books.
"""

from __future__ import annotations

import functools
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from kvjax.codecs.transforms import exact_matmul
from kvjax.core.codec import Array, Code, Codec
from kvjax.core.pytree import pytree, static

Metric = Literal["ip", "l2"]
METRICS = get_args(Metric)
Ranked = tuple[Array, Array]  # scores [m, k] float32, best first, and ids [m, k] int32

_CHUNK = 2**21  # numbers in the largest array of one step of a loop: 8 MiB of float32


@pytree
class Pages:
    """Packed pages, and what the metric needs beside them.

    Attributes:
      code: leaves `[n, ...]`.
      square: `[n, p]` float32, `|x_hat|^2`; None for inner products.
    """

    code: Code
    square: Array | None


@pytree
class Store:
    """All that a search reads. A pytree of one structure, so that compilations are shared.

    Attributes:
      pages: page slots.
      filled: int32 scalar, how many slots hold a page; the others are padding.
      tail: `[r, d]` float32, the exact vectors after the last page.
    """

    codec: Codec
    pages: Pages
    filled: Array
    tail: Array
    page: int = static()
    metric: Metric = static()


def empty_pages(codec: Codec, d: int, page: int, metric: Metric, count: int) -> Pages:
    """`count` page slots of zeros."""
    shape = jax.eval_shape(functools.partial(_encode_page, codec, metric), _spec(page, d))
    return jax.tree.map(lambda a: jnp.zeros((count, *a.shape), a.dtype), shape)


def pages_at_once(d: int, page: int) -> int:
    """How many pages `encode` is given: 8 MiB of float32 vectors and 32 pages at most."""
    return max(1, min(32, _CHUNK // (page * d)))


@functools.partial(jax.jit, static_argnames="metric")
def encode(codec: Codec, x: Array, count: Array, metric: Metric) -> tuple[Pages, Array]:
    """The first `count` of the pages `x: [c, p, d]`, each encoded alone, and which are finite.

    Pages go through one loop with a traced bound, whatever their number: so a page has one code,
    no matter in what company it came, and a codec is compiled once.

    Returns:
      Pages with c slots, zeros from `count` on, and `[c]` bool: no scale or norm overflowed.
    """
    slots = empty_pages(codec, x.shape[2], x.shape[1], metric, x.shape[0])

    def body(i, carry):
        pages, finite = carry
        new = _encode_page(codec, metric, x[i])
        put = lambda a, b: jax.lax.dynamic_update_index_in_dim(a, b, i, 0)
        return jax.tree.map(put, (pages, finite), (new, _all_finite(new)))

    return jax.lax.fori_loop(0, count, body, (slots, jnp.ones(x.shape[0], bool)))


@functools.partial(jax.jit, static_argnames="k")
def search(store: Store, queries: Array, k: int) -> Ranked:
    """The k best of all vectors for each of `queries: [m, d]`; the lower id wins a tie."""
    return _with_tail(store, queries, _scan(store, queries, k), k)


@functools.partial(jax.jit, static_argnames=("k", "mesh", "axis"))
def search_sharded(store: Store, queries: Array, k: int, mesh: Mesh, axis: str) -> Ranked:
    """`search` of pages that lie along a mesh axis.

    Each device takes the k best of its own pages; `[devices, m, k]` scores and ids are all that
    travels. Pages are in order along the axis, so that ties end as they do on one device.
    """
    replicated, split = PartitionSpec(), PartitionSpec(axis)

    # The merged result is the same everywhere because all devices rank the same gathered lists;
    # the checker of replication cannot know it.
    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(replicated, split, replicated, replicated),
        out_specs=(replicated, replicated),
        check_vma=False,
    )
    def ranked(codec, pages, filled, queries):
        slots = jax.tree.leaves(pages)[0].shape[0]
        first = jax.lax.axis_index(axis) * slots
        none = jnp.zeros((0, queries.shape[1]), jnp.float32)  # the tail comes after the merge
        local = Store(codec, pages, filled - first, none, store.page, store.metric)
        scores, ids = _scan(local, queries, k)
        gathered = jax.lax.all_gather((scores, ids + first * store.page), axis)  # [devices, m, k]
        scores, ids = jax.tree.map(lambda a: jnp.concatenate(list(a), -1), gathered)
        return _best(scores, ids, k)

    best = ranked(store.codec, store.pages, store.filled, queries)
    return _with_tail(store, queries, best, k)


@jax.jit
def decode(codec: Codec, code: Code) -> Array:
    """Reconstructions of all pages, `[n, p, d]` float32, in the loop's memory and the result's."""
    return jax.lax.map(codec.decode, code)


def _encode_page(codec: Codec, metric: Metric, x: Array) -> Pages:
    code = codec.encode(x)
    if metric == "ip":
        return Pages(code, None)
    return Pages(code, jnp.square(codec.decode(code)).sum(-1))


def _all_finite(pages: Pages) -> Array:
    leaves = [a for a in jax.tree.leaves(pages) if jnp.issubdtype(a.dtype, jnp.floating)]
    return functools.reduce(jnp.logical_and, (jnp.isfinite(a).all() for a in leaves), jnp.bool_(1))


def _scan(store: Store, queries: Array, k: int) -> Ranked:
    """The k best of the packed pages; -inf and no id where there are fewer than k vectors."""
    m, d = queries.shape
    slots = jax.tree.leaves(store.pages)[0].shape[0]
    none = jnp.full((m, k), -jnp.inf), jnp.full((m, k), -1, jnp.int32)
    if not slots:
        return none
    prepared = store.codec.prepare(queries)
    count = min(slots, max(1, _CHUNK // (store.page * max(d, m))))  # pages of one step
    offsets = jnp.arange(count * store.page, dtype=jnp.int32)

    def body(i, best):
        # The last chunk starts early enough to be whole; what it repeats is masked.
        start = jnp.minimum(i * count, slots - count)
        chunk = jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, start, count), store.pages)
        scores = _scores(store, queries, prepared, chunk)  # [m, c p]
        ids = start * store.page + offsets
        new = (ids >= i * count * store.page) & (ids < store.filled * store.page)
        top, at = jax.lax.top_k(jnp.where(new, scores, -jnp.inf), min(k, len(offsets)))
        found = jnp.where(top > -jnp.inf, ids[at], -1)
        return _best(*_joined(best, (top, found)), k)

    return jax.lax.fori_loop(0, -(-slots // count), body, none)


def _scores(store: Store, queries: Array, prepared, chunk: Pages) -> Array:
    """Scores with a chunk of c pages, `[m, c p]`. The pages are mapped over and the queries are
    not, which makes one product of all of them."""
    logits = jax.vmap(store.codec.logits, (None, 0), 1)(prepared, chunk.code)  # [m, c, p]
    scores = logits.reshape(len(queries), -1)
    if chunk.square is None:
        return scores
    return _minus_distance(queries, scores, chunk.square.reshape(-1))


def _minus_distance(queries: Array, dots: Array, square: Array) -> Array:
    """`-|q - x|^2` from inner products `[m, n]` and `|x|^2: [n]`."""
    return 2 * dots - square - jnp.square(queries).sum(-1, keepdims=True)


def _with_tail(store: Store, queries: Array, best: Ranked, k: int) -> Ranked:
    if not len(store.tail):
        return best
    scores = exact_matmul(queries, store.tail.T)  # [m, r]
    if store.metric == "l2":
        scores = _minus_distance(queries, scores, jnp.square(store.tail).sum(-1))
    ids = store.filled * store.page + jnp.arange(len(store.tail), dtype=jnp.int32)
    ids = jnp.broadcast_to(ids, scores.shape)
    return _best(*_joined(best, (scores, ids)), k)


def _joined(a: Ranked, b: Ranked) -> Ranked:
    return jnp.concatenate([a[0], b[0]], -1), jnp.concatenate([a[1], b[1]], -1)


def _best(scores: Array, ids: Array, k: int) -> Ranked:
    """The k best of lists whose ties are in the order of their ids."""
    top, at = jax.lax.top_k(scores, k)
    return top, jnp.take_along_axis(ids, at, -1)


def _spec(page: int, d: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((page, d), jnp.float32)
