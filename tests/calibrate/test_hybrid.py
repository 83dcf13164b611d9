"""The calibrated recipe: what each choice makes of the same moments, end to end on tiny models."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax.calibrate.hybrid import klt
from kvjax.calibrate.moments import Moments, measure_moments
from kvjax.calibrate.names import get_calibrated
from kvjax.calibrate.sensitivity import measure_sensitivity
from kvjax.codecs import Centered, Dropped, Rotary, RotaryMean
from kvjax.codecs.rotary_mean import turn
from kvjax.core.errors import InputError
from kvjax.generate import generate, make_plan
from kvjax.methods.describe import code_bits
from kvjax.models.load import Model, load

TINY = Path(__file__).parents[1] / "models" / "tiny" / "llama"
LAYOUT = kvjax.Layout(sink=4, recent=16, page=16)


@functools.cache
def model() -> Model:
    return load(TINY, dtype="float32")


@functools.cache
def moments() -> Moments:
    """With one layer made a thousand times more important than the others."""
    params, config = model().params, model().config
    rng = np.random.default_rng(8100)
    windows = list(rng.integers(3, config.vocab_size, size=(4, 128)).astype(np.int32))
    plain = measure_moments(params, config, windows)
    made = measure_sensitivity(params, config, windows, plain, rng=jax.random.key(1), layout=LAYOUT)
    matters = np.ones(config.layers)
    matters[1] = 1000
    return dataclasses.replace(made, key_fisher=made.key_fisher * matters[:, None, None, None])


def key_bits(methods) -> list[float]:
    return [code_bits(m.key, model().config.head_dim, LAYOUT.page) for m in methods]


def test_layers_that_matter_get_more_bits_of_the_same_sum():
    made = functools.partial(klt, 2, moments(), rng=jax.random.key(0), leaf="lloyd_max")
    even = key_bits(made(metric="predictions"))
    uneven = key_bits(made(metric="predictions", by_layer=True))
    assert len(set(even)) == 1
    assert uneven[1] > even[1] + 1
    assert max(uneven[0], uneven[2]) < even[0]
    # Lengths, positions and page overhead are the same; a layer of all zeros has no lengths.
    assert np.mean(even) - 0.5 < np.mean(uneven) <= np.mean(even) + 0.1
    with pytest.raises(InputError, match="use metric='predictions'"):
        made(by_layer=True)


def test_layers_of_uneven_bits_generate():
    methods = get_calibrated("klt-layers-tiers-2", moments(), layout=LAYOUT)
    plan = make_plan(dataclasses.replace(model().config, max_positions=256), methods)
    assert 1 < len(plan.groups) <= 4
    prompt = [np.arange(3, 60).tolist()]
    tokens, state = generate(plan, model().params, prompt, max_new=8)
    assert tokens.shape == (1, 8)
    assert bool(state.finite.all())


def test_a_layer_without_bits_keeps_its_mean():
    """All the rest is dropped; what is left is the mean, turned with the position."""
    starved = dataclasses.replace(
        moments(), key_fisher=moments().key_fisher * np.array([1e-9, 1, 1])[:, None, None, None]
    )
    methods = klt(1, starved, rng=jax.random.key(0), metric="predictions", by_layer=True)
    assert isinstance(methods[0].key, RotaryMean)
    assert isinstance(methods[0].key.inner.inner, Dropped)
    x = jax.random.normal(jax.random.key(2), (1, 2, 1, 16, model().config.head_dim))
    code = methods[0].key.encode(x, jnp.arange(32, 48).reshape(1, 1, 1, 16))
    means = methods[0].key._means(jnp.full((1, 2, 1), 32), 16)
    np.testing.assert_allclose(methods[0].key.decode(code), means, atol=1e-6)


def test_tiers_have_the_loop_of_plain_codes():
    for name in ("klt-tiers-2", "klt-layers-tiers-2"):
        for method in get_calibrated(name, moments(), layout=LAYOUT):
            assert isinstance(method.key, Centered)
            widths = set()
            for codec in jax.tree.leaves(
                method.key, is_leaf=lambda c: type(c).__name__ in ("Codebook", "Dropped")
            ):
                widths.add(getattr(codec, "bits", 0) if type(codec).__name__ == "Codebook" else 0)
            assert widths <= {0, 2, 4}


PRE_ROPE = ("klt-pre-rope-3", "klt-fisher-pre-rope-3", "klt-lloyd-max-pre-rope-3")


@pytest.mark.parametrize("name", PRE_ROPE)
def test_keys_before_rope_are_coded_alike_at_any_position(name):
    key = get_calibrated(name, moments(), layout=LAYOUT)[0].key
    assert isinstance(key, Rotary)
    d = model().config.head_dim
    still = jax.random.normal(jax.random.key(3), (2, 16, d)) + key.inner.mean[:, 0]

    def error(start):
        positions = start + jnp.arange(16)
        x = turn(still, positions[:, None] * key.frequencies)
        back = key.decode(key.encode(x, jnp.broadcast_to(positions, (2, 16))))
        return turn(back, -positions[:, None] * key.frequencies) - still

    near, far = error(0), error(3000)
    assert 0.05 < float((near**2).mean()) < 2
    # Codes are the same but for keys at the border between two.
    assert float(jnp.median(abs(near - far))) < 1e-3


def test_older_calibrations_have_nothing_before_rope():
    for name in ("key_cov_pre_rope", "query_gram_pre_rope", "key_fisher_pre_rope"):
        old = dataclasses.replace(moments(), **{name: None})
        with pytest.raises(InputError, match="before RoPE, as older ones"):
            get_calibrated("klt-layers-pre-rope-2", old)
        get_calibrated("klt-layers-tiers-2", old)


def test_value_bits_may_be_broken():
    methods = klt(2, moments(), rng=jax.random.key(0), leaf="lloyd_max", value_bits=2.5)
    d = model().config.head_dim
    plain = klt(2, moments(), rng=jax.random.key(0), leaf="lloyd_max")
    more = code_bits(methods[0].value, d, 16) - code_bits(plain[0].value, d, 16)
    assert more == pytest.approx(0.5)
    with pytest.raises(InputError, match="1 to 5, a whole number"):
        klt(2, moments(), rng=jax.random.key(0), value_bits=0.5)
