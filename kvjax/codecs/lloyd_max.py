"""Lloyd-Max codebooks: the best scalar levels for one coordinate of a random unit vector."""

from __future__ import annotations

import functools
import math

import numpy as np

from kvjax.core.errors import InputError


@functools.cache
def lloyd_max(d: int | None, bits: int) -> tuple[float, ...]:
    """Levels that minimize the squared error of one coordinate, sorted, symmetric about 0.

    The coordinate of a vector uniform on the unit sphere in d dimensions has the density
    `f(x) ~ (1 - x^2)^((d - 3) / 2)` on [-1, 1] (arXiv 2504.19874, Lemma 1). The codebook belongs to
    the dimension that it is used in: a sub-vector of 32 channels needs `lloyd_max(32, bits)`.

    Args:
      d: dimension of the vector, at least 2; None for a standard normal coordinate.
      bits: 1 to 8.

    Example:
      >>> [round(c * 64**0.5, 3) for c in lloyd_max(64, 2)]
      [-1.5, -0.452, 0.452, 1.5]
    """
    if d is not None and d < 2:
        raise InputError("dimension", got=d, expected="2 or more", fix="a scalar has no direction")
    if bits not in range(1, 9):
        raise InputError("bits", got=bits, expected="1 to 8", fix="choose such a width")
    x, weight = _density(d)
    mass = np.concatenate([[0.0], np.cumsum(weight)])
    first = np.concatenate([[0.0], np.cumsum(weight * x)])
    edges_at = _initial_edges(weight, x, 2**bits)
    levels = np.zeros(2**bits)
    for _ in range(20000):
        cut = np.concatenate([[0], edges_at, [len(x)]])
        centroids = np.diff(first[cut]) / np.maximum(np.diff(mass[cut]), 1e-300)
        moved, levels = np.abs(centroids - levels).max(), centroids
        if moved < 1e-12:
            break
        edges_at = np.searchsorted(x, (levels[1:] + levels[:-1]) / 2)
    levels = (levels - levels[::-1]) / 2
    return tuple(levels.tolist())


def distortion(d: int | None, bits: int) -> float:
    """Expected squared error of a unit vector (d coordinates), or of one standard normal value.

    Example:
      >>> round(distortion(64, 2), 4)
      0.1145
    """
    x, weight = _density(d)
    levels = np.asarray(lloyd_max(d, bits))
    nearest = levels[np.searchsorted((levels[1:] + levels[:-1]) / 2, x)]
    return float((d or 1) * (weight * (x - nearest) ** 2).sum())


def _density(d: int | None, points: int = 400_000) -> tuple[np.ndarray, np.ndarray]:
    """Sorted grid and the probability of each of its cells (midpoint rule)."""
    if d is None:
        x = (np.arange(points) + 0.5) / points * 18 - 9
        weight = np.exp(-(x**2) / 2)
    else:  # x = -cos(angle): the density of the angle, sin^(d-2), has no singular ends
        angle = (np.arange(points) + 0.5) / points * math.pi
        x, weight = -np.cos(angle), np.sin(angle) ** (d - 2)
    return x, weight / weight.sum()


def _initial_edges(weight: np.ndarray, x: np.ndarray, count: int) -> np.ndarray:
    """Edges at quantiles of density^(1/3), near the optimum at any rate (Panter and Dite)."""
    cell = np.gradient(x)
    compander = np.cumsum((weight / cell) ** (1 / 3) * cell)
    return np.searchsorted(compander, np.arange(1, count) / count * compander[-1])
