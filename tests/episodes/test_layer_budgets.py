"""Budgets of layers: both formulas of EpiCache, whole tokens, and the similarity of keys."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvjax.core.errors import InputError
from kvjax.episodes.budgets import key_similarity, layer_budgets, layer_shares

# Computed from both formulas of EpiCache (arXiv 2509.17396 and its code) for M = 4096.
SIGMA, M = [0.95, 0.9, 0.7, 0.8, 0.6, 0.85], 4096
CODE = {
    1.1: (1024, 1177, 6916, 3943, 10014, 2524),
    1.3: (1024, 1024, 7040, 3624, 10903, 2139),
    2: (1024, 1024, 6981, 2513, 13684, 1117),
}
PAPER = {
    1.1: [874.2, 1873.8, 6274.3, 4016.7, 8609.9, 2927.1],
    2: [189.0, 756.2, 6805.7, 3024.7, 12099.0, 1701.4],
}


def test_published_formulas():
    for alpha, want in CODE.items():
        assert layer_budgets(SIGMA, M, alpha, formula="code") == want
    for alpha, want in PAPER.items():
        np.testing.assert_allclose(layer_shares(SIGMA, M, alpha), want, atol=0.05)
        whole = layer_budgets(SIGMA, M, alpha)
        assert sum(whole) == 6 * M
        assert np.abs(np.array(whole) - want).max() < 1.05


def test_largest_remainders():
    # Shares 100/6, 200/6, 300/6 of 100: 16.67, 33.33, 50.
    assert layer_budgets([0.9, 0.8, 0.7], 100 / 3, 1, least=0) == (17, 33, 50)


@pytest.mark.parametrize("formula", ["paper", "code"])
def test_equal_layers_and_alpha_0_are_uniform(formula):
    assert layer_budgets([0.5] * 3, 100, 2, formula=formula) == (100,) * 3
    assert layer_budgets([1.0] * 3, 100, 2, formula=formula) == (100,) * 3
    assert layer_budgets([0.1, 0.5, 1.0], 100, 0, formula=formula) == (100,) * 3


@given(
    st.lists(st.floats(-1, 1), min_size=1, max_size=12),
    st.integers(8, 500),
    st.floats(0, 8),
    st.integers(0, 8),
    st.floats(1, 4),
)
def test_any_budgets_keep_their_sum_and_bounds(sigma, m, alpha, least, room):
    most = int(m * room)
    budgets = layer_budgets(sigma, m, alpha, least=least, most=most)
    assert sum(budgets) == m * len(sigma)
    assert least <= min(budgets)
    assert max(budgets) <= most
    order = np.argsort(sigma)[::-1]  # never more for a layer that moves less
    assert (np.diff(np.array(budgets)[order]) >= -1).all()


def test_bounds_leave_the_others_in_proportion():
    shares = layer_shares([1.0, 0.9, 0.8, 0.0], 100, 1, least=10, most=240)
    np.testing.assert_allclose(shares, [10, 50, 100, 240], rtol=1e-9)


def test_key_similarity():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 3, 2, 2, 25, 4)).astype(np.float32)  # l, b, h, t, d
    cosine = lambda x, y: (x * y).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(y, axis=-1)
    wide = lambda x: x.astype(np.float64)
    want = cosine(wide(a), wide(b)).mean((1, 2, 3))
    np.testing.assert_allclose(key_similarity(a, b), want, atol=1e-6)
    parts = [
        cosine(wide(x).reshape(3, 2, 2, -1), wide(y).reshape(3, 2, 2, -1))
        for x, y in [(a[..., i : i + 10, :], b[..., i : i + 10, :]) for i in (0, 10, 20)]
    ]
    np.testing.assert_allclose(key_similarity(a, b, 10), np.mean(parts, (0, 2, 3)), atol=1e-6)
    np.testing.assert_allclose(key_similarity(a, a * jax.numpy.float32(3)), 1, atol=1e-6)


def test_what_is_refused():
    for bad in ([], [0.5, float("nan")], [1.5], [[0.5]]):
        with pytest.raises(InputError, match="similarity"):
            layer_budgets(bad, 10, 1)
    with pytest.raises(InputError, match="alpha"):
        layer_budgets([0.5], 10, -1)
    with pytest.raises(InputError, match="per_layer"):
        layer_budgets([0.5], 0, 1)
    with pytest.raises(InputError, match="formula: got both; expected one of paper, code"):
        layer_budgets([0.5], 10, 1, formula="both")
    with pytest.raises(InputError, match="bounds of a layer: got 11 to 10"):
        layer_budgets([0.5], 10, 1, least=11)
    with pytest.raises(InputError, match="bounds"):
        layer_budgets([0.5, 0.1], 10, 1, most=9)
    with pytest.raises(InputError, match="keys"):
        key_similarity(np.ones((2, 3, 4)), np.ones((2, 3, 5)))
    with pytest.raises(InputError, match="window"):
        key_similarity(np.ones((2, 3, 4)), np.ones((2, 3, 4)), 0)
