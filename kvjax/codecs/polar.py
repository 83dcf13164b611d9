"""Polar coordinates in blocks: angles in few bits, and one radius. `polar_pairs` has the other."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax.numpy as jnp
import numpy as np

from kvjax.codecs.uniform import check_page
from kvjax.core.codec import Array, Codec
from kvjax.core.errors import InputError
from kvjax.core.pytree import pytree, static
from kvjax.core.storage import narrow, widen
from pallas_kernels import planes


@pytree
class PolarCode:
    """Words of the angle indices, level by level, and the length of each block."""

    words: tuple[tuple[Array, ...], ...]
    radius: Array


@pytree
class Polar(Codec):
    """Recursive polar transform: pairs to an angle and a length, lengths to pairs again.

        level 1:    (x_j, x_k)  =  r (cos psi, sin psi),   psi in [0, 2 pi)
        level l:    (r_j, r_k)  =  r (cos psi, sin psi),   psi in [0, pi / 2]

    After L levels a block of `2**L` channels is `2**L - 1` angles and one radius. Of a randomly
    rotated vector all angles are independent: level 1 is uniform, and level l has the density
    `sin(2 psi)**(2**(l - 1) - 1)`, narrower the higher it is. Level 1 is cut in equal cells and
    decoded to their midpoints, which has a quarter of the squared error of their edges.

    Rotate first (`rotated`): the levels belong to that density, and channels that carry nothing
    would cost as much as others.

    Args:
      angles: for each level from the second, the sorted centroids in [0, pi / 2], `[2**bits]`.
      bits: of each level's angles, 1 to 8; its length is L, and L = log2(head_dim) leaves one
        radius per token.
      radius_dtype: a radius beyond its range (65504 for float16) becomes infinite.

    Source: PolarQuant, arXiv 2502.02617 (not what vLLM and others call PolarQuant: that is
    TurboQuant's norm and codebook).
    Differs from the paper: channel j is paired with j + half the width, not with its neighbour, so
    that halves stay whole tiles; a random rotation makes all pairings alike. Centroids are optimal
    for the exact density, where the paper runs k-means on the angles of a prompt or a corpus.

    Example:
      >>> import jax
      >>> codec = Polar.lloyd_max((4, 2, 2, 2))
      >>> x = jax.random.normal(jax.random.key(0), (16, 64))
      >>> round_trip = jax.jit(lambda x: codec.decode(codec.encode(x)))
      >>> bool(((round_trip(x) - x) ** 2).mean() < 0.04)
      True
    """

    angles: tuple[Array, ...]
    bits: tuple[int, ...] = static()
    radius_dtype: jnp.dtype = static(default=jnp.dtype("float16"))
    transposed: bool = static(default=False)

    def __post_init__(self):
        object.__setattr__(self, "radius_dtype", jnp.dtype(self.radius_dtype))
        object.__setattr__(self, "bits", tuple(self.bits))
        if not self.bits or any(b not in planes.PLANES for b in self.bits):
            raise InputError(
                "bits", got=self.bits, expected="1 to 8 for each level", fix="choose such widths"
            )

    @staticmethod
    def lloyd_max(bits: tuple[int, ...] = (4, 2, 2, 2), *, radius_dtype="float16") -> Polar:
        """The optimal centroids for rotated vectors, `bits` from the first level to the last."""
        levels = enumerate(bits[1:], start=2)
        angles = tuple(jnp.asarray(polar_angles(level, b), jnp.float32) for level, b in levels)
        return Polar(angles, tuple(bits), jnp.dtype(radius_dtype))

    @property
    def block(self) -> int:
        """Channels that share a radius."""
        return 2 ** len(self.bits)

    def check(self, head_dim: int, page: int) -> None:
        for bits in self.bits:
            check_page(page, bits)
        if head_dim % self.block:
            raise InputError(
                "head_dim",
                got=f"{head_dim} with {len(self.bits)} levels",
                expected=f"a multiple of {self.block}",
                fix="give bits for fewer levels",
            )
        sizes = [angles.shape[-1] for angles in self.angles]
        if sizes != [2**b for b in self.bits[1:]]:
            raise InputError(
                "angles",
                got=f"{sizes} centroids",
                expected=f"{[2**b for b in self.bits[1:]]} for the bits {self.bits}",
                fix="make them with Polar.lloyd_max",
            )

    def transpose_planes(self) -> Polar:
        return dataclasses.replace(self, transposed=True)

    def encode(self, x: Array, positions: Array | None = None) -> PolarCode:
        words, r = [], x.astype(jnp.float32)
        for level, bits in enumerate(self.bits):
            a, b = jnp.split(r, 2, axis=-1)  # [..., t, d / 2**(level + 1)]
            codes = nearest(a, b, self.angles[level - 1]) if level else sector(a, b, bits)
            words.append(planes.pack(codes, bits, transposed=self.transposed))
            r = jnp.hypot(a, b)
        return PolarCode(tuple(words), narrow(r, self.radius_dtype))

    def decode(self, code: PolarCode) -> Array:
        r = widen(code.radius)
        for level in reversed(range(len(self.bits))):
            bits = self.bits[level]
            angles = self.angles[level - 1] if level else midpoints(bits)
            codes = planes.unpack(code.words[level], bits, transposed=self.transposed)
            cos, sin = (select(f(angles), codes) for f in (jnp.cos, jnp.sin))
            r = jnp.concatenate([r * cos, r * sin], -1)  # [..., t, d / 2**level]
        return r


@functools.cache
def polar_angles(level: int, bits: int) -> tuple[float, ...]:
    """Centroids with the least squared error for the angle of a level, sorted, in [0, pi / 2].

    The density of level l >= 2 is `sin(2 psi)**(2**(l - 1) - 1)`: of the ratio of two independent
    lengths in `2**(l - 1)` dimensions (arXiv 2502.02617, Lemma 2). It is symmetric about pi / 4,
    and so are they.

    Example:
      >>> [round(psi, 3) for psi in polar_angles(2, 2)]
      [0.31, 0.634, 0.937, 1.261]
    """
    if level < 2 or bits not in planes.PLANES:
        raise InputError(
            "polar level",
            got=f"level {level} with {bits} bits",
            expected="level 2 or more, 1 to 8 bits",
            fix="level 1 is uniform and has no centroids",
        )
    edges = np.linspace(0, math.pi / 2, 100_001)  # of fine cells
    x = (edges[1:] + edges[:-1]) / 2
    weight = np.sin(2 * x) ** (2 ** (level - 1) - 1)
    mass = np.concatenate([[0], np.cumsum(weight)])
    first = np.concatenate([[0], np.cumsum(weight * x)])
    # Quantiles of density^(1/3) are near the optimum at any rate (Panter and Dite).
    compander = np.concatenate([[0], np.cumsum(weight ** (1 / 3))])
    cut = np.interp(np.linspace(0, compander[-1], 2**bits + 1), compander, edges)
    levels = np.zeros(2**bits)
    for _ in range(20_000):
        centroids = np.diff(np.interp(cut, edges, first)) / np.diff(np.interp(cut, edges, mass))
        moved, levels = np.abs(centroids - levels).max(), centroids
        if moved < 1e-10:
            break
        cut[1:-1] = (levels[1:] + levels[:-1]) / 2
    return tuple(((levels + math.pi / 2 - levels[::-1]) / 2).tolist())


def midpoints(bits: int) -> np.ndarray:
    """Of equal cells of [0, 2 pi)."""
    return ((np.arange(2**bits) + 0.5) * (2 * math.pi / 2**bits)).astype(np.float32)


def sector(a: Array, b: Array, bits: int) -> Array:
    """Which of `2**bits` equal sectors of the circle the point (a, b) is in."""
    turn = jnp.atan2(b, a) / (2 * math.pi) * 2**bits  # from -half to half of all
    return (jnp.floor(turn).astype(jnp.int32) & (2**bits - 1)).astype(jnp.uint32)


def nearest(a: Array, b: Array, angles: Array) -> Array:
    """Index of the centroid nearest to the angle of (a, b), both 0 or more."""
    edges = (angles[1:] + angles[:-1]) / 2
    if len(angles) > 16:
        return jnp.searchsorted(edges, jnp.atan2(b, a)).astype(jnp.uint32)
    # The angle is beyond an edge where the cross product with its direction is positive.
    beyond = (b * jnp.cos(edge) > a * jnp.sin(edge) for edge in edges)
    return sum((past.astype(jnp.uint32) for past in beyond), jnp.zeros(a.shape, jnp.uint32))


def select(table: Array, codes: Array) -> Array:
    """`table[codes]` by selects, which vectorize where a gather does not; a gather beyond 32."""
    if len(table) > 32:
        return table[codes.astype(jnp.int32)]
    values, bit = list(table), 0
    while len(values) > 1:
        odd = (codes >> bit) & 1 == 1
        values = [
            jnp.where(odd, high, low) for low, high in zip(values[::2], values[1::2], strict=True)
        ]
        bit += 1
    return values[0]
