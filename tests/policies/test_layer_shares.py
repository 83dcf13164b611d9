"""Budgets of layers: exact sums, lines that fall, and what they do at the ends."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvjax.core.errors import InputError
from kvjax.policies import as_tokens, pyramid, uniform

sizes = st.integers(1, 5000)


@given(budget=sizes, layers=st.integers(1, 80), tokens=sizes, window=st.integers(0, 64))
def test_pyramids_fall_and_sum_exactly(budget, layers, tokens, window):
    line = pyramid(budget, layers, tokens, window)
    assert sum(line) == layers * budget
    assert list(line) == sorted(line, reverse=True)
    if budget > window:
        assert min(line) >= window
    if tokens > budget:
        assert max(line) <= max(tokens, budget)


def test_a_pyramid_is_the_line_of_the_paper():
    """Float64 from the formula, each layer within one token of it."""
    budget, layers, tokens, window, beta = 2048, 32, 30000, 32, 20
    base = budget - window
    low = base // beta
    high = 2 * base - low
    line = window + high - np.arange(layers) * (high - low) / (layers - 1)
    got = np.array(pyramid(budget, layers, tokens, window, beta))
    assert (abs(got - line) < 1).all()
    assert (got[0], got[-1]) == (window + high, window + low)


def test_a_short_prompt_caps_the_first_layers():
    """high = tokens - window, and the last layers get what the first ones cannot hold."""
    line = pyramid(600, 5, tokens=1000, window=100)
    assert line == (1000, 800, 600, 400, 200)


def test_uniform_where_there_is_nothing_to_share():
    assert pyramid(600, 3, tokens=500, window=32) == uniform(600, 3)  # all of it fits
    assert pyramid(32, 3, tokens=500, window=32) == uniform(32, 3)  # the window takes all
    assert pyramid(64, 1, tokens=500, window=32) == (64,)


def test_shares_and_tokens():
    assert as_tokens(0.29, 100) == 29
    assert as_tokens(1.0, 100) == 100
    assert as_tokens(1e-6, 100) == 1
    assert as_tokens(1, 100) == 1
    assert as_tokens(np.int64(7), 100) == 7
    assert as_tokens(np.float32(0.5), 100) == 50


@pytest.mark.parametrize("wrong", [0, -3, 0.0, 1.5, 2048.0, True, float("nan"), "half", None])
def test_no_budget_is_guessed(wrong):
    with pytest.raises(InputError, match="a share of the prompt"):
        as_tokens(wrong, 100)


def test_mistakes_are_told():
    for call in (
        lambda: uniform(0, 3),
        lambda: uniform(3, 0),
        lambda: pyramid(64, 4, tokens=1000, window=-1),
        lambda: pyramid(64, 4, tokens=1000, window=8, beta=0),
    ):
        with pytest.raises(InputError):
            call()
