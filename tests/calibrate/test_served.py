"""Moments at later positions against sums over turned samples, and against a model that is there."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from kvjax.calibrate.moments import Moments
from kvjax.calibrate.served import at_positions
from kvjax.calibrate.turned import average, average_mean
from kvjax.core.errors import InputError

WINDOW, SERVED = 8, 40
SEES = np.array([5, 1000])  # tokens that each layer sees
FREQUENCIES = np.array([[1.0, 0.11, 0.003, 0.0], [2 * np.pi, 0.5, 1e-9, 0.04]])  # [l, d / 2]


def turned(x: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """RoPE from its definition: pairs (i, i + d/2) as planes."""
    half = x.shape[-1] // 2
    out = np.empty_like(x)
    for i in range(half):
        c, s = np.cos(angles[i]), np.sin(angles[i])
        out[..., i] = c * x[..., i] - s * x[..., i + half]
        out[..., i + half] = s * x[..., i] + c * x[..., i + half]
    return out


def sample(draw, layer: int, size: int) -> np.ndarray:
    x = draw.normal(size=(50, size)) @ draw.normal(size=(size, size)) + draw.normal(size=size)
    return x + layer


def test_means_over_all_starts():
    draw, starts = np.random.default_rng(0), 33
    for frequencies in FREQUENCIES:
        x = sample(draw, 0, 8)
        everywhere = np.stack([turned(x, frequencies * s) for s in range(starts)])
        gram = np.einsum("snd,sne->de", everywhere, everywhere) / everywhere[..., 0].size
        np.testing.assert_allclose(average(x.T @ x / 50, frequencies, starts), gram, atol=1e-10)
        mean = everywhere.mean((0, 1))
        np.testing.assert_allclose(average_mean(x.mean(0), frequencies, starts), mean, atol=1e-12)


def moments_of(keys: np.ndarray, pre: np.ndarray, queries: np.ndarray) -> Moments:
    """Of `[l, n, d]` each; `pre`: keys less their turned mean before RoPE."""
    cov = lambda x: np.einsum("lnd,lne->lde", x, x)[:, None] / x.shape[1]
    mean = keys.mean(1, keepdims=True)
    blank = dict.fromkeys(f.name for f in dataclasses.fields(Moments))
    parts = {
        "query_gram": cov(queries),
        "key_mean": mean,
        "key_cov": cov(keys - mean),
        "key_cov_pre": cov(pre),
        "key_fisher": 2 * cov(queries),
        "frequencies": FREQUENCIES,
        "value_cov": cov(queries),
        "query_gram_pre_rope": average(
            cov(queries), FREQUENCIES[:, None], np.minimum(SEES, WINDOW)[:, None]
        ),
    }
    return Moments(**{**blank, **parts})


def test_moments_are_those_of_windows_that_begin_everywhere():
    draw = np.random.default_rng(1)
    keys, pre, queries = (np.stack([sample(draw, n, 8) for n in range(2)]) for _ in range(3))
    shift = lambda x, s: np.stack([turned(x[n], FREQUENCIES[n] * s) for n in range(2)])
    everywhere = [
        np.concatenate([shift(x, s) for s in range(SERVED - WINDOW + 1)], 1)
        for x in (keys, pre, queries)
    ]
    got = at_positions(moments_of(keys, pre, queries), WINDOW, SERVED)
    want = moments_of(*everywhere)
    for name in ("query_gram", "key_mean", "key_cov", "key_cov_pre", "key_fisher"):
        np.testing.assert_allclose(getattr(got, name), getattr(want, name), atol=1e-9, err_msg=name)
    assert not np.allclose(got.key_cov, moments_of(keys, pre, queries).key_cov, rtol=0.1)
    np.testing.assert_array_equal(got.value_cov, moments_of(keys, pre, queries).value_cov)
    for name in ("query_gram", "key_cov"):
        values = np.linalg.eigvalsh(getattr(got, name))
        assert values.min() > 0


def test_keys_before_rope_are_met_from_further_away():
    """A uniform distance within the window plus a uniform start; no further than a layer sees."""
    x = np.random.default_rng(3).normal(size=(2, 5, 8))
    moments = moments_of(x, x, x)
    got = at_positions(moments, WINDOW, SERVED, layer_windows=[5, None]).query_gram_pre_rope
    np.testing.assert_allclose(got[0], moments.query_gram_pre_rope[0], rtol=1e-12)
    gram = x[1].T @ x[1] / 5
    eye, total = np.eye(8), np.zeros((8, 8))
    for distance in range(WINDOW):
        for start in range(SERVED - WINDOW + 1):
            turn = turned(eye, FREQUENCIES[1] * (distance + start)).T
            total += turn @ gram @ turn.T
    np.testing.assert_allclose(got[1, 0], total / WINDOW / (SERVED - WINDOW + 1), atol=1e-10)
    everywhere = at_positions(moments, WINDOW, SERVED).query_gram_pre_rope
    assert not np.allclose(everywhere[0], got[0], rtol=0.1)


def test_no_more_positions_than_were_seen_change_nothing():
    x = np.random.default_rng(2).normal(size=(2, 5, 8))
    moments = moments_of(x, x, x)
    assert at_positions(moments, WINDOW, WINDOW) is moments
    assert at_positions(moments, WINDOW, 3) is moments
    longer = at_positions(moments, WINDOW, WINDOW, gradient_window=4)
    assert longer.key_cov is moments.key_cov
    turns = FREQUENCIES[:, None]
    np.testing.assert_array_equal(longer.key_fisher, average(moments.key_fisher, turns, 5))
    without = dataclasses.replace(moments, key_fisher=None)
    assert at_positions(without, WINDOW, SERVED).key_fisher is None
    for sizes in ((0, 5), (5, 0)):
        with pytest.raises(InputError, match="positions"):
            at_positions(moments, *sizes)
