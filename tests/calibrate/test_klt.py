"""The metric KLT against its definition, and bit allocation against every other."""

from __future__ import annotations

import itertools

import jax
import numpy as np
import pytest

from kvjax.calibrate.klt import LLOYD_MAX_ERROR, TRELLIS_ERROR, allocate, blocks, metric_klt
from kvjax.codecs import Trellis
from kvjax.core.errors import InputError

D = 12


def gram(seed: int, heads: int = 3) -> np.ndarray:
    """Covariances with spectra over four decades, one per head."""
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.normal(size=(heads, D, D)))[0]
    return (basis * np.logspace(0, -4, D)) @ basis.swapaxes(-1, -2)


def test_coordinates_are_white_and_weights_say_what_errors_cost():
    metric, cov = gram(1), gram(2)
    made = metric_klt(metric, cov, damping=0.01)
    np.testing.assert_allclose(
        made.forward @ made.inverse, np.tile(np.eye(D), (3, 1, 1)), atol=1e-8
    )
    white = made.forward @ cov @ made.forward.swapaxes(-1, -2)
    np.testing.assert_allclose(white, np.tile(np.eye(D), (3, 1, 1)), atol=1e-6)
    # Errors e cost e^T S e with S the damped metric; in coordinates that is sum weight (F e)^2.
    damped = metric + 0.01 * np.trace(metric, axis1=1, axis2=2)[:, None, None] / D * np.eye(D)
    again = made.forward.swapaxes(-1, -2) @ (made.weight[..., None] * made.forward)
    np.testing.assert_allclose(again, damped, atol=1e-8)
    assert (np.diff(made.weight) <= 0).all()


def test_it_beats_every_rotation():
    """Coding gain: the geometric mean of the weights, against the error of any orthogonal basis."""
    metric, cov = gram(3, 1)[0], gram(4, 1)[0]
    weight = metric_klt(metric, cov, damping=0).weight
    ours = D * np.exp(np.log(weight).mean())
    rotation = np.trace(metric) * np.trace(cov) / D  # white error, whatever the rotation
    assert ours < 0.2 * rotation
    # and of the balanced transform with one rate, (sum sqrt weight)^2 / d
    assert ours < np.sqrt(weight).sum() ** 2 / D < rotation


def test_directions_in_which_nothing_moves_do_no_harm():
    cov = gram(5)
    cov[:, :, 0] = cov[:, 0, :] = 0
    made = metric_klt(gram(6), cov)
    assert np.isfinite(made.forward).all()
    assert np.isfinite(made.inverse).all()
    np.testing.assert_allclose(
        made.forward @ made.inverse, np.tile(np.eye(D), (3, 1, 1)), atol=1e-5
    )
    with pytest.raises(InputError, match="zeros"):
        metric_klt(gram(6), np.zeros((3, D, D)))


@pytest.mark.parametrize("errors", [TRELLIS_ERROR, LLOYD_MAX_ERROR])
def test_greedy_bits_are_the_best_bits(errors):
    """Among all allocations of 8 bits to 4 coordinates; errors are convex, so greedy is exact."""
    for seed in range(20):
        weight = np.sort(np.exp(2 * np.random.default_rng(seed).normal(size=4)))[::-1]
        cost = lambda widths, w=weight: sum(a * errors[b] for a, b in zip(w, widths, strict=True))
        rivals = (w for w in itertools.product(range(6), repeat=4) if sum(w) == 8)
        assert cost(allocate(weight, 2.0, errors=errors)) == pytest.approx(min(map(cost, rivals)))


def test_allocation_is_falling_and_adds_up():
    weight = metric_klt(gram(7), gram(8)).weight
    for bits in (0, 1, 2, 2.25, 3.5, 5):
        widths = allocate(weight, bits)
        assert sum(widths) == bits * D
        assert list(widths) == sorted(widths, reverse=True)
        assert blocks(widths) == [(b, len(list(g))) for b, g in itertools.groupby(widths)]
    for bits in (-1, 5.5, 2.1):
        with pytest.raises(InputError, match="on average"):
            allocate(weight, bits)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5])
def test_errors_of_the_trellis_are_the_measured_ones(bits):
    """On 384 paths of 64 tokens; the table is from 512 others, 1 % each."""
    x = np.random.default_rng(8100 + bits).normal(size=(64, 384)).astype(np.float32)
    codec = Trellis(bits, axis="tokens")
    x_hat = jax.jit(lambda x: codec.decode(codec.encode(x)))(x)
    assert ((x - x_hat) ** 2).mean() == pytest.approx(TRELLIS_ERROR[bits], rel=0.04)


def test_errors_of_lloyd_max_are_the_published_ones():
    assert LLOYD_MAX_ERROR[1:5] == pytest.approx((0.36338, 0.117482, 0.034548, 0.009501), rel=1e-3)
