"""Runs of neighbours: how many, which, and that attention over them is what it was."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.core.errors import InputError
from kvjax.policies import merge_runs

S, D, COUNT = 40, 8, 18
LENGTHS = (40, 33, 18, 9, 0)  # rows: full, ragged, as many as runs, fewer, none


def row(n: int, seed: int) -> dict[str, np.ndarray]:
    """A drifting walk of keys, `n` tokens with gaps, in slots of no order."""
    noise = np.random.default_rng(seed)
    walk = noise.normal(size=D) * 2 + np.cumsum(0.5 * noise.normal(size=(n, D)), axis=0)
    at = np.full(S, -1)
    key, value = noise.normal(size=(2, S, D)) * 9  # rubbish in empty slots
    slots = noise.permutation(S)[:n]
    at[slots] = np.sort(noise.permutation(3 * S)[:n])
    key[slots], value[slots] = walk, noise.normal(size=(n, D))
    protected = (noise.random(S) < 0.08) & (at >= 0)
    weight = noise.integers(1, 4, S).astype(float)
    mass = noise.random(S)
    return {
        "key": key,
        "value": value,
        "positions": at,
        "weight": weight,
        "protected": protected,
        "mass": mass,
    }


@functools.cache
def rows() -> dict[str, np.ndarray]:
    made = [row(n, seed) for seed, n in enumerate(LENGTHS)]
    return {name: np.stack([r[name] for r in made])[:, None] for name in made[0]}  # [rows, 1, ...]


@functools.cache
def merged(kernel: str = "gaussian"):
    cast = lambda x: jnp.asarray(x, {"f": jnp.float32, "i": jnp.int32, "b": bool}[x.dtype.kind])
    mass, *rest = [
        cast(rows()[n]) for n in ("mass", "key", "value", "positions", "weight", "protected")
    ]
    run = jax.jit(functools.partial(merge_runs, count=COUNT, kernel=kernel))
    return jax.tree.map(lambda x: np.asarray(x)[:, 0], run(*rest, mass=mass))


def oracle(r: dict[str, np.ndarray], gaussian: bool) -> list[tuple]:
    """Joins the most alike pair of neighbours until `COUNT` runs are left."""
    order = [i for i in np.argsort(r["positions"]) if r["positions"][i] >= 0]
    unit = r["key"] / np.linalg.norm(r["key"], axis=-1, keepdims=True)
    free = [n for n in range(len(order) - 1) if not r["protected"][order[n : n + 2]].any()]
    free.sort(key=lambda n: -(unit[order[n]] @ unit[order[n + 1]]))
    joined = set(free[: max(0, len(order) - COUNT)])
    runs: list[list[int]] = []
    for n, slot in enumerate(order):
        if n - 1 in joined:
            runs[-1].append(slot)
        else:
            runs.append([slot])
    out = []
    for run in runs:
        pivot = max(run, key=lambda i: r["mass"][i])
        apart = ((r["key"][run] - r["key"][pivot]) ** 2).sum(-1)
        n = r["weight"][run]
        w = n * np.exp(-apart / (2 * apart.mean())) if gaussian and len(run) > 1 else n
        key = w @ r["key"][run] / w.sum()
        out.append((key, n @ r["value"][run] / n.sum(), r["positions"][pivot], n.sum()))
    return out


@pytest.mark.parametrize("kernel", ["gaussian", "mean"])
def test_runs_are_the_most_alike_neighbours(kernel):
    got = merged(kernel)
    for i, length in enumerate(LENGTHS):
        want = oracle({name: x[i, 0] for name, x in rows().items()}, kernel == "gaussian")
        runs = min(length, COUNT)
        assert len(want) == runs
        np.testing.assert_array_equal(got.positions[i, runs:], -1)
        np.testing.assert_array_equal(got.weight[i, runs:], 0)
        for j, (key, value, at, n) in enumerate(want):
            assert (got.positions[i, j], got.weight[i, j]) == (at, n)
            np.testing.assert_allclose(got.key[i, j], key, rtol=1e-4, atol=1e-4)
            np.testing.assert_allclose(got.value[i, j], value, rtol=1e-4, atol=1e-4)


def test_protected_tokens_stay_single():
    for i in range(len(LENGTHS)):
        r = {name: x[i, 0] for name, x in rows().items()}
        for slot in np.flatnonzero(r["protected"]):
            (j,) = np.flatnonzero(merged().positions[i] == r["positions"][slot])
            np.testing.assert_allclose(merged().key[i, j], r["key"][slot], rtol=1e-6)
            assert merged().weight[i, j] == r["weight"][slot]


def test_a_count_below_the_protected_ones_is_kept_too():
    key = jnp.asarray(np.random.default_rng(1).normal(size=(12, D)), jnp.float32)
    got = jax.jit(lambda k: merge_runs(k, k, jnp.arange(12), jnp.ones(12), jnp.arange(12) < 9, 4))(
        key
    )
    assert got.weight.sum() == 12
    assert (np.asarray(got.weight) > 0).sum() == 4
    # The free tokens 9, 10, 11 are one run before any protected one is touched.
    assert got.weight[-1] >= 3


def attention(q, key, value, n):
    e = n * np.exp(q @ key.T)
    return e @ value / e.sum(-1, keepdims=True)


def test_equal_keys_merge_without_loss():
    """Runs of equal keys: attention with the bias log n is attention over all tokens."""
    noise = np.random.default_rng(2)
    lengths = noise.integers(1, 5, COUNT)
    key = np.repeat(noise.normal(size=(COUNT, D)), lengths, axis=0)
    s = len(key)
    value, n, q = noise.normal(size=(s, D)), noise.integers(1, 4, s), noise.normal(size=(5, D))
    args = [jnp.asarray(x, jnp.float32) for x in (key, value)]
    run = jax.jit(functools.partial(merge_runs, count=COUNT))
    got = run(*args, jnp.arange(s), jnp.asarray(n, jnp.float32), jnp.zeros(s, bool))
    assert (np.asarray(got.weight) == np.add.reduceat(n, np.r_[0, np.cumsum(lengths)[:-1]])).all()
    want = attention(q, key, value, n)
    out = attention(q, *(np.asarray(x, np.float64) for x in (got.key, got.value, got.weight)))
    np.testing.assert_allclose(out, want, atol=2e-6)


def test_the_bias_is_worth_having():
    """On keys that drift, attention over runs is nearer with the weights than without."""
    r = {name: x[0, 0] for name, x in rows().items()}
    q = np.random.default_rng(4).normal(size=(200, D)) / np.sqrt(D)
    want = attention(q, r["key"], r["value"], r["weight"])
    key, value, n = merged().key[0], merged().value[0], merged().weight[0]
    error = lambda weight: np.linalg.norm(attention(q, key, value, weight) - want)
    assert error(n) < 0.8 * error(np.ones_like(n))


def test_mistakes_are_told():
    x, one = jnp.ones((3, 2)), jnp.ones(3)
    with pytest.raises(InputError, match="count 0"):
        merge_runs(x, x, jnp.arange(3), one, one > 2, 0)
    with pytest.raises(InputError, match="kernel 'flat'"):
        merge_runs(x, x, jnp.arange(3), one, one > 2, 2, kernel="flat")
