"""Tuned keys on a tiny model: a lower loss at the same format, and files that know their origin."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.calibrate.moments import measure_moments
from kvjax.calibrate.names import check_name, get_calibrated, get_for_model
from kvjax.calibrate.sensitivity import measure_sensitivity
from kvjax.calibrate.tune import Correction, cayley, closed_form, key_loss, tune_keys
from kvjax.calibrate.tune_sample import Sample, collect
from kvjax.calibrate.tuned_file import TunedFrom, load_tuned, moments_hash, save_tuned, with_tuned
from kvjax.core.errors import InputError
from kvjax.core.layout import Layout
from kvjax.models.load import load

TINY = Path(__file__).parents[1] / "models" / "tiny" / "qwen3"
LAYOUT = Layout(sink=4, recent=16, page=16)
MADE = TunedFrom("qwen3", "klt-fisher-2", "some text", "0", 512, 8, "")


@functools.cache
def model():
    return load(TINY, dtype="float32")


@functools.cache
def windows():
    rng = np.random.default_rng(11)
    return list(rng.integers(3, model().config.vocab_size, size=(4, 128)).astype(np.int32))


@functools.cache
def moments():
    params, config = model().params, model().config
    measured = measure_moments(params, config, windows())
    rng = jax.random.key(1)
    return measure_sensitivity(params, config, windows(), measured, rng=rng, layout=LAYOUT)


@functools.cache
def sample() -> Sample:
    rng = jax.random.key(2)
    return collect(model().params, model().config, windows(), moments(), rng=rng, layout=LAYOUT)


@functools.cache
def methods():
    return get_calibrated("klt-fisher-2", moments(), layout=LAYOUT)


@functools.cache
def tuned():
    return tune_keys(methods(), moments(), sample(), steps=8)


def test_the_loss_falls_in_every_layer():
    losses = tuned()[1]
    assert losses.shape == (model().config.layers, 2)
    assert (losses[:, 1] < losses[:, 0]).all()


def test_zeros_are_the_closed_form():
    for method, layer in zip(methods(), closed_form(methods(), moments()), strict=True):
        matrix = method.key.inner.transform.matrix[:, 0]
        np.testing.assert_allclose(layer.mix @ layer.forward, matrix, rtol=1e-4, atol=1e-5)
        one = jnp.eye(layer.mix.shape[-1])
        assert jnp.allclose(layer.mix @ layer.mix.swapaxes(-1, -2), one, atol=1e-4)


def test_few_tokens_leave_the_closed_form():
    """Covariances that `klt` drew towards their diagonals are taken apart as it made them."""
    few = dataclasses.replace(moments(), tokens=2 * model().config.head_dim)
    made = get_calibrated("klt-fisher-2", few, layout=LAYOUT)
    for method, layer in zip(made, closed_form(made, few), strict=True):
        matrix = method.key.inner.transform.matrix[:, 0]
        np.testing.assert_allclose(layer.mix @ layer.forward, matrix, rtol=1e-4, atol=1e-5)


def test_the_same_sample_gives_the_same_bits():
    again, losses = tune_keys(methods(), moments(), sample(), steps=8)
    assert (losses == tuned()[1]).all()
    for field in dataclasses.fields(again):
        assert (getattr(again, field.name) == getattr(tuned()[0], field.name)).all()


def test_format_is_unchanged():
    x = jax.random.normal(jax.random.key(3), (1, model().config.kv_heads, 2, 64, 16))
    better = with_tuned(methods(), tuned()[0])
    for old, new in zip(methods(), better, strict=True):
        assert jax.tree.structure(old) == jax.tree.structure(new)
        shapes = lambda tree: jax.tree.map(lambda a: (a.shape, a.dtype), tree)
        assert shapes(old) == shapes(new)
        codes = [shapes(jax.eval_shape(m.key.encode, x)) for m in (old, new)]
        assert codes[0] == codes[1]
        assert new.value == old.value
        assert not (new.key.inner.transform.matrix == old.key.inner.transform.matrix).all()


@pytest.mark.parametrize("size", [0.0, 0.1, 3.0])
def test_cayley_is_a_rotation(size):
    skew = size * jax.random.normal(jax.random.key(4), (3, 64, 64))
    turned = cayley(skew)
    product = jnp.matmul(turned, turned.swapaxes(-1, -2), precision="highest")
    assert float(abs(product - jnp.eye(64)).max()) < 1e-5
    assert np.linalg.det(np.asarray(turned, np.float64)) == pytest.approx(1, abs=1e-4)


def test_the_loss_is_the_weighted_error_of_the_codec():
    """With Lloyd-Max leaves and no correction: by loops over heads and tokens, from the codec."""
    from kvjax.calibrate.hybrid import klt

    made = klt(2, moments(), rng=jax.random.key(0), leaf="lloyd_max", metric="predictions")
    layer = closed_form(made, moments())[1]
    keys, weights = sample().keys[1], sample().weights[1]  # [n, h, t, d], [n, h, t]
    n, h, t, d = keys.shape
    pages = jnp.asarray(keys).reshape(n, h, t // 64, 64, d)
    positions = jnp.arange(t).reshape(1, 1, -1, 64)
    back = made[1].key.decode(made[1].key.encode(pages, positions)).reshape(keys.shape)
    error = np.asarray(back, np.float64) - keys
    total = 0.0
    for head in range(h):
        for w, e in zip(weights[:, head].ravel(), error[:, head].reshape(-1, d), strict=True):
            total += w * (e @ np.asarray(layer.cost[head]) @ e)
    found = key_loss(layer, Correction.none(h, d), jnp.asarray(keys), jnp.asarray(weights))
    assert float(found) == pytest.approx(total / (n * t), rel=1e-3)


def test_weights_leave_out_what_stays_exact():
    weights = sample().weights
    assert (weights[..., :4] == 0).all()
    assert (weights[..., 4:] > 0).all()


def test_keys_of_another_kind_are_refused():
    with pytest.raises(InputError, match="klt-fisher-2"):
        tune_keys(get_calibrated("oscar", moments()), moments(), sample(), steps=1)
    other = dataclasses.replace(moments(), key_cov_pre=2 * moments().key_cov_pre)
    with pytest.raises(InputError, match="does not whiten"):
        tune_keys(methods(), other, sample(), steps=1)
    plain = dataclasses.replace(moments(), key_fisher=None)
    with pytest.raises(InputError, match="--gradients"):
        tune_keys(methods(), plain, sample(), steps=1)


@pytest.fixture
def saved(tmp_path):
    config = model().config
    made = dataclasses.replace(MADE, model=config.name, moments=moments_hash(moments()))
    return save_tuned(tuned()[0], tmp_path, made), made


def test_a_file_comes_back_and_is_a_method(saved):
    path, made = saved
    config = model().config
    back, about = load_tuned(path.parent, config, moments())
    assert about == made
    assert (back.forward == tuned()[0].forward).all()
    name = f"tuned:{path}"
    check_name(name, calibration="somewhere")
    got = get_for_model(name, config, moments(), layout=LAYOUT)
    want = with_tuned(methods(), tuned()[0])
    assert isinstance(got, tuple)
    assert all(a.key == b.key and a.name == name for a, b in zip(got, want, strict=True))
    with pytest.raises(InputError, match="--calibration"):
        check_name(name, None)
    first = path.read_bytes()
    save_tuned(tuned()[0], path.parent, made)
    assert path.read_bytes() == first


def test_other_origins_and_damaged_files_are_refused(saved, tmp_path):
    path, made = saved
    config = model().config

    def refused(match, file=path, config=config, seen=None):
        with pytest.raises(InputError, match=match) as error:
            load_tuned(file, config, seen or moments())
        assert "\n" not in str(error.value)

    refused("no such file", file=tmp_path / "nothing")
    refused("another-model", config=dataclasses.replace(config, name="another-model"))
    refused("those of --calibration", seen=dataclasses.replace(moments(), tokens=5))
    refused("layers, KV heads", config=dataclasses.replace(config, kv_heads=1))
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    refused("tune again")
    bad = dataclasses.replace(tuned()[0], mean=np.full_like(tuned()[0].mean, np.nan))
    save_tuned(bad, tmp_path, made)
    refused("not finite float32")
