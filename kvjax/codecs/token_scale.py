"""Lengths taken out of all heads of a token at once, so that none of its neighbours is coarsened.

Use it over an inner codec whose scales span tokens, as `Uniform(axis="tokens")`: there one token of
great length widens the grid of all that share its scale. `Normalized` stores the length that suits
an inner codec of unit vectors; this one only evens tokens out.
"""

from __future__ import annotations

import jax.numpy as jnp

from kvjax.core.codec import Acc, Array, Code, Codec, Prepared
from kvjax.core.errors import InputError
from kvjax.core.pytree import pytree, static
from kvjax.core.storage import narrow, widen


@pytree
class TokenScaleCode:
    """x_hat = scale * inner.decode(code); scale is `[..., t]`."""

    code: Code
    scale: Array


@pytree
class TokenScale(Codec):
    """`inner` on `x_t / n_t`, with n_t the length of a token over all KV heads and channels.

        n_t = sqrt(sum_(h, d) x_(h, t, d)^2),   x_hat = n_t inner.decode(inner.encode(x / n_t))

    The head axis is the fourth from the end, as in `x: [b, h, n, t, d]`, which is how a cache calls
    a codec. Where x has fewer axes (`[t, d]`, `[n, t, d]`) n_t is the length of each vector alone,
    as it is with `joint_heads=False`.

    The joint length is the same number in every head and is kept in each, so that heads can be
    sharded: `itemsize / d` bytes per value, h times what one number per token would take. It is
    rounded before it divides, so its rounding adds no error. Heads meet in `encode` alone: where
    they lie on several devices it takes a sum over them, and inside a `shard_map` over heads only
    those of the shard would count.

    Errors are in proportion to the joint length: a head much smaller than the others of its token
    takes their noise.

    A zero vector comes back as exact zeros, among heads that are not zero too. NaN or infinity in a
    vector makes that token NaN in every head (in this one, where heads are apart), and no other
    token. Lengths have the range of float32 in bf16, the default; in float16 one beyond 65504 makes
    its token NaN.

    Args:
      inner: the codec of the divided vectors.
      joint_heads: one length for all heads of a token, or one for each head.
      scale_dtype: "bfloat16", "float16" or "float32", counted in the true bits.

    Source: OScaR's omni-token scaling, arXiv 2605.19660.
    Differs from the paper: the length is kept once per head, not once per layer; in 16 bits, where
    the released kernel has float32; and as it is rounded it divides.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from kvjax.codecs import Uniform
      >>> codec = TokenScale(Uniform(4, axis="tokens"))
      >>> x = jax.random.normal(jax.random.key(0), (1, 2, 1, 16, 64)).at[:, :, :, 3].multiply(100)
      >>> code = codec.encode(x)
      >>> bool((code.scale[:, 0] == code.scale[:, 1]).all())
      True
      >>> worst = lambda codec: abs(codec.decode(codec.encode(x)) - x)[..., :3, :].max()
      >>> bool(worst(codec) < worst(codec.inner) / 10)
      True
    """

    inner: Codec
    joint_heads: bool = static(default=True)
    scale_dtype: jnp.dtype = static(default=jnp.dtype("bfloat16"))

    def __post_init__(self):
        object.__setattr__(self, "scale_dtype", jnp.dtype(self.scale_dtype))
        if self.scale_dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
            raise InputError(
                "scale_dtype",
                got=self.scale_dtype,
                expected="bfloat16, float16 or float32",
                fix="use one of them",
            )

    def encode(self, x: Array, positions: Array | None = None) -> TokenScaleCode:
        x = x.astype(jnp.float32)
        axes = (-4, -1) if self.joint_heads and x.ndim >= 4 else (-1,)
        # Twice, because the squares of very small or very large numbers leave float32.
        largest = jnp.abs(x).max(axes, keepdims=True)  # [b, 1, n, t, 1]
        divided = x / jnp.where(largest > 0, largest, 1)
        length = jnp.sqrt((divided**2).sum(axes, keepdims=True)) * largest
        length = widen(narrow(length, self.scale_dtype))  # as the decoder will see it
        finite = jnp.isfinite(length)
        # A page may be coded as one: what is not finite must not reach its neighbours.
        unit = jnp.where(finite, x / jnp.where(length > 0, length, 1), 0)
        used = (unit != 0).any(-1, keepdims=True)  # [..., t, 1]
        scale = jnp.where(finite, jnp.where(used, length, 0), jnp.nan)[..., 0]
        return TokenScaleCode(self.inner.encode(unit, positions), narrow(scale, self.scale_dtype))

    def decode(self, code: TokenScaleCode) -> Array:
        return self.inner.decode(code.code) * widen(code.scale)[..., None]

    def prepare(self, q: Array) -> Prepared:
        return self.inner.prepare(q)

    def logits(self, prepared: Prepared, code: TokenScaleCode) -> Array:
        return self.inner.logits(prepared, code.code) * widen(code.scale)[..., None, :]

    def accumulate(self, p: Array, code: TokenScaleCode) -> Acc:
        return self.inner.accumulate(p * widen(code.scale)[..., None, :], code.code)

    def restore(self, acc: Acc) -> Array:
        return self.inner.restore(acc)
