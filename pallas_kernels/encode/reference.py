"""What `encode` computes, in plain jnp: through arrays of the size of x in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels import planes
from pallas_kernels.encode.forms import Dense, Encoded, Grid, Levels, Transform, Walsh, narrow
from pallas_kernels.hadamard.reference import hadamard_reference

Array = jax.Array


def encode_reference(
    x: Array, form: Levels | Grid, transform: Transform = None, *, transposed: bool = False
) -> Encoded:
    """As `encode`."""
    x = x.astype(jnp.float32)
    if isinstance(transform, Dense):
        x = jnp.matmul(x, transform.matrix.T, precision=jax.lax.Precision.HIGHEST)
    if isinstance(transform, Walsh):
        x = hadamard_reference(x, transform.signs)
    codes, scale, zero = _levels(x, form) if isinstance(form, Levels) else _grid(x, form)
    words = planes.pack(codes.astype(jnp.uint32), form.bits, transposed=transposed)
    return Encoded(words, scale, zero)


def _levels(x: Array, form: Levels) -> tuple[Array, Array, None]:
    largest = jnp.abs(x).max(-1, keepdims=True)  # squares of small numbers leave float32
    largest = jnp.where(largest > 0, largest, 1)
    x = x / largest
    norm = jnp.linalg.norm(x, axis=-1, keepdims=True)
    u = jnp.where(jnp.isfinite(norm), x / jnp.where(norm > 0, norm, 1), 0)
    edges = (form.levels[1:] + form.levels[:-1]) / 2
    codes = (u[..., None] > edges).sum(-1)
    decoded = form.levels[codes]
    along, length2 = (u * decoded).sum(-1), (decoded**2).sum(-1)
    scale = norm[..., 0] * largest[..., 0] * gain(form.gain, along, length2)
    return codes, narrow(scale, form.scale_dtype), None


def gain(kind: str, along: Array, length2: Array) -> Array | float:
    """The factor of `<u, u_hat>` and `|u_hat|^2` that a scale takes."""
    if kind == "norm":
        return jax.lax.rsqrt(length2)
    if kind == "unbiased":
        return 1 / jnp.where(along > 0, along, 1)
    if kind == "least_squares":
        return along / length2
    return 1.0


def _grid(x: Array, form: Grid) -> tuple[Array, Array, Array]:
    *lead, d = x.shape
    width = form.group or d
    x = x.reshape(*lead, d // width, width)
    low, high = x.min(-1), x.max(-1)
    half = (high - low) / 2 * form.clip
    stored = lambda a: a.astype(form.scale_dtype).astype(jnp.float32)
    scale = stored(2 * half / (2**form.bits - 1))
    zero = stored((high + low) / 2 - half)
    codes = jnp.round((x - zero[..., None]) / jnp.where(scale == 0, 1, scale)[..., None])
    codes = jnp.clip(codes, 0, 2**form.bits - 1).reshape(*lead, d)
    return codes, narrow(scale, form.scale_dtype), narrow(zero, form.scale_dtype)
