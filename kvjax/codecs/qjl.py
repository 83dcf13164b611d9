"""Quantized Johnson-Lindenstrauss: one sign per sketch row, an unbiased inner product."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp

from kvjax.codecs.uniform import check_page
from kvjax.core.codec import Array, Codec, matmul, matmul_t
from kvjax.core.errors import InputError
from kvjax.core.pytree import pytree, static
from pallas_kernels import planes


@pytree
class QJLCode:
    """x_hat = sqrt(pi/2) / m * norm * sketch.T @ (+1 or -1 per sketch row).

    The norm is None where the codec has a fixed one.
    """

    signs: tuple[Array, ...]
    norm: Array | None


@pytree
class QJL(Codec):
    """Signs of a random sketch, and the norm: one per token, or one for all.

        code = sign(S x), |x|        <q, x_hat> = sqrt(pi/2) / m * |x| * <S q, sign(S x)>

    unbiased over S: for Gaussian rows the variance is `(pi/2 |q|^2 |x|^2 - <q, x>^2) / m`; with
    orthogonal rows about `(pi/2 - 1) |q|^2 |x|^2 / m` at m = d, 2.7 times less.

    Gaussian rows are standard normal; orthogonal ones all have the length that those have on
    average, `sqrt(2) Gamma((d+1)/2) / Gamma(d/2)`, which makes the constant above exact for both.

    Args:
      sketch: `[m, d]`, from `QJL.random`.
      norm_dtype: of the stored norms.
      fixed_norm: the norm of every vector; nothing but signs is then stored. For residuals of unit
        vectors, whose length hardly varies: `sqrt(distortion(d, b))` after b bits. Alone it makes
        no zero of a zero vector; under `Normalized`, whose scale is 0 there, it does.

    Source: arXiv 2406.03482; a fixed norm is what TurboQuant's released code has.
    """

    sketch: Array
    norm_dtype: jnp.dtype = static(default=jnp.dtype("float16"))
    fixed_norm: float | None = static(default=None)
    transposed: bool = static(default=False)

    def __post_init__(self):
        object.__setattr__(self, "norm_dtype", jnp.dtype(self.norm_dtype))
        if self.fixed_norm is not None and not 0 < self.fixed_norm < math.inf:
            raise InputError(
                "fixed_norm",
                got=self.fixed_norm,
                expected="a positive number, or None",
                fix="None stores a norm per token",
            )

    @staticmethod
    def random(
        d: int,
        *,
        rng: Array,
        rows: int | None = None,
        kind: Literal["gaussian", "orthogonal"] = "orthogonal",
    ) -> QJL:
        """A sketch of `rows` (default d) rows. Orthogonal rows come in blocks of d.

        Differs from the paper: it states Gaussian S, but runs all its experiments with rows
        orthogonalized by QR; orthogonal is the default here. Their rows have length sqrt(d), which
        makes estimates 1/(4d) too large; ours are a little shorter, and unbiased.

        Raises:
          InputError: another kind, or a dimension under 1.
        """
        if d < 1 or kind not in ("gaussian", "orthogonal"):
            raise InputError(
                "sketch",
                got=f"{kind!r} rows for vectors of {d}",
                expected="'gaussian' or 'orthogonal' rows, vectors of 1 or more",
                fix="choose such a sketch",
            )
        rows = rows or d
        if kind == "gaussian":
            return QJL(jax.random.normal(rng, (rows, d), jnp.float32))
        blocks = jax.random.orthogonal(rng, d, shape=(-(-rows // d),), dtype=jnp.float32)
        length = math.sqrt(2) * math.exp(math.lgamma((d + 1) / 2) - math.lgamma(d / 2))
        return QJL(blocks.reshape(-1, d)[:rows] * length)

    def check(self, head_dim: int, page: int) -> None:
        check_page(page, 1)
        if self.sketch.shape[-1] != head_dim:
            raise InputError(
                "sketch",
                got=f"vectors of {head_dim}",
                expected=f"vectors of {self.sketch.shape[-1]}",
                fix="make it with QJL.random for this head_dim",
            )

    def transpose_planes(self) -> QJL:
        return dataclasses.replace(self, transposed=True)

    def encode(self, x: Array, positions: Array | None = None) -> QJLCode:
        x = x.astype(jnp.float32)
        bits = (matmul_t(x, self.sketch) > 0).astype(jnp.uint32)  # [..., t, m]
        norm = None
        if self.fixed_norm is None:
            norm = jnp.linalg.norm(x, axis=-1).astype(self.norm_dtype)
        return QJLCode(planes.pack(bits, 1, transposed=self.transposed), norm)

    def decode(self, code: QJLCode) -> Array:
        signs = self._signs(code)  # [..., t, m]
        return self.restore(signs if code.norm is None else signs * _row(code.norm).mT)

    def prepare(self, q: Array) -> Array:
        return matmul_t(q, self.sketch) * self._constant  # [..., g, m]

    def logits(self, prepared: Array, code: QJLCode) -> Array:
        logits = matmul_t(prepared, self._signs(code))  # [..., g, t]
        return logits if code.norm is None else logits * _row(code.norm)

    def accumulate(self, p: Array, code: QJLCode) -> Array:
        return matmul(p if code.norm is None else p * _row(code.norm), self._signs(code))

    def restore(self, acc: Array) -> Array:
        return matmul(acc, self.sketch) * self._constant  # [..., d]

    @property
    def _constant(self) -> float:
        norm = 1.0 if self.fixed_norm is None else self.fixed_norm
        return math.sqrt(math.pi / 2) / self.sketch.shape[-2] * norm

    def _signs(self, code: QJLCode) -> Array:
        bits = planes.unpack(code.signs, 1, transposed=self.transposed)
        return bits.astype(jnp.float32) * 2 - 1


def _row(norm: Array) -> Array:
    """One factor per token, `[..., t]`, against `[..., g, t]`."""
    return norm.astype(jnp.float32)[..., None, :]
