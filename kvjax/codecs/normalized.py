"""One scalar per token: the direction goes to the inner codec, the length is stored beside it."""

from __future__ import annotations

from typing import Literal, get_args

import jax.numpy as jnp

from kvjax.core.codec import Acc, Array, Code, Codec, Prepared
from kvjax.core.errors import InputError
from kvjax.core.pytree import pytree, static

Gain = Literal["none", "norm", "unbiased", "least_squares"]
GAINS = get_args(Gain)


@pytree
class NormalizedCode:
    """x_hat = scale * inner.decode(code)."""

    code: Code
    scale: Array


@pytree
class Normalized(Codec):
    """`x = |x| u`; the inner codec sees the unit vector u, and one scalar per token is kept.

    With `u_hat` the inner reconstruction, the stored scalar is

        none:           |x|
        norm:           |x| / |u_hat|              (the reconstruction has the right length)
        unbiased:       |x| / <u, u_hat>           (<x, x_hat> = |x|^2; EDEN's choice)
        least_squares:  |x| <u, u_hat> / |u_hat|^2 (smallest squared error)

    Lloyd-Max reconstructions are too short by their distortion D; what to do about it depends on
    the side, so it is a choice. A scale
    beyond the range of `scale_dtype` (65504 for float16) becomes infinite and reads as NaN: use
    "float32" for such data.

    Source: TurboQuant stores the norm (arXiv 2504.19874); unbiased gain: arXiv 2604.18555.
    """

    inner: Codec
    gain: Gain = static(default="none")
    scale_dtype: jnp.dtype = static(default=jnp.dtype("float16"))

    def __post_init__(self):
        object.__setattr__(self, "scale_dtype", jnp.dtype(self.scale_dtype))
        if self.gain not in GAINS:
            raise InputError(
                "gain", got=repr(self.gain), expected=f"one of {GAINS}", fix="name one of them"
            )

    def encode(self, x: Array, positions: Array | None = None) -> NormalizedCode:
        x = x.astype(jnp.float32)
        norm = jnp.linalg.norm(x, axis=-1)  # [..., t]
        unit = x / jnp.maximum(norm, jnp.finfo(jnp.float32).tiny)[..., None]
        code = self.inner.encode(unit, positions)
        scale = norm * self._gain(unit, code)
        return NormalizedCode(code, scale.astype(self.scale_dtype))

    def _gain(self, unit: Array, code: Code) -> Array | float:
        if self.gain == "none":
            return 1.0
        decoded = self.inner.decode(code)
        length2 = (decoded**2).sum(-1)
        along = (unit * decoded).sum(-1)
        tiny = jnp.finfo(jnp.float32).tiny
        if self.gain == "norm":
            return 1 / jnp.sqrt(jnp.maximum(length2, tiny))
        if self.gain == "unbiased":
            return 1 / jnp.where(along > 0, along, 1)
        return along / jnp.maximum(length2, tiny)

    def decode(self, code: NormalizedCode) -> Array:
        return self.inner.decode(code.code) * code.scale.astype(jnp.float32)[..., None]

    def prepare(self, q: Array) -> Prepared:
        return self.inner.prepare(q)

    def logits(self, prepared: Prepared, code: NormalizedCode) -> Array:
        scale = code.scale.astype(jnp.float32)[..., None, :]  # [..., 1, t]
        return self.inner.logits(prepared, code.code) * scale

    def accumulate(self, p: Array, code: NormalizedCode) -> Acc:
        scale = code.scale.astype(jnp.float32)[..., None, :]  # [..., 1, t]
        return self.inner.accumulate(p * scale, code.code)

    def restore(self, acc: Acc) -> Array:
        return self.inner.restore(acc)
