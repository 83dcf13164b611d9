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


def shrink(cov: np.ndarray, tokens: int) -> np.ndarray:
    """A covariance that few tokens made, drawn towards its diagonal; from `8 d` tokens on as it is.

        (1 - g) cov + g diag(cov),   g = shrinkage(tokens, d)

    Fewer tokens than channels leave directions in which calibration saw no key move at all; coding
    in them would blow up what other texts have there.
    """
    d = cov.shape[-1]
    g = shrinkage(tokens, d)
    return (1 - g) * cov + g * cov * np.eye(d) if g else cov


def shrinkage(tokens: int, d: int) -> float:
    """How far `shrink` goes: 0 from `8 d` tokens on, 1 at none.

    Example:
      >>> shrinkage(8192, 64), shrinkage(256, 64)
      (0.0, 0.5)
    """
    return max(0.0, 1 - tokens / (8 * d))


def allocate(
    weight: np.ndarray,
    bits: float,
    *,
    errors: Sequence[float] = TRELLIS_ERROR,
    choices: Sequence[int] | None = None,
) -> tuple[int, ...]:
    """Whole bits for each coordinate, common to all heads, with the mean `bits`.

    Greedy reverse water-filling: each bit goes where it takes away most error, summed over heads.
    Widths fall along the coordinates, as weights do.

    Args:
      weight: `[..., d]`, falling along d; heads are scaled to equal geometric means first, so that
        none decides alone.
      errors: of a coordinate of variance 1 at 0, 1, ... bits; its length bounds the widths.
      choices: the widths that are allowed, from 0 up; all by default. Kernels like (0, 2, 4).
    Raises:
      InputError: bits that the widths cannot have on average.

    Example:
      >>> import numpy as np
      >>> allocate(np.array([30.0, 5.0, 1.0, 0.3]), 2.0)
      (4, 3, 1, 0)
      >>> allocate(np.array([30.0, 5.0, 1.0, 0.3]), 2.0, choices=(0, 2, 4))
      (4, 2, 2, 0)
    """
    log = np.log(weight.reshape(-1, weight.shape[-1]))
    cost = np.exp(log - log.mean(-1, keepdims=True)).mean(0)  # [d]
    widths, left = _fill(cost[None], np.ones(1, int), bits, errors, choices)
    if left:
        raise InputError(
            "bits",
            got=f"{bits} on average over {cost.size} channels",
            expected=f"a sum of widths {tuple(choices or ())}",
            fix="choose another mean, or allow a width of 1",
        )
    return _falling(widths[0])


def allocate_layers(
    weight: np.ndarray,
    bits: float,
    *,
    kinds: int = 4,
    errors: Sequence[float] = TRELLIS_ERROR,
    choices: Sequence[int] | None = None,
) -> tuple[tuple[int, ...], ...]:
    """Whole bits for each coordinate of each layer, common to its heads, with the mean `bits` over
    all layers, or just below: layers that matter more get more.

    Args:
      weight: `[l, h, d]`, falling along d, in a unit common to all layers, as the Fisher metric
        has: the loss of the model.
      kinds: how many different allocations there may be. Each is compiled once.
      errors, choices: see `allocate`.

    Example:
      >>> import numpy as np
      >>> allocate_layers(np.array([[[30.0, 5.0]], [[0.3, 0.2]]]), 2.0)
      ((4, 3), (1, 0))
    """
    cost = weight.sum(1)  # [l, d]
    free, _ = _fill(cost, np.ones(len(cost), int), bits, errors, choices)
    if len(np.unique(free, axis=0)) <= kinds:
        return tuple(map(_falling, free))
    kind = _clusters(free.sum(-1), kinds)  # [l]
    counts = np.bincount(kind)
    means = np.stack([cost[kind == k].mean(0) for k in range(len(counts))])
    widths, _ = _fill(means, counts, bits, errors, choices)
    return tuple(_falling(widths[k]) for k in kind)


def _falling(widths: np.ndarray) -> tuple[int, ...]:
    return tuple(sorted(widths.tolist(), reverse=True))


def _fill(
    cost: np.ndarray,
    counts: np.ndarray,
    bits: float,
    errors: Sequence[float],
    choices: Sequence[int] | None,
) -> tuple[np.ndarray, int]:
    """Widths `[k, d]` with the mean `bits` for `counts: [k]` vectors of each cost, each step where
    it saves most per bit; and how many bits are left because no step fits."""
    choices = tuple(range(len(errors))) if choices is None else tuple(choices)
    size = int(counts.sum()) * cost.shape[1]
    left = round(bits * size)
    if not 0 <= left <= size * choices[-1] or abs(left - bits * size) > 1e-6:
        raise InputError(
            "bits",
            got=f"{bits} on average over {size} channels",
            expected=f"0 to {choices[-1]}, a whole number of bits per vector",
            fix="choose such a mean",
        )
    steps = np.diff(choices)
    saved = -np.diff(np.asarray(errors)[list(choices)]) / steps  # by each bit of a step
    price = np.append(steps, size * choices[-1] + 1)[:, None] * counts  # [step, k], of a step
    level = np.zeros(cost.shape, int)
    kind = np.arange(len(counts))[:, None]
    while True:
        gain = np.where(price[level, kind] <= left, cost * np.append(saved, 0.0)[level], -1.0)
        best = np.unravel_index(int(np.argmax(gain)), gain.shape)
        if gain[best] < 0:
            return np.asarray(choices)[level], left
        left -= int(price[level[best], best[0]])
        level[best] += 1


def _clusters(budget: np.ndarray, kinds: int) -> np.ndarray:
    """`[l]` cluster of each budget, at most `kinds`, of the least squared distances: runs of the
    sorted budgets, by dynamic programming."""
    order = np.argsort(budget, kind="stable")
    x = budget[order].astype(float)
    n, kinds = len(x), min(kinds, len(np.unique(x)))
    spread = lambda i, j: ((x[i:j] - x[i:j].mean()) ** 2).sum()
    best = np.full((kinds + 1, n + 1), np.inf)
    cut = np.zeros((kinds + 1, n + 1), int)
    best[0, 0] = 0
    for k in range(1, kinds + 1):
        for j in range(k, n + 1):
            tried = [best[k - 1, i] + spread(i, j) for i in range(k - 1, j)]
            cut[k, j] = k - 1 + int(np.argmin(tried))
            best[k, j] = min(tried)
    found, stop = np.zeros(n, int), n
    for k in range(kinds, 0, -1):
        start = cut[k, stop]
        found[order[start:stop]] = k - 1
        stop = start
    return found


def mix(transform: Transform, widths: Sequence[Sequence[int]], *, rng: jax.Array) -> Transform:
    """Turns coordinates of equal width among each other, by a random rotation.

    Single coordinates have heavy tails, and codes are made for Gaussian ones; sums of many are
    nearly Gaussian. Weights become their mean over the run, which within one width costs little:
    with trellis codes at 2 bits SmolLM2 has 13 % less KL, with Lloyd-Max 8 to 20 % less.

    Args:
      widths: one sequence per layer, `[l][d]`; coordinates of no bits stay as they are.
    """
    forward, inverse, weight = (
        a.copy() for a in (transform.forward, transform.inverse, transform.weight)
    )
    for layer, own in enumerate(widths):
        start = 0
        for bits, count in blocks(own):
            run = slice(start, start + count)
            start += count
            if not bits or count == 1:
                continue
            turn = np.asarray(Orthogonal.random(count, rng=fold(rng, "mix", run.start)).matrix)
            forward[layer, ..., run, :] = turn @ forward[layer, ..., run, :]
            inverse[layer, ..., run] = inverse[layer, ..., run] @ turn.T
            weight[layer, ..., run] = weight[layer, ..., run].mean(-1, keepdims=True)
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
