"""The cache of a stack of alike layers: one pytree of fixed shapes, updated in place under jit."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kvjax.cache.kept import Kept
from kvjax.codecs import View
from kvjax.core.codec import Array, Code
from kvjax.core.errors import InputError
from kvjax.core.method import Method
from kvjax.core.pytree import pytree, static
from kvjax.core.storage import kept_dtype


@pytree
class Cache:
    """Keys and values of `l` layers, `b` sequences and `h` KV heads.

    Invariants: every leaf leads with `[l, b, ...]` (pages of a shared pool with `[l, pool, ...]`);
    a token is exact in its window slot or packed in one page, never read from both; the position
    of a slot is stored, never inferred from its index.

    Attributes:
      window_key, window_value: `[l, b, h, w, d]`, slots 0..sink-1 the sink, then the recent ring;
        bf16 is kept as uint16 bits (see `core.storage`). Values that are a `View` of their keys
        have no window, `[..., 0]`, and no pages.
      window_positions: `[l, b, w]` int32, -1 where empty.
      key_pages, value_pages: codes, leaves `[l, b, h, n, ...]`, or `[l, pool, h, ...]` if paged.
      page_starts: position of each page's first token, -1 where empty; `[l, b, n]` or `[l, pool]`.
      page_table: `[l, b, n]` int32 into the pool, or None when contiguous; -1 unset, -2 where a
        sequence wanted a page and none was free (see `pages.overflow`).
      page_readers: `[l, pool]` int32, how many entries of the table name each page, or None; a page
        is free where that is 0.
      length: `[l, b]` int32, tokens appended.
      packed: `[l, b]` int32, pages encoded.
      capacity: tokens that fit; a longer sequence reads as NaN, never as something else.
      window: tokens that a query sees back from itself, or None.
      kept: what a policy kept of an earlier history, packed and never changed; or None.
      shards: devices that pages are dealt to in turn: page i to device i mod shards, which has it
        in its slot i div shards. Slots of a device lie together.
      axis: name of the mesh axis of those devices; the functions of a cache with more than one
        shard run inside a `shard_map` over it.
      pool_part: pages of the pool on one device, or None. Where that is not all of them the table
        counts within the part of its device: parts of the sequences come first, then shards.
    """

    window_key: Array
    window_value: Array
    window_positions: Array
    key_pages: Code
    value_pages: Code
    page_starts: Array
    page_table: Array | None
    page_readers: Array | None
    length: Array
    packed: Array
    capacity: int = static()
    window: int | None = static(default=None)
    kept: Kept | None = None
    shards: int = static(default=1)
    axis: str | None = static(default=None)
    pool_part: int | None = static(default=None)

    def history(self) -> list[Array]:
        """The leaves that hold packed tokens and all that is needed to read them."""
        table = [] if self.page_table is None else [self.page_table]
        pages = jax.tree.leaves((self.key_pages, self.value_pages, self.kept))
        return [*pages, self.page_starts, *table]

    def most_tokens(self, layer: Array | int) -> Array:
        """`[b]` int32, the longest that each sequence of a layer can get."""
        most = jnp.full_like(self.length[layer], self.capacity)
        return most if self.kept is None else jnp.minimum(most, self.kept.most[layer])


def init(
    method: Method,
    *,
    capacity: int,
    kv_heads: int,
    head_dim: int,
    batch: int = 1,
    layers: int = 1,
    window: int | None = None,
    dtype=jnp.bfloat16,
    shards: int = 1,
    axis: str | None = None,
    parts: int = 1,
) -> Cache:
    """An empty cache.

    Args:
      capacity: most tokens per sequence.
      window: sliding attention window; the cache then keeps only the pages that it can reach.
      dtype: of the exact sink and recent window.
      shards, axis: devices that pages are dealt to, and their mesh axis; see `kvjax.parallel`.
      parts: devices that the sequences are split over; counts only where there is a pool, of which
        each then has a part.
    Raises:
      InputError: head_dim or page that the method does not take; a view of keys that do not hold
        it; sizes under 1; more than one shard without an axis; a pool or a batch that does not
        split.

    Example:
      >>> import kvjax
      >>> method = kvjax.methods.get("turboquant-3", head_dim=64)
      >>> cache = init(method, capacity=1024, kv_heads=2, head_dim=64)
      >>> cache.window_key.shape
      (1, 1, 2, 132, 64)
    """
    method.check(head_dim)
    if isinstance(method.value, View):
        method.value.check_key(method.key)
    sizes = {"capacity": capacity, "kv_heads": kv_heads, "batch": batch, "layers": layers}
    for name, size in sizes.items():
        if size < 1:
            raise InputError(name, got=size, expected="1 or more", fix="raise it")
    if window is not None and window < 1:
        raise InputError("window", got=window, expected="1 or more", fix="None sees all")
    if shards < 1 or (shards > 1 and axis is None):
        raise InputError(
            "shards",
            got=f"{shards}, axis {axis}",
            expected="1 or more, and a mesh axis for more than one",
            fix="leave both out, or use sharding rules",
        )
    layout = method.layout
    slots = layout.sink + layout.ring
    n = -(-layout.page_slots(capacity, window) // shards) * shards
    exact = (layers, batch, kv_heads, slots, head_dim)
    pool, part = layout.pool, None
    if pool is not None:
        part = pool_part(pool, parts, shards)
        if batch % parts:
            raise InputError(
                "batch",
                got=f"{batch} sequences in {parts} parts",
                expected="a multiple",
                fix="pad the batch, or make the axis data smaller",
            )
    pages = (batch, kv_heads, n) if pool is None else (pool, kv_heads)

    def empty(codec):
        page = jax.ShapeDtypeStruct((1, 1, 1, layout.page, head_dim), jnp.float32)
        positions = jax.ShapeDtypeStruct((1, 1, 1, layout.page), jnp.int32)
        code = jax.eval_shape(codec.encode, page, positions)
        return jax.tree.map(lambda a: jnp.zeros((layers, *pages, *a.shape[3:]), a.dtype), code)

    view = isinstance(method.value, View)

    # Filled rather than shared: every leaf needs its own buffer to be donated.
    full = lambda shape, value: jnp.full(shape, value, jnp.int32)
    return Cache(
        window_key=jnp.zeros(exact, kept_dtype(dtype)),
        window_value=jnp.zeros((*exact[:-1], 0 if view else head_dim), kept_dtype(dtype)),
        window_positions=full((layers, batch, slots), -1),
        key_pages=empty(method.key),
        value_pages=() if view else empty(method.value),
        page_starts=full((layers, batch, n) if pool is None else (layers, pool), -1),
        page_table=None if pool is None else full((layers, batch, n), -1),
        page_readers=None if pool is None else full((layers, pool), 0),
        length=full((layers, batch), 0),
        packed=full((layers, batch), 0),
        capacity=capacity,
        window=window,
        shards=shards,
        axis=axis,
        pool_part=part,
    )


def pool_part(pool: int, parts: int, shards: int) -> int:
    """Pages of a pool on each of `parts x shards` devices.

    Raises:
      InputError: a pool that they do not divide.
    """
    if parts < 1 or pool % (parts * shards):
        raise InputError(
            "pool",
            got=f"a shared pool of {pool} pages over {parts} x {shards} devices (data x sequence)",
            expected="as many pages on each of them",
            fix="use a multiple, or another mesh",
        )
    return pool // (parts * shards)


def cache_bytes(cache: Cache) -> int:
    """Bytes of all leaves: what the cache takes in memory (also of its `jax.eval_shape`)."""
    return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(cache))


def history_bits_per_value(method: Method, cache: Cache) -> float:
    """True bits per value of the packed history: codes, scales, norms, positions, page table.

    Values that are a `View` of their keys are not counted: there is one number for both.
    """
    heads = cache.window_key.shape[2]
    width = cache.window_key.shape[4] + cache.window_value.shape[4]
    tokens = float(cache.page_starts.size * method.layout.page)
    if cache.kept is not None:  # heads differ in their tokens
        tokens += cache.kept.positions.size / heads
    total = sum(a.size * a.dtype.itemsize for a in cache.history())
    return total * 8 / (tokens * heads * width)
