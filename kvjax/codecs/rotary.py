"""Codes of keys as they were before RoPE, turned forward again where they are read."""

from __future__ import annotations

import jax.numpy as jnp

from kvjax.codecs.rotary_mean import turn
from kvjax.core.codec import Array, Code, Codec, Prepared, matmul_t
from kvjax.core.errors import InputError
from kvjax.core.pytree import pytree


@pytree
class RotaryCode:
    """Codes of the keys before RoPE, and the position of the page's first token."""

    code: Code
    start: Array


@pytree
class Rotary(Codec):
    """`inner` on `R_t^-1 x_t`, with R_t the rotation that RoPE applies at position t.

        x_hat_t = R_start R_(t - start) y_hat_t
        <q, x_hat_t> = <R_start^-1 q, R_(t - start) y_hat_t>

    Keys before RoPE lie in far fewer dimensions than after it, and their statistics are those of
    any position: what is fitted to them holds beyond the positions of the calibration. The price is
    that every key is decoded and turned at every step: no query can be moved past a rotation that
    differs from token to token. The query is turned once per page, and all pages share one table of
    angles. Both ways go by the same float32 angles, so that their rounding cancels.

    Pages hold consecutive positions; an int32 each is kept and counted. Where eviction leaves gaps
    within a page the law still holds, but what `inner` sees was turned by the wrong angles.

    Args:
      frequencies: `[d / 2]`, radians per position of the pairs (i, i + d/2).
      inner: codec of vectors before RoPE.

    Source: keys kept before RoPE, as KVQuant (arXiv 2401.18079) and Palu (arXiv 2407.21118).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from kvjax.codecs import Uniform
      >>> codec = Rotary(10.0 ** -jnp.arange(4), Uniform(8))
      >>> before = jnp.ones((16, 8))
      >>> x = turn(before, (40 + jnp.arange(16))[:, None] * codec.frequencies)
      >>> code = codec.encode(x, 40 + jnp.arange(16))
      >>> int(code.start), bool(abs(codec.decode(code) - x).max() < 1e-2)
      (40, True)
    """

    frequencies: Array
    inner: Codec

    def check(self, head_dim: int, page: int) -> None:
        if 2 * self.frequencies.shape[-1] != head_dim:
            raise InputError(
                "rotary",
                got=f"{self.frequencies.shape[-1]} frequencies",
                expected=f"{head_dim // 2}, for vectors of {head_dim}",
                fix="use the RoPE of a model with this head_dim",
            )
        self.inner.check(head_dim, page)

    def encode(self, x: Array, positions: Array | None = None) -> RotaryCode:
        t = x.shape[-2]
        if positions is None:
            positions = jnp.arange(t)
        start = jnp.broadcast_to(positions[..., 0], x.shape[:-2]).astype(jnp.int32)
        before = turn(turn(x, -self._angles(start)), -self._offsets(t))
        return RotaryCode(self.inner.encode(before, positions), start)

    def decode(self, code: RotaryCode) -> Array:
        return turn(self._from_start(code), self._angles(code.start))

    def prepare(self, q: Array) -> Prepared:
        return q.astype(jnp.float32)

    def logits(self, prepared: Prepared, code: RotaryCode) -> Array:
        back = turn(prepared, -self._angles(code.start))  # [..., g, d]
        return matmul_t(back, self._from_start(code))

    def _from_start(self, code: RotaryCode) -> Array:
        """`[..., t, d]`: decoded, and turned by the distance to the first token of the page."""
        before = self.inner.decode(code.code)
        return turn(before, self._offsets(before.shape[-2]))

    def _offsets(self, t: int) -> Array:
        return jnp.arange(t)[:, None] * self.frequencies  # [t, d/2]

    def _angles(self, start: Array) -> Array:
        return start[..., None, None].astype(jnp.float32) * self.frequencies  # [..., 1, d/2]
