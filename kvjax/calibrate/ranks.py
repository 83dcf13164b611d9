"""How many dimensions each layer's keys and values keep, of a given sum."""

from __future__ import annotations

import numpy as np

from kvjax.core.errors import InputError


def default_multiple(head_dim: int) -> int:
    """What ranks per head are multiples of: a quarter of the head, at most 32.

    Palu has 32, of heads of 128. Layers of the same ranks are one structure, compiled once: a finer
    multiple spends the sum a little better and compiles longer.

    Example:
      >>> default_multiple(16), default_multiple(64), default_multiple(256)
      (4, 16, 32)
    """
    return max(1, min(32, head_dim // 4))


def uniform_ranks(count: int, head_dim: int, ratio: float, multiple: int) -> np.ndarray:
    """`[count]`, all alike.

    Raises:
      InputError: as `check_ratio`.
    """
    check_ratio(head_dim, ratio, multiple)
    return np.full(count, multiple * round(ratio * head_dim / multiple))


def fisher_ranks(fisher: np.ndarray, head_dim: int, ratio: float, multiple: int) -> np.ndarray:
    """Ranks in proportion to `fisher`, at least `multiple` and at most the head each.

        r_i = clip(c F_i, multiple, d),   c such that sum r_i = ratio d count

    rounded down to the multiple; what that leaves goes, a multiple at a time, where most was cut
    off.

    Args:
      fisher: of any shape, positive; what each matrix matters.
    Returns:
      Ranks per head, of that shape.
    Raises:
      InputError: as `check_ratio`; a Fisher information that is not positive.

    Source: Palu's rank search, arXiv 2407.21118; there matrices of keys and values share one sum
      too.

    Example:
      >>> import numpy as np
      >>> fisher_ranks(np.array([1.0, 1.0, 2.0, 9.0]), 64, 0.5, 8)
      array([16, 16, 32, 64])
    """
    weight = np.asarray(fisher, np.float64)
    if not (np.isfinite(weight).all() and (weight > 0).all()):
        raise InputError(
            "Fisher information",
            got=f"values from {weight.min():.2g} to {weight.max():.2g}",
            expected="finite, positive numbers",
            fix="measure it on more text, or use --search uniform",
        )
    check_ratio(head_dim, ratio, multiple)
    flat, top = weight.ravel(), head_dim // multiple
    units = round(ratio * top * flat.size)
    low, high = 0.0, top / flat.min()
    for _ in range(200):
        middle = (low + high) / 2
        over = np.clip(middle * flat, 1, top).sum() > units
        low, high = (low, middle) if over else (middle, high)
    wanted = np.clip(low * flat, 1, top)
    given = np.floor(wanted + 1e-9).astype(int)
    for _ in range(units - given.sum()):
        given[np.argmax(np.where(given < top, wanted - given, -np.inf))] += 1
    return multiple * given.reshape(weight.shape)


def least_rank(head_dim: int, multiple: int) -> int:
    """The multiple nearest to 30 % of the head: what every matrix keeps under a threshold.

    Example:
      >>> least_rank(64, 8), least_rank(64, 16), least_rank(128, 64)
      (16, 16, 64)
    """
    return multiple * max(1, round(0.3 * head_dim / multiple))


def threshold_ranks(spectra: np.ndarray, head_dim: int, ratio: float, multiple: int) -> np.ndarray:
    """The ranks at which all matrices keep the same share of their singular values.

    A rank is the first multiple whose share is the threshold or more, and at least `least_rank`;
    the threshold is the one whose ranks have the mean that is asked for.

    Args:
      spectra: `[..., s d]`, squared singular values, falling, of groups of s heads, summed over
        the groups of a layer.
    Returns:
      Ranks per head, `[...]`.
    Raises:
      InputError: as `check_ratio`; a spectrum of zeros.

    Source: Eigen Attention, arXiv 2408.05646.
    Differs from the paper: the threshold follows from the mean rank; the paper lowers it in steps
      of 0.02 until the error of a layer's output reaches a bound.

    Example:
      >>> flat, steep = np.ones(8), 0.01 ** np.arange(8.0)
      >>> threshold_ranks(np.stack([flat, steep]), 8, 0.625, 1)
      array([8, 2])
    """
    least = least_rank(head_dim, multiple)
    check_ratio(head_dim, ratio, multiple, least)
    top, lead = head_dim // multiple, spectra.shape[:-1]
    values = np.sqrt(np.maximum(spectra.reshape(-1, spectra.shape[-1]), 0))
    if not (values.sum(-1) > 0).all():
        raise InputError(
            "moments", got="all zeros", expected="heads that vary", fix="calibrate on more text"
        )
    share = (values / values.sum(-1, keepdims=True)).cumsum(-1)
    step = values.shape[-1] // top
    share = share[:, step - 1 :: step]  # [matrices, top], at each rank there is
    given = np.full(len(values), least // multiple)
    rows = np.arange(len(values))
    for _ in range(round(ratio * top * len(values)) - given.sum()):  # raises the threshold
        kept = np.where(given < top, share[rows, np.minimum(given, top) - 1], np.inf)
        given[np.argmin(kept)] += 1
    return multiple * given.reshape(lead)


def check_ratio(head_dim: int, ratio: float, multiple: int, least: int = 0) -> None:
    """Raises `InputError` for a multiple that does not divide the head, or a mean rank under it,
    under `least` or over the head."""
    if not 1 <= multiple <= head_dim or head_dim % multiple:
        raise InputError(
            "--multiple",
            got=multiple,
            expected=f"a divisor of the head_dim, {head_dim}",
            fix="choose such a number",
        )
    least = max(least, multiple)
    if not least <= ratio * head_dim <= head_dim:
        raise InputError(
            "--rank",
            got=ratio,
            expected=f"{least / head_dim:g} to 1, {least} to {head_dim} channels of a head",
            fix="choose such a share, another --multiple or another --search",
        )
