"""GEAR's parts against float64 written from the equations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax.codecs import LowRank, Residual, Sparse, Uniform
from kvjax.codecs.low_rank import orthonormal
from kvjax.core.errors import InputError
from kvjax.methods import gear

T, D, R = 64, 32, 4


def page(seed=0):
    """Singular values that fall off, as a residual's do not: power iteration has work to do."""
    draw = np.random.default_rng(seed)
    u, _ = np.linalg.qr(draw.normal(size=(T, D)))
    v, _ = np.linalg.qr(draw.normal(size=(D, D)))
    return (u * 0.7 ** np.arange(D)) @ v.T


def low_rank(rank=R, iterations=3, **options):
    rng = jax.random.key(1)
    return LowRank.random(D, rank, rng=rng, iterations=iterations, **options)


def test_factors_are_those_of_power_iteration():
    codec, x = low_rank(), page()
    b = np.asarray(codec.start, np.float64)
    for _ in range(3):
        a = np.linalg.qr(x @ b)[0]
        b = np.linalg.qr(x.T @ a)[0]
    want = x @ b @ b.T
    code = codec.encode(jnp.asarray(x, jnp.float32))
    got = np.asarray(codec.decode(code), np.float64)
    size = np.linalg.norm(x)
    assert np.linalg.norm(got - want) < 2**-8 * size  # bf16 factors
    values = np.linalg.svd(x, compute_uv=False)
    best = np.linalg.norm(values[R:])
    assert best <= np.linalg.norm(x - want) < 1.05 * best
    assert np.linalg.norm(x - got) < 1.06 * best
    assert sum(a.nbytes for a in jax.tree.leaves(code)) == 2 * R * (T + D)


def test_columns_that_add_nothing():
    x = np.random.default_rng(2).normal(size=(T, 3))
    columns = np.stack([x[:, 0], 2 * x[:, 0], x[:, 1], 0 * x[:, 0]], 1)
    for scale in 1e-12, 1.0, 1e12:
        got = np.asarray(orthonormal(jnp.asarray(scale * columns, jnp.float32)), np.float64)
        np.testing.assert_allclose(got.T @ got, np.diag([1, 0, 1, 0]), atol=1e-5)
    # A page of lower rank than asked for comes back whole.
    thin = (x @ np.random.default_rng(3).normal(size=(3, D))).astype(np.float32)
    codec = low_rank()
    np.testing.assert_allclose(codec.decode(codec.encode(thin)), thin, atol=0.02 * thin.std())


@pytest.mark.parametrize("axis", ["channels", "tokens"])
def test_outliers_are_kept_apart(axis):
    x = np.random.default_rng(4).normal(size=(T, D)).astype(np.float32)
    x[3, 5], x[9, 5], x[3, 7], x[40, 20] = 300, -200, 250, -150
    inner = Uniform(2, axis=axis)
    codec = Sparse(inner, 4, axis)
    rows = x if axis == "channels" else x.T
    taken = np.zeros(rows.shape, bool)
    for row, mask in zip(rows, taken, strict=True):
        order = np.argsort(row)
        mask[[*order[:2], *order[-2:]]] = True
    mean = np.where(taken, 0, rows).sum(1, keepdims=True) / (rows.shape[1] - 4)
    replaced = np.where(taken, mean, rows)
    replaced = replaced if axis == "channels" else replaced.T
    rest = np.asarray(inner.decode(inner.encode(jnp.asarray(replaced))))
    taken = taken if axis == "channels" else taken.T
    got = np.asarray(codec.decode(codec.encode(jnp.asarray(x))))
    np.testing.assert_allclose(got[~taken], rest[~taken], atol=1e-6)
    apart = np.abs(got - x)[taken]
    assert (apart <= 2**-8 * np.abs(x - rest)[taken] + 1e-6).all()


def test_equal_numbers_are_taken_once():
    x = jnp.ones((T, D)).at[2, 3].set(9.0)
    codec = Sparse(Uniform(2), 4)
    np.testing.assert_allclose(codec.decode(codec.encode(x)), x, atol=1e-6)


def test_each_part_takes_off_error():
    draw = np.random.default_rng(5)
    x = draw.normal(size=(8, T, 64)) + 3 * draw.normal(size=(8, T, 2)) @ draw.normal(
        size=(8, 2, 64)
    )
    x[draw.random(x.shape) < 0.01] *= 20
    x = jnp.asarray(x, jnp.float32)
    rng = jax.random.key(0)
    error = lambda m: float(((m.key.decode(m.key.encode(x)) - x) ** 2).mean())
    none = error(gear(2, 64, rng=rng, rank=0, outliers=0))
    thin = error(gear(2, 64, rng=rng, outliers=0))
    both = error(gear(2, 64, rng=rng))
    assert both < 0.8 * thin < 0.8 * none


def test_in_the_cache_at_true_bytes():
    """Twice 300 tokens through the cache against attention over the decoded pages; real bytes."""
    layout = kvjax.Layout(sink=4, recent=64, page=64)
    method = kvjax.methods.get("gear-2", head_dim=64, layout=layout)
    draw = np.random.default_rng(6)
    q, k, v = (jnp.asarray(draw.normal(size=(2, 300, 2, 64)), jnp.float32) for _ in range(3))
    make = lambda: kvjax.init(
        method, capacity=300, kv_heads=2, head_dim=64, batch=2, dtype=jnp.float32
    )
    _, cache = jax.jit(lambda c: kvjax.prefill(method, c, k, v))(make())
    got = jax.jit(lambda c: kvjax.attend(method, c, q[:, -1][:, :, None]))(cache)[:, :, 0]
    held = []
    for codec, x in ((method.key, k), (method.value, v)):
        x = np.array(x.transpose(0, 2, 1, 3), np.float64)
        inside = x[:, :, 4 : 4 + 3 * 64].reshape(2, 2, 3, 64, 64)
        coded = codec.decode(codec.encode(jnp.asarray(inside, jnp.float32)))
        x[:, :, 4 : 4 + 3 * 64] = np.asarray(coded).reshape(2, 2, 192, 64)
        held.append(x)
    scores = np.einsum("bhd,bhtd->bht", np.asarray(q[:, -1], np.float64), held[0]) / 8
    p = np.exp(scores - scores.max(-1, keepdims=True))
    want = np.einsum("bht,bhtd->bhd", p / p.sum(-1, keepdims=True), held[1])
    np.testing.assert_allclose(got, want, atol=2e-5)
    # 2 bits, scale and zero per 64; bf16 factors of rank 4; two outliers of 24 bits per 64.
    bits = 2 + 32 / 64 + 16 * 4 * 2 / 64 + 2 * 24 / 64
    starts = 32 / (2 * 2 * 64 * 64)  # a page's position, over both sides of two heads
    found = kvjax.cache.history_bits_per_value(method, cache)
    assert found == pytest.approx(bits + starts)


def test_mistakes_are_told():
    rng = jax.random.key(0)
    with pytest.raises(InputError, match="rank 32 for vectors of 32"):
        LowRank.random(D, D, rng=rng)
    with pytest.raises(InputError, match="rank 4 for pages of 4 tokens"):
        low_rank().check(D, 4)
    with pytest.raises(InputError, match="3 outliers along 'channels'"):
        Sparse(Uniform(2), 3)
    with pytest.raises(InputError, match="64 outliers of 64 tokens; expected at most 62"):
        Sparse(Uniform(2), 64, "tokens").check(D, T)
    with pytest.raises(InputError, match="group of tokens: got 64 on 32"):
        kvjax.methods.get("gear-2", head_dim=64, layout=kvjax.Layout(recent=32, page=32))
    with pytest.raises(InputError, match="vectors of 64"):
        kvjax.Method(*[Residual(Uniform(2), LowRank.random(64, 4, rng=rng))] * 2).check(128)
