"""Moments at the positions that are served, worked out from those of shorter windows."""

from __future__ import annotations

import dataclasses

import numpy as np

from kvjax.calibrate.moments import Moments
from kvjax.core.errors import InputError


def at_positions(
    moments: Moments, window: int, served: int, *, gradient_window: int | None = None
) -> Moments:
    """What calibration would have seen, had its windows begun everywhere in the served context.

    A model with rotary positions does not notice where a text begins: queries and keys s positions
    later are R_s q and R_s k. So their moments over all starts s = 0 .. served - window are
    averages that need no other pass over the model:

        query_gram = mean_s R_s G R_s^T,   key_cov = mean_s R_s (C + m m^T) R_s^T - mean mean^T

    Without it methods know slowly turning channels at the first positions only, and lose all that
    calibration gained at three times the length of its windows.

    Args:
      window: tokens of a calibration window. served: of the longest context; not more than
        `window` leaves all as it is.
      gradient_window: that of `key_fisher`, where it is another.
    Returns:
      Moments whose `query_gram`, `key_mean`, `key_cov`, `key_cov_pre` and `key_fisher` are those
      averages. Values and what is before RoPE do not depend on positions; scales and buckets stay
      those of the window.
    Raises:
      InputError: sizes under 1.

    Example:
      >>> from kvjax.calibrate.served import average
      >>> import numpy as np
      >>> slow, fast = 1e-6, 1.0  # radians per position
      >>> average(np.diag([1.0, 1, 0, 0]), np.array([fast, slow]), 1000).diagonal().round(2)
      array([0.5, 1. , 0.5, 0. ])
    """
    gradient_window = gradient_window or window
    if min(window, served, gradient_window) < 1:
        raise InputError(
            "positions",
            got=f"{served} with windows of {min(window, gradient_window)}",
            expected="1 or more of each",
            fix="give the tokens of the longest context",
        )
    turns = moments.frequencies[:, None]  # [l, 1, d / 2]
    fisher = moments.key_fisher
    if fisher is not None and served > gradient_window:
        fisher = average(fisher, turns, served - gradient_window + 1)
        moments = dataclasses.replace(moments, key_fisher=fisher)
    if served <= window:
        return moments
    starts = served - window + 1
    mean = average_mean(moments.key_mean, turns, starts)
    outer = lambda m: m[..., :, None] * m[..., None, :]
    about = average(moments.key_cov + outer(moments.key_mean), turns, starts)
    return dataclasses.replace(
        moments,
        query_gram=average(moments.query_gram, turns, starts),
        key_mean=mean,
        key_cov=about - outer(mean),
        key_cov_pre=average(moments.key_cov_pre, turns, starts),
    )


def average(gram: np.ndarray, frequencies: np.ndarray, starts: int) -> np.ndarray:
    """The mean of `R_s gram R_s^T` over s = 0 .. starts - 1, in closed form.

    With z_j = x_j + i x_(j + d/2) the rotation is z_j exp(i f_j s), so `E[z z^H]` takes the mean of
    `exp(i (f_j - f_k) s)`, and `E[z z^T]` that of `exp(i (f_j + f_k) s)`.

    Args:
      gram: `[..., d, d]`, symmetric. frequencies: `[..., d / 2]`, radians per position.
    """
    half = frequencies.shape[-1]
    aa, ab = gram[..., :half, :half], gram[..., :half, half:]
    ba, bb = gram[..., half:, :half], gram[..., half:, half:]
    one, other = frequencies[..., :, None], frequencies[..., None, :]
    apart = (aa + bb + 1j * (ba - ab)) * _mean_turn(one - other, starts)
    along = (aa - bb + 1j * (ba + ab)) * _mean_turn(one + other, starts)
    top = np.concatenate([(apart + along).real, (along - apart).imag], -1)
    low = np.concatenate([(apart + along).imag, (apart - along).real], -1)
    return np.concatenate([top, low], -2) / 2


def average_mean(mean: np.ndarray, frequencies: np.ndarray, starts: int) -> np.ndarray:
    """The mean of `R_s mean` over s = 0 .. starts - 1, `[..., d]`."""
    first, second = np.split(mean, 2, -1)
    turned = (first + 1j * second) * _mean_turn(frequencies, starts)
    return np.concatenate([turned.real, turned.imag], -1)


def _mean_turn(angle: np.ndarray, count: int) -> np.ndarray:
    """The mean of `exp(i angle s)` over s = 0 .. count - 1."""
    half = (angle + np.pi) % (2 * np.pi) / 2 - np.pi / 2  # of a whole turn the sine is 0 as well
    sine = np.sin(half)
    still = np.abs(sine) < 1e-12
    size = np.where(still, 1.0, np.sin(count * half) / np.where(still, 1.0, count * sine))
    return size * np.exp(1j * half * (count - 1))
