"""Predicted logit errors against the sheet's numbers and against quantized normal keys in numpy."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from kvjax.calibrate.klt import LLOYD_MAX_ERROR, allocate, metric_klt
from kvjax.calibrate.moments import Moments
from kvjax.calibrate.predicted import bound_db, least_error, predicted_db
from kvjax.calibrate.rungs import RUNGS, balanced, centred
from kvjax.codecs import Codebook, Dropped, Linear, Matrix, Normalized, Tiers, Uniform, lloyd_max
from kvjax.core.errors import InputError
from kvjax.core.method import Method
from kvjax.methods import get

D = 32


def gram(seed: int, d: int = D, heads: int = 2) -> np.ndarray:
    """Spectra of 1 / i in bases of their own, one per head."""
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.normal(size=(heads, d, d)))[0]
    return (basis / np.arange(1, d + 1)) @ basis.swapaxes(-1, -2)


def moments(metric: np.ndarray, cov: np.ndarray, mean: np.ndarray | None = None) -> Moments:
    """One layer; the same mean and covariance before RoPE as after it, since nothing turns."""
    heads, d = metric.shape[:2]
    mean = np.zeros((heads, d)) if mean is None else mean
    known = {
        "tokens": 1000,
        "query_gram": metric[None],
        "key_mean": mean[None],
        "key_mean_pre": mean[None],
        "key_cov": cov[None],
        "key_cov_pre": cov[None],
        "frequencies": np.zeros((1, d // 2)),
    }
    rest = np.tile(np.eye(d), (1, heads, 1, 1))
    return Moments(**{f.name: known.get(f.name, rest) for f in dataclasses.fields(Moments)})


def nearest(x: np.ndarray, levels: np.ndarray) -> np.ndarray:
    return levels[np.searchsorted((levels[1:] + levels[:-1]) / 2, x)]


def one_length(z: np.ndarray, levels, gain: str, weight=1.0) -> np.ndarray:
    """z `[n, d]` -> its reconstruction: unit vectors to the nearest levels, as in the codec."""
    size = np.linalg.norm(z, axis=1, keepdims=True)
    u = z / size
    u_hat = levels(u)
    along = (weight * u * u_hat).sum(1, keepdims=True)
    whole = (weight * u * u).sum(1, keepdims=True)
    return size * u_hat * (whole / along if gain == "unbiased" else 1.0)


def measured(metric, cov, mean, forward, code, n: int = 12_000) -> float:
    """The error in dB of `code` behind `forward`, on normal keys; errors in common are free."""
    rng = np.random.default_rng(8200)
    rest = rng.normal(size=(n, len(cov))) @ np.linalg.cholesky(cov).T
    z = (rest + mean) @ forward.T
    e = (code(z) - z) @ np.linalg.inv(forward).T
    e = e - e.mean(0)
    ratio = np.einsum("ni,ij,nj->", e, metric, e, optimize=True) / n / np.trace(metric @ cov)
    return 10 * np.log10(ratio)


def rotation(seed: int, d: int = D) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(d, d)))[0]


def test_the_sheet_of_rungs():
    """128 channels, 1 / i spectra in two random bases, 2 bits, plain gains: what a script without
    this code measured on 8000 vectors was -9.11, -12.28, -15.21, and -18.02 the bound."""
    rng = np.random.default_rng(1)
    bases = [np.linalg.qr(rng.normal(size=(128, 128)))[0][None] for _ in range(2)]
    cov, metric = ((a / np.arange(1.0, 129)) @ a.swapaxes(1, 2) for a in bases)
    world = moments(metric, cov)
    rng = jax.random.key(0)
    close = lambda methods, db: np.testing.assert_allclose(
        predicted_db(methods, world), db, atol=0.3
    )
    close([get("turboquant-2", head_dim=128)], -9.2)
    close(balanced(2, world, rng=rng, gain="none"), -12.3)
    np.testing.assert_allclose(bound_db(world, 2), -18.1, atol=0.3)
    # Widths per head, without a length per token, are the sheet's; ours lose 0.1 dB by the length.
    basis = metric_klt(metric[0], cov[0], damping=0)
    widths = allocate(basis.weight, 2, errors=LLOYD_MAX_ERROR)
    key = Linear(Matrix.of(basis.forward.astype(np.float32)), allocated(widths, "none"))
    close([Method(key, key)], -15.3)


def allocated(widths, gain, weight=None):
    """The codec of the KLT rung, from its widths."""
    kept = np.count_nonzero(widths)
    runs = [(b, len(list(g))) for b, g in itertools.groupby(widths[:kept])]
    tiers = Tiers(tuple(Codebook.lloyd_max(kept, b) for b, _ in runs), tuple(n for _, n in runs))
    metric = None if weight is None else weight[..., :kept].astype(np.float32)
    coded = Normalized(tiers, gain=gain, metric=metric)
    return Tiers((coded, Dropped()), (kept, len(widths) - kept)) if kept < len(widths) else coded


@pytest.mark.parametrize("gain", ["none", "unbiased"])
@pytest.mark.parametrize("rung", ["centred", "balanced"])
def test_one_width_on_normal_keys(rung, gain):
    metric, cov = gram(3)[0], gram(4)[0]
    mean = np.random.default_rng(5).normal(size=D)
    world = moments(metric[None], cov[None], mean[None])
    recipe = {"centred": centred, "balanced": balanced}[rung]
    forward, at = np.eye(D), mean
    if rung == "balanced":
        basis = metric_klt(metric, cov)
        forward = basis.weight[:, None] ** 0.25 * basis.forward
    levels = np.array(lloyd_max(D, 2))
    rivals = []
    for seed in range(4):  # predictions are averages over rotations
        turned = rotation(seed) @ forward
        shift = turned @ at
        code = lambda z, s=shift: one_length(z - s, lambda u: nearest(u, levels), gain) + s
        rivals.append(measured(metric, cov, at, turned, code))
    made = recipe(2, world, rng=jax.random.key(1), gain=gain)
    np.testing.assert_allclose(predicted_db(made, world), np.mean(rivals), atol=0.2)


@pytest.mark.parametrize("size", [0.3, 1.0, 3.0])
def test_a_mean_that_stays_in(size):
    """TurboQuant's keys: the part of the error that tokens share is free."""
    metric, cov = gram(6)[0], gram(7)[0]
    direction = np.random.default_rng(8).normal(size=D)
    mean = size * direction * np.sqrt(np.trace(cov)) / np.linalg.norm(direction)
    levels = np.array(lloyd_max(D, 2))
    code = lambda z: one_length(z, lambda u: nearest(u, levels), "none")
    rivals = [measured(metric, cov, mean, rotation(s), code, 4000) for s in range(24)]
    world = moments(metric[None], cov[None], mean[None])
    made = [get("turboquant-2", head_dim=D)]
    rival = 10 * np.log10(np.mean(10 ** (np.array(rivals) / 10)))
    # Where nine tenths of the energy is the mean the prediction is 0.4 dB low; why is not known.
    atol = 0.2 if size <= 1 else 0.6
    np.testing.assert_allclose(predicted_db(made, world), rival, atol=atol)


@pytest.mark.parametrize("gain", ["none", "unbiased"])
@pytest.mark.parametrize("power", [1, 2])  # of the spectra: 2 lets few coordinates rule
def test_allocated_bits_on_normal_keys(gain, power):
    sharpen = lambda a: np.linalg.matrix_power(a, power)
    metric, cov = sharpen(gram(9)[0]), sharpen(gram(10)[0])
    basis = metric_klt(metric, cov)
    widths = allocate(basis.weight, 2, errors=LLOYD_MAX_ERROR)
    kept = int(np.count_nonzero(widths))
    books = [np.array(lloyd_max(kept, b)) for b in widths[:kept]]

    def levels(u):
        return np.stack([nearest(u[:, i], book) for i, book in enumerate(books)], 1)

    def code(z):
        made = one_length(z[:, :kept], levels, gain, basis.weight[:kept])
        return np.concatenate([made, np.zeros((len(z), D - kept))], 1)

    key = Linear(
        Matrix(*(a.astype(np.float32) for a in (basis.forward, basis.inverse))),
        allocated(widths, gain, basis.weight[None]),
    )
    world = moments(metric[None], cov[None])
    rival = measured(metric, cov, np.zeros(D), basis.forward, code)
    # Noise is taken as the same at all values; it is less near zero, where a coordinate that rules
    # leaves the others to be seen.
    np.testing.assert_allclose(
        predicted_db([Method(key, key)], world), rival, atol=0.2 if power == 1 else 0.5
    )


def test_every_rung_is_above_the_next_and_the_bound_below_all():
    from kvjax.calibrate.names import get_calibrated

    mean = 0.7 * np.random.default_rng(11).normal(size=(2, D))
    world = moments(gram(12), gram(13), mean)
    rungs = (
        [get("turboquant-2", head_dim=D)],
        *(
            get_calibrated(f"{name}-2", world)
            for name in ("centred", "balanced", "klt-lloyd-max", "klt")
        ),
    )
    ladder = np.array([predicted_db(methods, world) for methods in rungs])
    assert (np.diff(ladder, axis=0) < 0).all(), ladder[:, 0]
    assert (bound_db(world, 2) < ladder[-1]).all()
    assert (bound_db(world, 3) < bound_db(world, 2) - 5).all()


def test_reverse_water_filling():
    """All active: `4^-b` times the geometric mean; by hand where some are not; b = 1e-9: all."""
    metric, cov = gram(14), gram(15)
    det = np.linalg.det(metric) * np.linalg.det(cov)
    np.testing.assert_allclose(least_error(metric, cov, 8), D * 4.0**-8 * det ** (1 / D), rtol=1e-6)
    everything = np.einsum("hij,hji->h", metric, cov)
    np.testing.assert_allclose(least_error(metric, cov, 1e-9), everything, rtol=1e-6)
    with pytest.raises(InputError, match="positive rate"):
        least_error(metric, cov, 0)


def test_codecs_without_a_formula_have_no_prediction():
    world = moments(gram(16), gram(17))
    for name in ("bf16", "kivi-2", "eden-search-2", "rabitq-2", "turboquant-prod-2"):
        assert predicted_db([get(name, head_dim=D)], world) is None
    assert predicted_db([Method(Uniform(2), Uniform(2))], world) is None


@pytest.mark.parametrize("name", ["centred-2", "balanced-3"])
def test_rungs_are_methods_that_decode_near_their_prediction(name):
    """On normal keys with the moments, through the real codec; one Hadamard draw, so 1 dB."""
    mean = np.random.default_rng(18).normal(size=(2, D))
    metric, cov = gram(19), gram(20)
    world = moments(metric, cov, mean)
    (method,) = RUNGS[name](world, jax.random.key(3))
    method.check(D)
    rest = np.random.default_rng(21).normal(size=(2, 4096, D))
    x = rest @ np.linalg.cholesky(cov).swapaxes(-1, -2) + mean[:, None]
    pages = x.reshape(1, 2, -1, 64, D).astype(np.float32)
    e = np.asarray(method.key.decode(method.key.encode(pages))).reshape(x.shape) - x
    e = e - e.mean(1, keepdims=True)
    error = np.einsum("hni,hij,hnj->h", e, metric, e, optimize=True) / e.shape[1]
    db = 10 * np.log10(error / np.einsum("hij,hji->h", metric, cov))
    np.testing.assert_allclose(predicted_db([method], world)[0], db, atol=1.0)
