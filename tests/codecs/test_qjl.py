"""Inner products in expectation: QJL, TurboQuant's residual sketch, and the gains of `Normalized`."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_laws import check_laws, pages, queries, weights

from kvjax.codecs import QJL, Codebook, Normalized, Residual, distortion, rotated
from kvjax.core.errors import InputError
from kvjax.methods import turboquant
from kvjax.methods.describe import code_bits

CONSTANTS = json.loads((Path(__file__).parent.parent / "golden" / "distortion.json").read_text())
KINDS = ("gaussian", "orthogonal")
D = 128


def unit_vectors(n: int, d: int, seed: int) -> jax.Array:
    x = np.random.default_rng(seed).normal(size=(n, d))
    return jnp.asarray(x / np.linalg.norm(x, axis=-1, keepdims=True), jnp.float32)


@pytest.mark.parametrize("rows", [32, 64])
@pytest.mark.parametrize("kind", ["gaussian", "orthogonal"])
def test_unbiased_over_sketches(kind, rows):
    """One fixed pair, n sketches: the mean is within 4 sigma / sqrt(n), both for a norm and for the
    variance of the estimator. A pair with a large cosine: a wrong constant is then a bias."""
    n, d = 4096, 32
    rng = np.random.default_rng(5)
    x = rng.normal(size=d)
    q = x + 0.3 * rng.normal(size=d)
    page = jnp.broadcast_to(jnp.asarray(x, jnp.float32), (16, d))

    def estimate(key):
        codec = QJL.random(d, rng=key, rows=rows, kind=kind)
        return codec.logits(codec.prepare(jnp.asarray(q, jnp.float32)[None]), codec.encode(page))[
            0, 0
        ]

    keys = jax.random.split(jax.random.key(8), n)
    seen = np.asarray(jax.jit(jax.vmap(estimate))(keys), np.float64)
    exact = q @ x
    sigma = seen.std() / math.sqrt(n)
    assert abs(seen.mean() - exact) < 4 * sigma, (seen.mean(), exact, sigma)
    assert 4 * sigma < 0.03 * exact  # or it would not see a constant that is 3 % off
    lengths = (q @ q) * (x @ x)
    if kind == "gaussian":  # exact; 4 sigma of a variance over n samples is 4 sqrt(2 / n) = 9 %
        assert seen.var() == pytest.approx((math.pi / 2 * lengths - exact**2) / rows, rel=0.09)


@functools.cache
def statistics(kind: str) -> np.ndarray:
    """d * Var of TurboQuant's inner products at 1 to 4 bits, over data and methods."""
    x, q = unit_vectors(512, D, 1), unit_vectors(128, D, 2)

    def one(rng):
        rows = []
        for bits in (1, 2, 3, 4):
            method = turboquant(bits, D, rng=rng, residual="qjl", sketch=kind)
            error = method.key.logits(method.key.prepare(q), method.key.encode(x)) - q @ x.T
            rows.append((error**2).mean() * D)
        return jnp.stack(rows)

    return np.asarray(
        jax.jit(lambda keys: jax.lax.map(one, keys))(jax.random.split(jax.random.key(4), 32))
    ).mean(0)


@pytest.mark.parametrize("kind", KINDS)
def test_turboquant_prod_has_the_published_variance(kind):
    """d * Var = c * D(b - 1), with c = pi/2 for Gaussian and pi/2 - 1 for orthogonal sketches.

    32 methods, 512 vectors, 128 queries: sampling leaves about 1 %, and finite d another 0.5 % (the
    variance of Gaussian rows is pi/2 - 1/d at one bit); 3 % is asked.
    """
    variance = statistics(kind)
    remaining = np.array([1, *(distortion(D, b) for b in (1, 2, 3))])
    c = math.pi / 2 if kind == "gaussian" else math.pi / 2 - 1
    np.testing.assert_allclose(variance, c * remaining, rtol=0.03)
    golden = CONSTANTS[f"prod_{kind}_measured"]
    np.testing.assert_allclose(variance, list(golden.values()), rtol=0.05)  # its own noise is 1-5 %


def test_the_sketch_constants_differ():
    """2.75 times less variance from orthogonal rows: the default of `QJL.random`, and why."""
    ratio = statistics("gaussian") / statistics("orthogonal")
    np.testing.assert_allclose(ratio, (math.pi / 2) / (math.pi / 2 - 1), rtol=0.05)
    codec = QJL.random(8, rng=jax.random.key(0), rows=20)
    assert codec.sketch.shape == (20, 8)
    gram = codec.sketch[:8] @ codec.sketch[:8].T
    np.testing.assert_allclose(gram / gram[0, 0], np.eye(8), atol=1e-5)


def products(codec, x, q) -> tuple[np.ndarray, np.ndarray]:
    """Slope of <x, x_hat> on |x|^2, and d * E(<q, x_hat> - <q, x>)^2."""

    def both(codec, x, q):
        decoded = codec.decode(codec.encode(x))
        return (decoded * x).sum(-1).mean(), D * ((q @ (decoded - x).T) ** 2).mean()

    return tuple(float(a) for a in jax.jit(both)(codec, x, q))


def gained(bits: int, gain: str):
    # A float16 scale: the rounding of a bf16 one (0.2 %) would hide what a gain does.
    inner = Normalized(Codebook.lloyd_max(D, bits), gain=gain, scale_dtype=jnp.dtype("float16"))
    return rotated("hadamard", D, inner, rng=jax.random.key(6))


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_gains_do_what_they_say(bits):
    """Lloyd-Max alone shrinks by its distortion D; the unbiased gain undoes that at a price.

    mse: slope 1 - D, d * Var = D. unbiased: slope 1, d * Var = D / (1 - D). The slope
    of n vectors has a deviation of sqrt(D / (d n)), the error one of about 1 %.
    """
    x, q = unit_vectors(16384, D, 9), unit_vectors(256, D, 10)
    left = distortion(D, bits)
    slope, error = products(gained(bits, "none"), x, q)
    assert slope == pytest.approx(1 - left, abs=4 * math.sqrt(left / D / len(x)))
    assert slope - 1 == pytest.approx(CONSTANTS["mse_slope_minus_1_measured"][str(bits)], rel=0.04)
    assert error == pytest.approx(left, rel=0.03)
    slope, error = products(gained(bits, "unbiased"), x, q)
    assert slope == pytest.approx(1, abs=1e-4)
    assert error == pytest.approx(left / (1 - left), rel=0.03)
    if str(bits) in CONSTANTS["eden_unbiased_d_var"]:
        assert error == pytest.approx(CONSTANTS["eden_unbiased_d_var"][str(bits)], rel=0.04)


def test_gains_have_the_right_length_and_the_least_error():
    x = 5 * unit_vectors(512, D, 11)
    decoded = {}
    for gain in ("none", "norm", "unbiased", "least_squares"):
        codec = gained(2, gain)
        decoded[gain] = np.asarray(codec.decode(codec.encode(x)))
    np.testing.assert_allclose(np.linalg.norm(decoded["norm"], axis=-1), 5, rtol=1e-3)
    np.testing.assert_allclose((decoded["unbiased"] * x).sum(-1), 25, rtol=1e-3)
    per_token = {gain: ((y - np.asarray(x)) ** 2).sum(-1) for gain, y in decoded.items()}
    for gain in ("none", "norm", "unbiased"):  # 1e-3: the scale is rounded to float16
        assert (per_token["least_squares"] <= per_token[gain] * (1 + 1e-3)).all()
    assert per_token["least_squares"].mean() < 0.999 * per_token["none"].mean()


def fixed(codec: QJL, norm: float) -> QJL:
    return dataclasses.replace(codec, fixed_norm=norm)


def test_a_fixed_norm_stores_signs_only(quick_jit):
    """On vectors of that length it is the same estimate; on others it is off by their ratio."""
    stored = QJL.random(24, rng=jax.random.key(12))
    codec = fixed(stored, 2.5)
    check_laws(codec, pages(), queries(), weights())
    check_laws(Normalized(codec), pages(), queries(), weights())
    assert code_bits(codec, 24, 16) * 24 == 24
    assert code_bits(stored, 24, 16) * 24 == 24 + 16
    assert code_bits(Normalized(Residual(Codebook.lloyd_max(24, 2), codec)), 24, 16) * 24 == 72 + 16
    x = 2.5 * unit_vectors(16, 24, 13)
    round_trip = quick_jit(lambda codec, x: codec.decode(codec.encode(x)))
    expected = round_trip(stored, x)
    np.testing.assert_allclose(round_trip(codec, x), expected, atol=1e-5)
    np.testing.assert_allclose(round_trip(codec, 2 * x), expected, atol=1e-5)
    zeros = round_trip(Normalized(codec), jnp.zeros((16, 24)))
    np.testing.assert_array_equal(zeros, 0)


@pytest.mark.parametrize("norm", [0, -1.0, math.inf, math.nan])
def test_a_fixed_norm_is_positive(norm):
    with pytest.raises(InputError, match="positive"):
        fixed(QJL.random(8, rng=jax.random.key(0)), norm)


def test_gamma_may_be_fixed():
    """The residual of a unit vector hardly varies in length, so the constant costs little: d * Var
    as with a stored norm, within the 5 % that 512 vectors and 128 queries leave."""
    x, q = unit_vectors(512, D, 14), unit_vectors(128, D, 15)
    sketch = QJL.random(D, rng=jax.random.key(16))
    for bits in (2, 4):
        book = Codebook.lloyd_max(D, bits - 1)
        gamma = math.sqrt(distortion(D, bits - 1))
        one, other = (
            rotated("hadamard", D, Normalized(Residual(book, s)), rng=jax.random.key(17))
            for s in (sketch, fixed(sketch, gamma))
        )
        expected = (math.pi / 2 - 1) * distortion(D, bits - 1)
        for codec in (one, other):
            slope, error = products(codec, x, q)
            assert slope == pytest.approx(1, abs=0.01)
            assert error == pytest.approx(expected, rel=0.05)
