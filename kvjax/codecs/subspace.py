"""Vectors by their coordinates in a subspace, of one head or of several heads together."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kvjax.codecs.transforms import exact_matmul
from kvjax.core.codec import Acc, Array, Code, Codec, Prepared
from kvjax.core.errors import InputError
from kvjax.core.pytree import pytree, static


@pytree
class Subspace(Codec):
    """`inner` on the r coordinates `z = x D` of vectors `x: [d]`, with `x_hat = z_hat U^T`.

        <q, x_hat> = <q U, z_hat>        sum_t p_t x_hat_t = (sum_t p_t z_hat_t) U^T

    The query goes through U once per step and the output comes back once per step; in between there
    are r numbers per token, and only they are packed. D and U are the same where the basis is
    orthonormal.

    With `group_heads` = s the vectors of s neighbouring KV heads are one vector of `s d` channels
    with r coordinates. All r of a token are coded as one vector, so that scales are paid for once
    per token and group, and each of the s heads keeps those of one s-th of the page's tokens. A
    head's logits come from what all heads of its group keep, with r products per token where it
    would have `r / s` alone. The heads must lie on one device, and must have kept the same tokens.

    Args:
      down, up: `[d, r]`, or `[h, 1, d, r]` for those of each KV head; of a group, the rows of head
        i are `down[i]`, and columns belong to the group.
      inner: codec of r coordinates; arrays that differ by head must be alike within a group.
      group_heads: how many KV heads share coordinates. Beyond 1 pages must be `[b, h, n, t, d]`, as
        a cache has them, and t a multiple of it.

    Source: Palu's group-head low-rank decomposition, arXiv 2407.21118.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from kvjax.codecs import Dense
      >>> basis = jnp.linalg.qr(jax.random.normal(jax.random.key(0), (16, 4)))[0]
      >>> codec = Subspace(basis, basis, Dense(jnp.float32))
      >>> x = jax.random.normal(jax.random.key(1), (8, 4)) @ basis.T
      >>> code = codec.encode(x)
      >>> code.shape, bool(abs(codec.decode(code) - x).max() < 1e-5)
      ((8, 4), True)
    """

    down: Array
    up: Array
    inner: Codec
    group_heads: int = static(default=1)

    def check(self, head_dim: int, page: int) -> None:
        *lead, d, rank = self.down.shape
        size = self.group_heads
        if self.up.shape != self.down.shape or d != head_dim:
            raise InputError(
                "subspace",
                got=f"maps of {list(self.down.shape)} and {list(self.up.shape)}",
                expected=f"two of [..., {head_dim}, r]",
                fix="build the method for this head_dim",
            )
        if size < 1 or (size > 1 and (len(lead) != 2 or lead[0] % size)):
            raise InputError(
                "group_heads",
                got=f"{size} of {lead[0] if lead else 'unnamed'} KV heads",
                expected="a divisor of the KV heads, and maps for each head",
                fix="choose another group",
            )
        if not 0 < rank <= size * d:
            raise InputError(
                "rank",
                got=f"{rank} for {size} heads of {d}",
                expected=f"1 to {size * d}",
                fix="choose such a rank",
            )
        if page % size:
            raise InputError(
                "page",
                got=f"{page} tokens for {size} heads that share coordinates",
                expected=f"a multiple of {size}",
                fix=f"use pages of {16 * size} tokens or a multiple of it, or group_heads=1",
            )
        self.inner.check(rank, page // size)

    def encode(self, x: Array, positions: Array | None = None) -> Code:
        self._check_heads(x)
        z = exact_matmul(x, self.down)  # [..., t, r]
        if self.group_heads > 1:
            z = _group(z, self.group_heads).sum(2)  # [b, G, n, t, r]
            z = z.reshape(*z.shape[:3], self.group_heads, -1, z.shape[-1])
            z = _ungroup(jnp.moveaxis(z, 3, 2))  # [b, h, n, t/s, r]
        return self.inner.encode(z, positions)

    def decode(self, code: Code) -> Array:
        z = self.inner.decode(code)
        if self.group_heads > 1:
            z = jnp.moveaxis(_group(z, self.group_heads), 2, 3)  # [b, G, n, s, t/s, r]
            z = z.reshape(*z.shape[:3], -1, z.shape[-1])
            z = jnp.repeat(z, self.group_heads, 1)  # [b, h, n, t, r]
        return exact_matmul(z, jnp.swapaxes(self.up, -1, -2))

    def prepare(self, q: Array) -> Prepared:
        q = exact_matmul(q, self.up)  # [..., g, r]
        if self.group_heads > 1:  # the rows of all heads, for what each of them keeps
            q = jnp.moveaxis(_group(q, self.group_heads), 2, 3)  # [b, G, n, s, g, r]
            q = q.reshape(*q.shape[:3], -1, q.shape[-1])
            q = jnp.repeat(q, self.group_heads, 1)  # [b, h, n, s g, r]
        return self.inner.prepare(q)

    def logits(self, prepared: Prepared, code: Code) -> Array:
        logits = self.inner.logits(prepared, code)
        if self.group_heads > 1:
            logits = _group(logits, self.group_heads)  # [b, G, keeper, n, s g, t/s]
            logits = logits.reshape(*logits.shape[:4], self.group_heads, -1, logits.shape[-1])
            logits = _ungroup(jnp.moveaxis(logits, (4, 3, 5, 2), (2, 3, 4, 5)))
            logits = logits.reshape(*logits.shape[:4], -1)  # [b, h, n, g, t]
        return logits

    def accumulate(self, p: Array, code: Code) -> Acc:
        if self.group_heads == 1:
            return self.inner.accumulate(p, code)
        p = _group(p, self.group_heads)  # [b, G, s, n, g, t]
        p = p.reshape(*p.shape[:5], self.group_heads, -1)
        p = _ungroup(jnp.moveaxis(p, (5, 3, 2, 4), (2, 3, 4, 5)))  # [b, keeper, n, s, g, t/s]
        p = p.reshape(*p.shape[:3], -1, p.shape[-1])
        return jax.tree.map(self._own_rows, self.inner.accumulate(p, code))

    def restore(self, acc: Acc) -> Array:
        return exact_matmul(self.inner.restore(acc), jnp.swapaxes(self.up, -1, -2))

    def _own_rows(self, a: Array) -> Array:
        """Each head's rows, summed over what the heads of its group keep, h of them:
        `[b, h, n, s g, ...] -> [b, h, n, g, ...]`."""
        a = _group(a, self.group_heads).sum(2)  # [b, G, n, s g, ...]
        a = a.reshape(*a.shape[:3], self.group_heads, -1, *a.shape[4:])
        return _ungroup(jnp.moveaxis(a, 3, 2))

    def _check_heads(self, x: Array) -> None:
        heads = self.down.shape[0]
        if self.group_heads > 1 and (x.ndim != 5 or x.shape[1] not in (1, heads)):
            raise InputError(
                "heads that share coordinates",
                got=f"pages of {list(x.shape)}",
                expected=f"[b, {heads}, n, t, d]",
                fix="use group_heads=1 where heads come alone",
            )


def most_group_heads(codec: Codec) -> int:
    """The most KV heads that share coordinates anywhere in a codec; 1 where heads come alone.

    Example:
      >>> from kvjax.codecs import Dense
      >>> most_group_heads(Dense())
      1
    """
    own = codec.group_heads if isinstance(codec, Subspace) else 1
    return max([own, *(most_group_heads(child) for _, child in codec.children())])


def _group(a: Array, size: int) -> Array:
    """`[b, h, ...] -> [b, G, s, ...]`."""
    return a.reshape(a.shape[0], a.shape[1] // size, size, *a.shape[2:])


def _ungroup(a: Array) -> Array:
    """`[b, G, s, ...] -> [b, h, ...]`."""
    return a.reshape(a.shape[0], a.shape[1] * a.shape[2], *a.shape[3:])
