"""Buckets of positions, and what is said of them; the sums over a model are in test_moments.py."""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.calibrate.drift import bucket_edges, drift_share, drift_summary, token_scales
from kvjax.calibrate.moments import SKIP, Moments


def test_edges_are_even_and_short_windows_have_fewer():
    for stop in (5, 8, 12, 13, 100, 2048):
        edges = bucket_edges(SKIP, stop)
        assert edges[0] == SKIP
        assert edges[-1] == stop
        assert len(edges) - 1 == min(8, stop - SKIP)
        assert set(np.diff(edges)) <= {(stop - SKIP) // 8 or 1, -(-(stop - SKIP) // 8)}


def keys(means: np.ndarray, var: float) -> Moments:
    """One layer and head whose buckets have these means `[b, d]` and this trace."""
    parts = {
        "bucket_edges": np.arange(len(means) + 1.0),
        "key_bucket_mean": means[None, None],
        "key_bucket_var": np.full((1, 1, len(means)), var),
    }
    blank = dict.fromkeys(f.name for f in dataclasses.fields(Moments))
    return Moments(**{**blank, **parts})


def test_the_share_of_drift():
    two = np.array([[1.0, 0], [-1, 0]])  # 1 between
    assert drift_share(keys(two, 3.0)) == pytest.approx(0.25)
    assert drift_share(keys(two, 0.0)) == 1
    assert drift_share(keys(two * 0 + 5, 3.0)) == 0
    assert drift_share(keys(two * 0 + 5, 0.0)) == 0
    uneven = dataclasses.replace(keys(two, 3.0), bucket_edges=np.array([0.0, 1, 4]))
    between = 0.25 * 1.5**2 + 0.75 * 0.5**2
    assert drift_share(uneven) == pytest.approx(between / (between + 3))
    old = dataclasses.replace(keys(two, 3.0), bucket_edges=None)
    assert drift_share(old) is None
    assert drift_summary(old) == []


def test_the_summary_is_two_short_lines():
    means = np.zeros((2, 3, 2, 1))  # [l, h, b, d]
    means[1, 2, :, 0] = 3, -3  # 9 between, 1 within
    means[0, :, :, 0] = 1, -1  # 1 between, 1 within
    scales = np.zeros((2, 3, 3, 2))
    scales[..., 0] = 12.345, 2.5, 4.56
    scales[..., 1, 1] = 0.04
    known = {"key_scales": scales, "value_scales": 2 * scales, "key_bucket_var": np.ones((2, 3, 2))}
    made = dataclasses.replace(keys(means[0, 0], 1.0), key_bucket_mean=means, **known)
    assert drift_summary(made) == [
        "tokens, median over heads: keys of norm 12.3 (log +-0.20), largest 4.56; "
        "values of norm 24.7 (log +-0.28), largest 9.12",
        "drift, median over heads: 50.0% of the key variance lies between 2 buckets of positions "
        "(most: 90.0%, layer 1 head 2)",
    ]


def test_scales_of_one_token():
    x = jnp.array([[[3.0, -4.0]]])
    np.testing.assert_allclose(token_scales(x), [[[5, math.log(5), 4]]], rtol=1e-6)
