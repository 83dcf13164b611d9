"""The measured rows of tests/golden/distortion.json, d = 128: our codecs against an independent
implementation of every variant of the family."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.codecs import QJL, Codebook, Normalized, Residual, distortion, rotated
from kvjax.core.codec import Codec
from kvjax.methods.released import RESIDUAL_NORMS

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "distortion.json").read_text())
D = 128


def book(bits: int, **options) -> Codec:
    return Normalized(Codebook.lloyd_max(D, bits), scale_dtype="float32", **options)


def prod(bits: int, kind: str, rng: jax.Array) -> Codec:
    sketch = QJL.random(D, rng=jax.random.fold_in(rng, 1), kind=kind)
    return sketch if bits == 1 else Residual(book(bits - 1), sketch)


ROWS = {
    "mse": lambda b, rng: book(b),
    "mse_normcorr": lambda b, rng: book(b, gain="norm"),
    "ls_scale": lambda b, rng: book(b, gain="least_squares"),
    "unbiased_eden": lambda b, rng: book(b, gain="unbiased"),
    "unbiased_9pt_scale_search": lambda b, rng: book(b, gain="unbiased", search=9),
    "prod_gaussian": lambda b, rng: prod(b, "gaussian", rng),
    "prod_orthogonal": lambda b, rng: prod(b, "orthogonal", rng),
    "rabitq_ext": lambda b, rng: Normalized(
        Codebook.uniform(D, b), gain="unbiased", search=1 if b == 1 else 33, spread=0.5
    ),
}
# Three rotations each leave 1-3 % on a row of theirs, 5 % where the sketch is Gaussian.
NOISE = {name: 0.06 if "gaussian" in name else 0.03 for name in ROWS}
# Their search over 27 rescalings is coarser than ours: we are 8 % under their row at 2 bits.
NOISE["rabitq_ext"] = 0.09


@functools.cache
def round_trip():
    return jax.jit(lambda codec, x: codec.decode(codec.encode(x)))


def sphere(n: int, seed: int) -> np.ndarray:
    x = np.random.default_rng(9000 + seed).normal(size=(n, D))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("name", ROWS)
def test_measured_row(name, bits):
    x = sphere(4096, bits)
    errors = []
    for i in range(3):
        rng = jax.random.fold_in(jax.random.key(31), i)
        codec = rotated("haar", D, ROWS[name](bits, rng), rng=rng)
        errors.append(((x - np.asarray(round_trip()(codec, x))) ** 2).sum(-1).mean())
    golden = GOLDEN["measured_rows_d128"][name]["mse"][str(bits)]
    digits = 0.5e-4 if golden < 0.1 else 0.5e-3  # theirs are printed with so many
    assert np.mean(errors) == pytest.approx(golden, rel=NOISE[name], abs=digits)


@pytest.mark.parametrize("bits", [3, 4])
def test_norm_correction_removes_the_jitter_of_gains(bits):
    """d * Var of <q, x_hat> at an angle of 60 degrees, where a vector's own gain shows."""
    x = sphere(4096, 10 + bits)
    w = np.random.default_rng(9100).normal(size=x.shape)
    w -= (w * x).sum(1, keepdims=True) * x
    q = 0.5 * x + np.sqrt(0.75) * w / np.linalg.norm(w, axis=1, keepdims=True)
    variance = {}
    for gain in ("none", "norm"):
        codec = rotated("haar", D, book(bits, gain=gain), rng=jax.random.key(32))
        variance[gain] = D * ((np.asarray(round_trip()(codec, x)) - x) * q).sum(1).var()
    golden = GOLDEN["norm_correction_cos_0.5_d_var"][str(bits)]
    # 4096 products, and a gain common to the rotation: 2 % and 4 %.
    assert variance["none"] == pytest.approx(golden["before"], rel=0.08)
    assert variance["norm"] == pytest.approx(golden["after"], rel=0.08)


GAINS = {"mse": "none", "mse_normcorr": "norm", "unbiased": "unbiased"}


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_kl_after_softmax(bits):
    """KL(p || p_hat) over 4096 normal keys, at logit deviations of 1 and 3, 64 queries."""
    random = np.random.default_rng(9200)
    keys, queries = random.normal(size=(4096, D)), random.normal(size=(64, D))
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)

    def kl(x_hat: np.ndarray, deviation: float) -> float:
        p, approximate = (
            np.asarray(jax.nn.log_softmax(jnp.asarray(deviation * queries @ a.T), -1))
            for a in (keys, x_hat)
        )
        return float((np.exp(p) * (p - approximate)).sum(-1).mean())

    for name, gain in GAINS.items():
        codec = rotated("haar", D, book(bits, gain=gain), rng=jax.random.key(33))
        x_hat = np.asarray(round_trip()(codec, keys.astype(np.float32)), np.float64)
        found = [kl(x_hat, deviation) for deviation in (1, 3)]
        golden = GOLDEN["softmax_kl"][str(bits)][name]
        # At deviation 3 a few keys decide: 64 queries leave 7 %.
        assert found[0] == pytest.approx(golden[0], rel=0.06, abs=5e-5)
        assert found[1] == pytest.approx(golden[1], rel=0.15)


def test_more_candidates_bring_little_more():
    """61 instead of 9 lengths: 15.1 instead of 13.0 % less unbiased error at 4 bits."""
    x = sphere(2048, 20)
    error = {}
    for search in (1, 9, 61):
        codec = rotated("haar", D, book(4, gain="unbiased", search=search), rng=jax.random.key(34))
        error[search] = ((np.asarray(round_trip()(codec, x)) - x) ** 2).sum(-1).mean()
    golden = GOLDEN["scale_search_unbiased_D_reduction_percent"]
    for search in (9, 61):
        gain = 100 * (1 - error[search] / error[1])
        assert gain == pytest.approx(golden[f"{search}_candidates"]["4"], abs=1.5)


def test_released_residual_norms_are_roots_of_distortions():
    """What the authors' code stores instead of a norm; at 4 bits theirs is 1 % too large."""
    assert pytest.approx(GOLDEN["released_code_residual_norms"]["values"]) == RESIDUAL_NORMS
    exact = [1.0, *(np.sqrt(distortion(None, bits)) for bits in range(1, 5))]
    np.testing.assert_allclose(RESIDUAL_NORMS, exact, rtol=0.022)


def test_bounds():
    upper = GOLDEN["bounds"]["upper_D_mse"]
    assert upper["constant"] == pytest.approx(np.sqrt(3) * np.pi / 2, rel=1e-4)
    for bits in (1, 2, 3, 4):
        assert 4.0**-bits < distortion(D, bits) < upper["constant"] * 4.0**-bits
        assert upper["values"][str(bits)] == pytest.approx(upper["constant"] * 4.0**-bits, rel=0.01)
