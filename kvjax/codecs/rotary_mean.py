"""The mean of keys before RoPE taken out: a constant that turns with the position."""

from __future__ import annotations

import jax.numpy as jnp

from kvjax.core.codec import Array, Code, Codec, Prepared, matmul_t
from kvjax.core.errors import InputError
from kvjax.core.pytree import pytree


@pytree
class RotaryMeanCode:
    """Codes of `x - R_position mean`, and the position of the page's first token."""

    code: Code
    start: Array


@pytree
class RotaryMean(Codec):
    """`inner` on `x_t - R_t mean`, with R_t the rotation that RoPE applies at position t.

        <q, x_hat_t> = <R_start^T q, R_(t - start) mean> + <q, y_hat_t>

    The first term is a product with a table of one page that all pages share, and the query is
    turned once per page; its cost is that of the logits of one dense page per head in registers,
    nothing is read. Pages hold consecutive positions; an int32 each is kept and counted.

    Most of a key is a constant that its projection adds before RoPE. After it, high frequencies
    turn that constant around, and the mean over tokens (`Centered`) sees only the slow ones.

    Args:
      mean: `[d]`, or `[h, 1, 1, d]` for one per KV head, before RoPE.
      frequencies: `[d / 2]`, radians per position of the pairs (i, i + d/2).

    Source: key means shifted before rotation, as OptR's mean shift (arXiv 2608.02691) does after.
    """

    mean: Array
    frequencies: Array
    inner: Codec

    def check(self, head_dim: int, page: int) -> None:
        if self.mean.shape[-1] != head_dim or 2 * self.frequencies.shape[-1] != head_dim:
            raise InputError(
                "rotary mean",
                got=f"{self.mean.shape[-1]} channels, {self.frequencies.shape[-1]} frequencies",
                expected=f"{head_dim} and {head_dim // 2}",
                fix="use the mean and the RoPE of a model with this head_dim",
            )
        self.inner.check(head_dim, page)

    def encode(self, x: Array, positions: Array | None = None) -> RotaryMeanCode:
        t = x.shape[-2]
        if positions is None:
            positions = jnp.arange(t)
        start = jnp.broadcast_to(positions[..., 0], x.shape[:-2]).astype(jnp.int32)
        rest = x.astype(jnp.float32) - self._means(start, t)
        return RotaryMeanCode(self.inner.encode(rest, positions), start)

    def decode(self, code: RotaryMeanCode) -> Array:
        rest = self.inner.decode(code.code)
        return rest + self._means(code.start, rest.shape[-2])

    def prepare(self, q: Array) -> tuple[Array, Prepared]:
        return q.astype(jnp.float32), self.inner.prepare(q)

    def logits(self, prepared: tuple[Array, Prepared], code: RotaryMeanCode) -> Array:
        q, inner = prepared
        logits = self.inner.logits(inner, code.code)  # [..., g, t]
        back = turn(q, -self._angles(code.start)[..., None, :])  # [..., g, d]
        offsets = jnp.arange(logits.shape[-1])[:, None] * self.frequencies  # [t, d/2]
        return logits + matmul_t(back, turn(self.mean, offsets))

    def _means(self, start: Array, t: int) -> Array:
        """`[..., t, d]`: the mean at the t positions from each start."""
        offsets = jnp.arange(t)[:, None] * self.frequencies
        return turn(turn(self.mean, offsets), self._angles(start)[..., None, :])

    def _angles(self, start: Array) -> Array:
        return start[..., None].astype(jnp.float32) * self.frequencies  # [..., d/2]


def turn(x: Array, angles: Array) -> Array:
    """Rotates the pairs (i, i + d/2) of `x: [..., d]` by `angles: [..., d/2]`, as RoPE does.

    Example:
      >>> import jax.numpy as jnp
      >>> turn(jnp.array([1.0, 0.0]), jnp.array([jnp.pi / 2])).round(3)
      Array([-0.,  1.], dtype=float32)
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)
