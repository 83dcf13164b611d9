"""CaM: who inherits, how much, and how often."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.core.errors import InputError
from kvjax.policies import merge_values

S, D, WINDOW = 20, 3, 4


@functools.cache
def data():
    """Rows `[3, 2]`: slots in no order, two of them empty; a row where nobody stays."""
    noise = np.random.default_rng(11)
    at = np.stack([[noise.permutation(S) for _ in range(2)] for _ in range(3)])
    at[at < 2] = -1
    stays = noise.random((3, 2, S)) < 0.5
    stays[2] = False
    value, mass = noise.normal(size=(3, 2, S, D)), noise.random((3, 2, S)) ** 2
    mass[0, 0] = 0.0
    return value, at, stays, mass


@functools.cache
def drawn(n: int) -> np.ndarray:
    value, at, stays, mass = data()

    def once(rng):
        args = (jnp.asarray(value, jnp.float32), at, stays, jnp.asarray(mass, jnp.float32))
        return merge_values(*args, rng=rng, window=WINDOW)

    return np.asarray(jax.jit(jax.vmap(once))(jax.random.split(jax.random.key(3), n)))


def heirs(at: np.ndarray, stays: np.ndarray, e: int) -> list[int]:
    later = [j for j in np.argsort(at) if stays[j] and at[j] > at[e]]
    return later[:WINDOW]


def expected(value, at, stays, mass):
    """Mean over draws, and its variance, of every value of the row."""
    mean, variance = value.copy(), np.zeros_like(value)
    for e in range(S):
        who = heirs(at, stays & (at >= 0), e)
        if at[e] < 0 or stays[e] or not who:
            continue
        among = mass[who].mean()
        p = 0.0 if mass[e] == 0 else min(1.0, mass[e] / among)
        for j in who:
            mean[j] += p * value[e] / len(who)
            variance[j] += p * (1 - p) * (value[e] / len(who)) ** 2
    return mean, variance


def test_values_are_merged_as_often_as_the_formula_says():
    """4.5 sigma over 4000 draws, of 360 values; certain merges and refusals exactly."""
    n = 4000
    got = drawn(n).astype(np.float64).mean(0)
    for i in range(3):
        for j in range(2):
            mean, variance = expected(*(x[i, j] for x in data()))
            assert (abs(got[i, j] - mean) <= 4.5 * np.sqrt(variance / n) + 2e-6).all()


def test_a_draw_is_all_or_nothing():
    """One token leaves, one stays: its value comes whole or not at all."""
    value, at = jnp.array([[1.0], [10.0]]), jnp.array([3, 7])
    run = jax.jit(
        jax.vmap(lambda rng: merge_values(value, at, at == 7, jnp.array([1.0, 2.0]), rng=rng))
    )
    got = np.asarray(run(jax.random.split(jax.random.key(0), 2000)))[:, 1, 0]
    assert set(got) == {10.0, 11.0}
    assert abs((got == 11).mean() - 0.5) < 4 * 0.5 / np.sqrt(2000)


def test_only_tokens_that_stay_change():
    value, at, stays, _ = data()
    left = ~(stays & (at >= 0))
    assert (drawn(4000)[:, left] == value.astype(np.float32)[left]).all()


def test_mistakes_are_told():
    x = jnp.ones(2)
    with pytest.raises(InputError, match="window"):
        merge_values(x[:, None], jnp.arange(2), x > 0, x, rng=jax.random.key(0), window=0)
