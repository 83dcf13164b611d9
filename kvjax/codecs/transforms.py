"""Invertible linear maps of the channels: what `Linear` applies before its inner codec."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.core.codec import Array
from kvjax.core.errors import InputError
from kvjax.core.pytree import pytree


@pytree
class Transform:
    """y = A x on the last axis; `dual` is the inverse transpose: <dual q, y> = <q, x>."""

    def forward(self, x: Array) -> Array:
        raise NotImplementedError

    def inverse(self, y: Array) -> Array:
        raise NotImplementedError

    def dual(self, q: Array) -> Array:
        """Orthogonal maps are their own dual."""
        return self.forward(q)

    def check(self, head_dim: int) -> None:
        """Raises `InputError` when vectors of `head_dim` do not fit."""


@pytree
class Orthogonal(Transform):
    """A dense rotation `[..., d, d]`; `Orthogonal.random` is uniform (Haar).

    Example:
      >>> import jax
      >>> rotation = Orthogonal.random(96, rng=jax.random.key(0))
      >>> x = jax.random.normal(jax.random.key(1), (3, 96))
      >>> bool(abs(rotation.inverse(rotation.forward(x)) - x).max() < 1e-5)
      True
    """

    matrix: Array

    @staticmethod
    def random(d: int, *, rng: Array) -> Orthogonal:
        return Orthogonal(jax.random.orthogonal(rng, d, dtype=jnp.float32))

    def forward(self, x: Array) -> Array:
        return exact_matmul(x, self.matrix.swapaxes(-1, -2))

    def inverse(self, y: Array) -> Array:
        return exact_matmul(y, self.matrix)

    def check(self, head_dim: int) -> None:
        _check_size(self.matrix.shape[-1], head_dim)


@pytree
class Matrix(Transform):
    """Any invertible map: `matrix` and its inverse, both `[..., d, d]`; the query gets the inverse
    transpose, so that inner products are kept."""

    matrix: Array
    inverse_matrix: Array

    @staticmethod
    def of(matrix: Array) -> Matrix:
        """Inverts in float64 on the host."""
        inverse = np.linalg.inv(np.asarray(matrix, np.float64))
        return Matrix(jnp.asarray(matrix, jnp.float32), jnp.asarray(inverse, jnp.float32))

    def forward(self, x: Array) -> Array:
        return exact_matmul(x, self.matrix.swapaxes(-1, -2))

    def inverse(self, y: Array) -> Array:
        return exact_matmul(y, self.inverse_matrix.swapaxes(-1, -2))

    def dual(self, q: Array) -> Array:
        return exact_matmul(q, self.inverse_matrix)

    def check(self, head_dim: int) -> None:
        _check_size(self.matrix.shape[-1], head_dim)


@pytree
class Hadamard(Transform):
    """Randomized Hadamard: random signs, then an orthonormal Walsh-Hadamard transform.

        y = (C_m kron H_{2^k}) (signs * x),   d = m 2^k, m odd

    The signs come *before* the transform (after it they do nothing). Where d is not a power of two
    the odd part m is mixed by an orthonormal DCT, so that every output sees every input. With
    `signs` of ones it is the plain transform.

    Args:
      signs: `[..., d]` of +1 and -1.

    Example:
      >>> import jax
      >>> y = Hadamard.random(96, rng=jax.random.key(0)).forward(jax.numpy.eye(96)[3])
      >>> bool((abs(y) > 0.01).sum() > 90)
      True
    """

    signs: Array

    @staticmethod
    def random(d: int, *, rng: Array) -> Hadamard:
        return Hadamard(jax.random.rademacher(rng, (d,), jnp.float32))

    @staticmethod
    def plain(d: int) -> Hadamard:
        return Hadamard(jnp.ones((d,), jnp.float32))

    def forward(self, x: Array) -> Array:
        return hadamard_transform(x.astype(jnp.float32) * self.signs)

    def inverse(self, y: Array) -> Array:
        return hadamard_transform(y.astype(jnp.float32), inverse=True) * self.signs

    def check(self, head_dim: int) -> None:
        _check_size(self.signs.shape[-1], head_dim)


def hadamard_transform(x: Array, *, inverse: bool = False) -> Array:
    """Orthonormal transform of the last axis: Kronecker factors of at most 128, one matmul each."""
    *lead, d = x.shape
    factors = _factors(d)
    x = x.reshape(*lead, *(len(f) for f in factors))
    for i, factor in enumerate(factors):
        axis = len(lead) + i
        matrix = factor if inverse else factor.T
        x = jnp.moveaxis(exact_matmul(jnp.moveaxis(x, axis, -1), matrix), -1, axis)
    return x.reshape(*lead, d)


@functools.cache
def _factors(d: int) -> tuple[np.ndarray, ...]:
    odd, power = d, 0
    while odd % 2 == 0:
        odd, power = odd // 2, power + 1
    factors = [] if odd == 1 else [_dct(odd)]
    while power > 0:
        step = min(power, 7)
        factors.append(_walsh(step))
        power -= step
    return tuple(factors or [np.ones((1, 1), np.float32)])


def _walsh(power: int) -> np.ndarray:
    matrix = np.ones((1, 1))
    for _ in range(power):
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return (matrix / math.sqrt(len(matrix))).astype(np.float32)


def _dct(size: int) -> np.ndarray:
    rows, columns = np.arange(size)[:, None], np.arange(size)[None, :]
    matrix = np.cos(math.pi * rows * (2 * columns + 1) / (2 * size)) * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix.astype(np.float32)


def exact_matmul(x: Array, matrix: Array | np.ndarray) -> Array:
    """Float32 in earnest: a rotation in TF32 or bf16 passes would cost more than 4-bit codes do."""
    return jnp.matmul(x.astype(jnp.float32), matrix, precision=jax.lax.Precision.HIGHEST)


def _check_size(size: int, head_dim: int) -> None:
    if size != head_dim:
        raise InputError(
            "transform",
            got=f"vectors of {head_dim}",
            expected=f"vectors of {size}",
            fix="build the method for this head_dim",
        )
