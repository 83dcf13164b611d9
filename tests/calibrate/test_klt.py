"""The metric KLT against its definition, and bit allocation against every other."""

from __future__ import annotations

import itertools

import jax
import numpy as np
import pytest

from kvjax.calibrate.klt import (
    LLOYD_MAX_ERROR,
    TRELLIS_ERROR,
    allocate,
    allocate_layers,
    blocks,
    metric_klt,
    mix,
    shrink,
)
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


def test_bits_by_layer_are_the_best_bits():
    """Among all allocations of 6 bits to 2 layers of 2 coordinates in 2 heads."""
    for seed in range(20):
        weight = np.exp(2 * np.random.default_rng(seed).normal(size=(2, 2, 2)))
        weight = np.sort(weight, -1)[..., ::-1]

        def cost(widths, w=weight):
            return (w * np.array(TRELLIS_ERROR)[np.array(widths)][:, None]).sum()

        rivals = (
            ((a, b), (c, d))
            for a, b, c, d in itertools.product(range(6), repeat=4)
            if a + b + c + d == 6
        )
        assert cost(allocate_layers(weight, 1.5)) == pytest.approx(min(map(cost, rivals)))


def test_layers_of_few_kinds():
    rng = np.random.default_rng(4)
    size = np.exp(2 * rng.normal(size=12))
    weight = size[:, None, None] * np.sort(np.exp(rng.normal(size=(12, 2, 16))))[..., ::-1]
    cost = lambda widths: (weight * np.array(TRELLIS_ERROR)[np.array(widths)][:, None]).sum()
    by_kinds = {k: allocate_layers(weight, 2.0, kinds=k) for k in (1, 2, 3, 12)}
    for kinds, widths in by_kinds.items():
        assert len(set(widths)) <= kinds
        assert 2 * 16 - 1 < np.sum(widths) / 12 <= 2 * 16
    costs = [cost(widths) for widths in by_kinds.values()]
    assert costs == sorted(costs, reverse=True)
    assert costs[-2] < 0.5 * costs[0]
    bits = np.sum(by_kinds[3], -1)
    assert (np.diff(bits[np.argsort(size)]) >= -8).all()  # what matters more gets more


def test_few_tokens_are_shrunk_and_many_are_not():
    rng = np.random.default_rng(9)
    scale = np.logspace(0, -1, D)  # channels that differ stay different
    seen, unseen = (rng.normal(size=(n, D)) * scale for n in (D // 2, 4000))
    cov = seen.T @ seen / len(seen)
    assert shrink(cov, 8 * D) is cov
    drawn = shrink(cov, len(seen))
    np.testing.assert_array_equal(np.diag(drawn), np.diag(cov))
    forward = [metric_klt(np.eye(D), c).forward for c in (cov, drawn)]
    raw, safe = ((unseen @ f.T) ** 2 for f in forward)
    assert raw.mean() > 1e3  # directions that calibration did not see
    assert safe.mean() < 20


def test_widths_can_be_restricted():
    weight = metric_klt(gram(7), gram(8)).weight
    cost = lambda widths: (weight * np.array(LLOYD_MAX_ERROR)[list(widths)]).sum()
    free = allocate(weight, 2.0, errors=LLOYD_MAX_ERROR)
    tiers = allocate(weight, 2.0, errors=LLOYD_MAX_ERROR, choices=(0, 2, 4))
    assert set(tiers) <= {0, 2, 4}
    assert sum(tiers) == 2 * D
    flat = allocate(weight, 2.0, errors=LLOYD_MAX_ERROR, choices=(0, 2))
    assert flat == (2,) * D
    assert cost(free) <= cost(tiers) < cost(flat)
    with pytest.raises(InputError, match="a sum of widths"):
        allocate(weight[:, :3], 1.0, choices=(0, 2))


def test_mixing_turns_what_has_one_width():
    metric, cov = gram(7)[None], gram(8)[None]  # one layer
    plain = metric_klt(metric, cov)
    widths = (4, 4, 4, 3, 3, 2, 2, 2, 1, 0, 0, 0)
    mixed = mix(plain, [widths], rng=jax.random.key(0))
    eye = np.tile(np.eye(D), (1, 3, 1, 1))
    np.testing.assert_allclose(mixed.forward @ mixed.inverse, eye, atol=1e-5)
    white = mixed.forward @ cov @ mixed.forward.swapaxes(-1, -2)
    np.testing.assert_allclose(white, eye, atol=1e-5)
    turn = mixed.forward @ plain.inverse
    start = 0
    for bits, count in blocks(widths):
        run = slice(start, start + count)
        start += count
        assert abs(turn[..., run, : start - count]).max(initial=0) < 1e-5  # nothing from elsewhere
        assert abs(turn[..., run, start:]).max(initial=0) < 1e-5
        if bits and count > 1:
            assert abs(turn[..., run, run] - np.eye(count)).max() > 0.1
            np.testing.assert_allclose(
                mixed.weight[..., run],
                plain.weight[..., run].mean(-1, keepdims=True).repeat(count, -1),
            )
        else:
            np.testing.assert_array_equal(mixed.weight[..., run], plain.weight[..., run])


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5])
def test_errors_of_the_trellis_are_the_measured_ones(bits):
    """On 384 paths of 64 tokens; the table is from 512 others, 1 % each."""
    x = np.random.default_rng(8100 + bits).normal(size=(64, 384)).astype(np.float32)
    codec = Trellis(bits, axis="tokens")
    x_hat = jax.jit(lambda x: codec.decode(codec.encode(x)))(x)
    assert ((x - x_hat) ** 2).mean() == pytest.approx(TRELLIS_ERROR[bits], rel=0.04)


def test_errors_of_lloyd_max_are_the_published_ones():
    assert LLOYD_MAX_ERROR[1:5] == pytest.approx((0.36338, 0.117482, 0.034548, 0.009501), rel=1e-3)
