"""Means and second moments averaged over the turns of RoPE, in closed form."""

from __future__ import annotations

import numpy as np

Counts = int | np.ndarray


def average(gram: np.ndarray, frequencies: np.ndarray, count: Counts) -> np.ndarray:
    """The mean of `R_s gram R_s^T` over s = 0 .. count - 1, in closed form.

    With z_j = x_j + i x_(j + d/2) the rotation is z_j exp(i f_j s), so `E[z z^H]` takes the mean of
    `exp(i (f_j - f_k) s)`, and `E[z z^T]` that of `exp(i (f_j + f_k) s)`.

    Args:
      gram: `[..., d, d]`, symmetric. frequencies: `[..., d / 2]`, radians per position.
      count: one for all, or one for each of the leading axes of `frequencies`.

    Example:
      >>> slow, fast = 1e-6, 1.0
      >>> average(np.diag([1.0, 1, 0, 0]), np.array([fast, slow]), 1000).diagonal().round(2)
      array([0.5, 1. , 0.5, 0. ])
    """
    count = np.asarray(count)[..., None, None]
    half = frequencies.shape[-1]
    aa, ab = gram[..., :half, :half], gram[..., :half, half:]
    ba, bb = gram[..., half:, :half], gram[..., half:, half:]
    one, other = frequencies[..., :, None], frequencies[..., None, :]
    apart = (aa + bb + 1j * (ba - ab)) * _mean_turn(one - other, count)
    along = (aa - bb + 1j * (ba + ab)) * _mean_turn(one + other, count)
    top = np.concatenate([(apart + along).real, (along - apart).imag], -1)
    low = np.concatenate([(apart + along).imag, (apart - along).real], -1)
    return np.concatenate([top, low], -2) / 2


def average_mean(mean: np.ndarray, frequencies: np.ndarray, count: Counts) -> np.ndarray:
    """The mean of `R_s mean` over s = 0 .. count - 1, `[..., d]`."""
    first, second = np.split(mean, 2, -1)
    turned = (first + 1j * second) * _mean_turn(frequencies, np.asarray(count)[..., None])
    return np.concatenate([turned.real, turned.imag], -1)


def _mean_turn(angle: np.ndarray, count: np.ndarray) -> np.ndarray:
    """The mean of `exp(i angle s)` over s = 0 .. count - 1."""
    half = (angle + np.pi) % (2 * np.pi) / 2 - np.pi / 2  # of a whole turn the sine is 0 as well
    sine = np.sin(half)
    still = np.abs(sine) < 1e-12
    size = np.where(still, 1.0, np.sin(count * half) / np.where(still, 1.0, count * sine))
    return size * np.exp(1j * half * (count - 1))
