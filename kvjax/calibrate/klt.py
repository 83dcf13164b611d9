"""Transforms and bit allocation from second moments: the metric KLT, and reverse water-filling."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from kvjax.codecs.lloyd_max import distortion
from kvjax.codecs.transforms import Orthogonal
from kvjax.core.errors import InputError
from kvjax.core.rng import fold

# Error of one standard normal value at 0, 1, .. bits: of `Trellis` along pages of 64 tokens
# (measured, tests/calibrate/test_klt.py), and of Lloyd-Max.
TRELLIS_ERROR = (1.0, 0.294, 0.0731, 0.0183, 0.00464, 0.00117)
LLOYD_MAX_ERROR = (1.0, *(distortion(None, bits) for bits in range(1, 6)))


@dataclasses.dataclass(frozen=True)
class Transform:
    """`y = forward x` has uncorrelated coordinates of variance 1, the most important first.

        q . e = sum_i (dual q)_i (forward e)_i,   E (q . e)^2 = sum_i weight_i E (forward e)_i^2

    Attributes:
      forward, inverse: `[..., d, d]` float64, for column vectors.
      weight: `[..., d]`, falling: what a unit of error in each coordinate costs in squared logits.
    """

    forward: np.ndarray
    inverse: np.ndarray
    weight: np.ndarray


def metric_klt(metric: np.ndarray, cov: np.ndarray, *, damping: float = 0.01) -> Transform:
    """The basis in which errors cost the least: joint diagonalization of metric and covariance.

        S^(1/2) C S^(1/2) = V diag(weight) V^T,   forward = diag(weight)^(-1/2) V^T S^(1/2)

    with S the metric (the Gram of the queries) plus `damping` of its mean eigenvalue, so that no
    direction is called free because calibration did not look there.

    Args:
      metric, cov: `[..., d, d]`, symmetric and positive semidefinite.
    Raises:
      InputError: a metric or covariance of zeros.

    Source: reverse water-filling in the metric of the queries (arXiv 2608.14191 and, as a balanced
    transform, WUSH-KV); research note in docs/results-log.md.
    """
    d = cov.shape[-1]
    trace = lambda a: np.trace(a, axis1=-2, axis2=-1)[..., None, None] / d
    if not (trace(metric) > 0).all() or not (trace(cov) > 0).all():
        raise InputError(
            "moments",
            got="a metric or covariance of zeros",
            expected="heads whose queries and keys vary",
            fix="calibrate on more text",
        )
    s_value, s_vector = np.linalg.eigh(metric + damping * trace(metric) * np.eye(d))
    root = lambda power: (s_vector * s_value[..., None, :] ** power) @ s_vector.swapaxes(-1, -2)
    half = root(0.5)
    weight, vector = np.linalg.eigh(half @ cov @ half)
    weight, vector = weight[..., ::-1], vector[..., ::-1]
    weight = np.maximum(weight, 1e-9 * weight[..., :1])  # directions in which nothing moves
    scale = np.sqrt(weight)
    forward = (vector / scale[..., None, :]).swapaxes(-1, -2) @ half
    inverse = root(-0.5) @ (vector * scale[..., None, :])
    return Transform(forward, inverse, weight)


def allocate(
    weight: np.ndarray, bits: float, *, errors: Sequence[float] = TRELLIS_ERROR
) -> tuple[int, ...]:
    """Whole bits for each coordinate, common to all heads, with the mean `bits`.

    Greedy reverse water-filling: each bit goes where it takes away most error, summed over heads.
    Widths fall along the coordinates, as weights do.

    Args:
      weight: `[..., d]`, falling along d; heads are scaled to equal geometric means first, so that
        none decides alone.
      errors: of a coordinate of variance 1 at 0, 1, ... bits; its length bounds the widths.
    Raises:
      InputError: bits that the widths cannot have on average.

    Example:
      >>> import numpy as np
      >>> allocate(np.array([30.0, 5.0, 1.0, 0.3]), 2.0)
      (4, 3, 1, 0)
    """
    d = weight.shape[-1]
    total = round(bits * d)
    if not 0 <= total <= d * (len(errors) - 1) or abs(total - bits * d) > 1e-6:
        raise InputError(
            "bits",
            got=f"{bits} on average over {d} channels",
            expected=f"0 to {len(errors) - 1}, a whole number of bits per vector",
            fix="choose such a mean",
        )
    log = np.log(weight.reshape(-1, d))
    cost = np.exp(log - log.mean(-1, keepdims=True)).mean(0)  # [d]
    steps = np.append(-np.diff(errors), 0.0)  # what one bit more takes away
    widths = np.zeros(d, int)
    for _ in range(total):
        gain = cost * steps[widths]
        widths[int(np.argmax(np.where(widths < len(errors) - 1, gain, -1)))] += 1
    return tuple(sorted(widths.tolist(), reverse=True))


def mix(transform: Transform, widths: Sequence[int], *, rng: jax.Array) -> Transform:
    """Turns coordinates of equal width among each other, by a random rotation common to all heads.

    Single coordinates have heavy tails, and codes are made for Gaussian ones; sums of many are
    nearly Gaussian. Weights become their mean over the run, which within one width costs little:
    keys of SmolLM2 at 2 bits lose 0.1 dB of logit error by it and 19 % of KL.

    Args:
      widths: as of `allocate`; coordinates of no bits stay as they are.
    """
    forward, inverse, weight = (
        a.copy() for a in (transform.forward, transform.inverse, transform.weight)
    )
    start = 0
    for bits, count in blocks(widths):
        run = slice(start, start + count)
        start += count
        if not bits or count == 1:
            continue
        turn = np.asarray(Orthogonal.random(count, rng=fold(rng, "mix", run.start)).matrix)
        forward[..., run, :] = turn @ forward[..., run, :]
        inverse[..., run] = inverse[..., run] @ turn.T
        weight[..., run] = weight[..., run].mean(-1, keepdims=True)
    return Transform(forward, inverse, weight)


def blocks(widths: Sequence[int]) -> list[tuple[int, int]]:
    """Runs of equal width as (bits, channels), in order.

    Example:
      >>> blocks((3, 2, 2, 0))
      [(3, 1), (2, 2), (0, 1)]
    """
    runs: list[tuple[int, int]] = []
    for bits in widths:
        count = runs.pop()[1] if runs and runs[-1][0] == bits else 0
        runs.append((bits, count + 1))
    return runs
