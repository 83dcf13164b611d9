"""Measured logit errors against numpy over recorded tokens, and against predictions."""

from __future__ import annotations

import functools
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.calibrate.moments import SKIP, Moments, measure_moments
from kvjax.calibrate.names import get_calibrated
from kvjax.calibrate.predicted import bound_db, predicted_db
from kvjax.core.errors import InputError
from kvjax.core.layout import Layout
from kvjax.evals import logit_error
from kvjax.evals.logit_error import HeldOut, held_out, logit_error_db
from kvjax.methods import get
from kvjax.models.causal import keys_and_values
from kvjax.models.load import Model, load

TINY = Path(__file__).parents[1] / "models" / "tiny"
T, PAGE = 40, 16
LAYOUT = Layout(sink=4, recent=16, page=PAGE)


@functools.cache
def model(arch: str) -> Model:
    return load(TINY / arch, dtype="float32")


@functools.cache
def windows(arch: str) -> list[np.ndarray]:
    vocabulary = model(arch).config.vocab_size
    rng = np.random.default_rng(8300)
    return [rng.integers(3, vocabulary, size=n).astype(np.int32) for n in (T, T)]


@functools.cache
def held(arch: str) -> HeldOut:
    return held_out(model(arch).params, model(arch).config, windows(arch))


@pytest.mark.parametrize("arch", ["llama", "gemma3"])
def test_moments_of_held_out_tokens_are_those_of_calibration(arch):
    """The same windows through `measure_moments`, which takes two passes in float32."""
    other = measure_moments(model(arch).params, model(arch).config, windows(arch))
    for name in ("query_gram", "key_mean", "key_cov", "key_cov_pre"):
        np.testing.assert_allclose(
            getattr(held(arch), name), getattr(other, name), rtol=2e-4, atol=2e-6
        )


def test_the_error_is_that_of_the_decoded_keys():
    """Two windows, padded pages, a codec that depends on pages, one on positions: by hand."""
    config, params = model("llama").config, model("llama").params
    moments: Moments = measure_moments(params, config, windows("llama"))
    for methods in (
        (get("int4/bf16", config.head_dim, layout=LAYOUT),) * config.layers,
        get_calibrated("centred-2", moments, layout=LAYOUT),
    ):
        want = np.empty((config.layers, config.kv_heads))
        metric, cov = held("llama").query_gram, held("llama").key_cov
        for layer, method in enumerate(methods):
            errors = []
            for tokens in windows("llama"):
                keys = np.asarray(keys_and_values(params, config, jnp.asarray(tokens)[None])[1])
                x = keys[layer, 0, :, SKIP:]
                filled = np.concatenate([x, np.repeat(x[:, -1:], -x.shape[1] % PAGE, 1)], 1)
                for page in range(filled.shape[1] // PAGE):
                    some = filled[:, page * PAGE : (page + 1) * PAGE]
                    positions = SKIP + page * PAGE + jnp.arange(PAGE)
                    code = method.key.encode(some[None, :, None], positions[None, None, None])
                    back = np.asarray(method.key.decode(code))[0, :, 0]
                    errors.append((back - some)[:, : x.shape[1] - page * PAGE])
            e = np.concatenate(errors, 1).astype(np.float64)
            e = e - e.mean(1, keepdims=True)
            error = np.einsum("hti,hij,htj->h", e, metric[layer], e) / e.shape[1]
            want[layer] = error / np.einsum("hij,hji->h", metric[layer], cov[layer])
        np.testing.assert_allclose(
            logit_error_db(methods, held("llama")), 10 * np.log10(want), atol=0.01
        )


def normal_keys(d: int = 32, layers: int = 2, heads: int = 2, t: int = 4096) -> HeldOut:
    """Keys that are normal with 1 / i spectra, and moments of them."""
    rng = np.random.default_rng(8301)
    bases = np.linalg.qr(rng.normal(size=(2, layers, heads, d, d)))[0]
    metric, cov = (bases / np.arange(1, d + 1)) @ bases.swapaxes(-1, -2)
    rest = rng.normal(size=(layers, heads, t, d)) @ np.linalg.cholesky(cov).swapaxes(-1, -2)
    mean = rng.normal(size=(layers, heads, d))
    keys = (rest + mean[:, :, None]).astype(np.float32)
    return HeldOut((keys,), metric, mean, cov, cov)


@pytest.mark.parametrize("rung", ["turboquant", "centred", "balanced", "klt-lloyd-max"])
def test_measured_is_predicted_on_normal_keys(rung):
    """The real codecs, calibrated on the true moments; one draw of each rotation, so 1 dB."""
    world = normal_keys()
    layers, heads, d = world.key_mean.shape
    rest = {"key_mean_pre": world.key_mean, "frequencies": np.zeros((layers, d // 2)), "tokens": 1}
    some = ("query_gram", "key_mean", "key_cov", "key_cov_pre")
    rest |= {name: getattr(world, name) for name in some}
    eye = np.tile(np.eye(d), (layers, heads, 1, 1))
    names = [name for name, f in Moments.__dataclass_fields__.items() if f.default is not None]
    moments = Moments(**{name: rest.get(name, eye) for name in names})
    if rung == "turboquant":
        methods = (get("turboquant-2", head_dim=d),) * layers
    else:
        methods = get_calibrated(f"{rung}-2", moments)
    predicted = predicted_db(methods, world)
    measured = logit_error_db(methods, world)
    np.testing.assert_allclose(measured, predicted, atol=1.0)
    assert abs(measured - predicted).mean() < 0.5
    assert (measured > bound_db(world, 2)).all()


def test_layers_of_one_structure_compile_once():
    world = normal_keys(t=128)
    method = get("turboquant-2", head_dim=32)
    logit_error._error_sums._clear_cache()
    logit_error_db(method, world)
    logit_error_db((method, method), world)
    assert logit_error._error_sums._cache_size() == 1


def test_bad_input_is_named():
    params, config = model("llama").params, model("llama").config
    with pytest.raises(InputError, match="at least one of more than"):
        held_out(params, config, [])
    with pytest.raises(InputError, match="at least one of more than"):
        held_out(params, config, [np.zeros(SKIP, np.int32)])
    with pytest.raises(InputError, match="one for each of the 2 layers"):
        logit_error_db((get("int4", head_dim=32),) * 3, normal_keys(t=64))
    runs = (params.runs[0].replace(wk=params.runs[0].wk.at[1].set(jnp.nan)), *params.runs[1:])
    with pytest.raises(InputError, match="layer 1: got NaN"):
        held_out(params.replace(runs=runs), config, windows("llama"))
