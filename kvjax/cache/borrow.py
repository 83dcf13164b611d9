"""A block's attention for layers that only read a cache: another layer has taken the block in."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kvjax.cache.attend import attend_rows
from kvjax.cache.state import Cache
from kvjax.core.codec import Array
from kvjax.core.method import Method
from kvjax.core.pytree import pytree
from kvjax.core.storage import narrow_like


@pytree
class Windows:
    """Exact windows as they were before a block, of n layers: the first tokens of the block still
    see what the last ones have pushed out.

    Attributes:
      key, value: `[n, b, h, w, d]` as kept. positions: `[n, b, w]` int32, -1 where empty.
    """

    key: Array
    value: Array
    positions: Array

    def put(self, slot: Array, cache: Cache, layer: Array | int) -> Windows:
        """With the window of a layer in a slot."""
        write = lambda a, new: jax.lax.dynamic_update_index_in_dim(a, new[layer], slot, 0)
        return Windows(
            write(self.key, cache.window_key),
            write(self.value, cache.window_value),
            write(self.positions, cache.window_positions),
        )


def windows_like(cache: Cache, slots: int) -> Windows:
    """Room for the windows of so many layers of a cache."""
    room = lambda a: jnp.zeros((slots, *a.shape[1:]), a.dtype)
    return Windows(
        room(cache.window_key), room(cache.window_value), room(cache.window_positions) - 1
    )


def read_block(
    method: Method,
    cache: Cache,
    windows: Windows,
    q: Array,
    k: Array,
    v: Array,
    *,
    layer: Array | int,
    slot: Array | int,
    before: Array,
    count: Array,
    scale: float,
) -> Array:
    """What `extend` gives for other queries of the block that it has just added.

    Args:
      windows: from before the block; this layer's are in `slot`.
      q: `[b, t, h, g, d]`. k, v: `[b, t, h, d]`, those that were added.
      before: `[b]` int32, tokens in the cache before the block. count: `[b]`, how many are real.
    Returns:
      `[b, t, h, g, d]` in q's dtype; rows past `count` are meaningless.
    """
    b, t, h, g, d = q.shape
    layout = method.layout
    positions = before[:, None] + jnp.arange(t)  # [b, t]
    real = jnp.where(jnp.arange(t) < count[:, None], positions, -1)

    def join(window, block):  # a value that is a view of its key has no window
        block = block[..., : window.shape[-1]].swapaxes(1, 2)
        return jnp.concatenate([window[slot], narrow_like(block, window)], 2)

    rows = jnp.repeat(positions, g, axis=1)  # [b, t * g]
    out = attend_rows(
        method,
        cache,
        q.astype(jnp.float32).transpose(0, 2, 1, 3, 4).reshape(b, h, t * g, d) * scale,
        layer,
        position=rows,
        boundary=layout.sink + layout.page * layout.packed_pages(rows + 1),
        exact=(
            join(windows.key, k),  # [b, h, w + t, d]
            join(windows.value, v),
            jnp.concatenate([windows.positions[slot], real], 1),  # [b, w + t]
        ),
    )
    return out.reshape(b, h, t, g, d).transpose(0, 2, 1, 3, 4).astype(q.dtype)
