"""Fisher information of keys and values against the KL that noise in them really makes."""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.calibrate.hybrid import klt
from kvjax.calibrate.moments import Moments, measure_moments
from kvjax.calibrate.sensitivity import measure_sensitivity
from kvjax.core.errors import InputError
from kvjax.core.layout import Layout
from kvjax.models.config import layer_runs
from kvjax.models.decoder import decode_layers, logits, rope_frequencies
from kvjax.models.load import Model, load

TINY = Path(__file__).parents[1] / "models" / "tiny"
T = 128
LAYOUT = Layout(sink=4, recent=16, page=16)


@functools.cache
def model(arch: str) -> Model:
    return load(TINY / arch, dtype="float32")


@functools.cache
def windows(arch: str) -> list[np.ndarray]:
    rng = np.random.default_rng(8001)
    return list(rng.integers(3, model(arch).config.vocab_size, size=(24, T)).astype(np.int32))


@functools.cache
def measured(arch: str) -> Moments:
    params, config = model(arch).params, model(arch).config
    moments = measure_moments(params, config, windows(arch))
    rng = jax.random.key(3)
    return measure_sensitivity(params, config, windows(arch), moments, rng=rng, layout=LAYOUT)


def lengths(config, moments: Moments, layer, k, v):
    """Squared lengths over the mean ones, `[t, h]` each, by loops over heads."""
    half = config.head_dim // 2
    run = [r for r in layer_runs(config) for _ in range(r.length)][layer]
    angles = np.outer(np.arange(T), rope_frequencies(run, config.head_dim))
    out = np.zeros((2, T, config.kv_heads))
    for h in range(config.kv_heads):
        mean = moments.key_mean_pre[layer, h]
        turned = (mean[:half] + 1j * mean[half:]) * np.exp(1j * angles)
        rest = k[:, h] - np.concatenate([turned.real, turned.imag], -1)
        cov = moments.key_cov_pre[layer, h]
        cov = cov + 1e-4 * np.trace(cov) / config.head_dim * np.eye(config.head_dim)
        out[0, :, h] = (rest @ np.linalg.inv(cov) * rest).sum(-1) / config.head_dim
        size = np.trace(moments.value_cov[layer, h]) + (moments.value_mean[layer, h] ** 2).sum()
        out[1, :, h] = (v[:, h] ** 2).sum(-1) / size
    return out


def turned(config, x):
    """RoPE on `[l, t, h, d]`, in complex numbers."""
    runs = [r for r in layer_runs(config) for _ in range(r.length)]
    angles = np.stack([np.outer(np.arange(T), rope_frequencies(r, config.head_dim)) for r in runs])
    first, second = np.split(x, 2, -1)
    pairs = (first + 1j * second) * np.exp(1j * angles)[:, :, None]
    return np.concatenate([pairs.real, pairs.imag], -1)


def predictions(arch: str, tokens, noise):
    """Log-probabilities where queries see packed tokens with `noise: [2, l, t, h, d]` added."""
    params, config = model(arch).params, model(arch).config
    runs = layer_runs(config)
    at = np.arange(T)
    seen, packed = at[:, None] >= at, (at[:, None] - at >= LAYOUT.recent) & (at >= LAYOUT.sink)

    def attend(run, layer, cache, q, k, v, extra):
        window = runs[run].window
        sees = seen & (at[:, None] - at < window) if window else seen
        s = jnp.einsum("shgd,thd->hgst", q[0], k[0])
        s = s + packed * jnp.einsum("shgd,thd->hgst", q[0], extra[0])
        p = jax.nn.softmax(jnp.where(sees, s, -jnp.inf), -1)
        out = jnp.einsum("hgst,thd->shgd", p, v[0])
        out = out + jnp.einsum("hgst,thd->shgd", p * packed, extra[1])
        return out[None], cache.at[layer].set(jnp.stack([k[0], v[0]]))

    h, d = config.kv_heads, config.head_dim
    xs = [(noise[0, r.start : r.stop], noise[1, r.start : r.stop]) for r in runs]
    blank = [jnp.zeros((r.length, 2, T, h, d)) for r in runs]
    hidden, kept, _ = decode_layers(
        params, config, tokens[None], jnp.arange(T)[None], attend, blank, xs=xs
    )
    return jax.nn.log_softmax(logits(params, config, hidden[0])), jnp.concatenate(kept)


@pytest.mark.parametrize("arch", ["llama", "gemma3"])
@pytest.mark.parametrize("noisy", ["key", "value", "key before RoPE"])
def test_it_predicts_the_kl_of_small_noise(arch, noisy):
    config, moments = model(arch).config, measured(arch)
    run = jax.jit(functools.partial(predictions, arch))
    side = int(noisy == "value")
    fisher = {
        "key": moments.key_fisher,
        "value": moments.value_fisher,
        "key before RoPE": moments.key_fisher_pre_rope,
    }[noisy]
    rng = np.random.default_rng(5)
    d = config.head_dim
    # Uneven noise, so that a transposed or averaged matrix would show.
    root = rng.normal(size=(config.layers, config.kv_heads, d, d)) / d**0.5
    root *= np.logspace(0, -1, d)
    cov = root @ root.swapaxes(-1, -2)
    expected = 0.5 * np.einsum("lhde,lhed->", fisher, cov)
    size = np.sqrt(1e-4 / expected)
    found = []
    for tokens in windows(arch):
        shape = (config.layers, T, config.kv_heads, d)
        clean, kept = run(tokens, jnp.zeros((2, *shape)))
        kept = np.asarray(kept, np.float64)
        scale = [lengths(config, moments, n, *kept[n])[side] for n in range(config.layers)]
        for _ in range(3):
            noise = np.einsum("lthe,lhde->lthd", rng.normal(size=shape), root)
            noise *= size * np.sqrt(np.stack(scale))[..., None]
            if noisy == "key before RoPE":
                noise = turned(config, noise)
            both = np.zeros((2, *shape))
            both[side] = noise
            changed, _ = run(tokens, jnp.asarray(both, jnp.float32))
            found.append(float((jnp.exp(clean) * (clean - changed)).sum(-1).mean()))
    # Labels are drawn, so the information itself is known to some 10 % only.
    assert np.mean(found) == pytest.approx(1e-4, rel=0.25)


def test_it_is_a_metric_for_codes():
    moments = measured("llama")
    for fisher in (moments.key_fisher, moments.value_fisher):
        np.testing.assert_allclose(fisher, fisher.swapaxes(-1, -2), atol=1e-6 * fisher.max())
        assert np.linalg.eigvalsh(fisher).min() > -1e-6 * fisher.max()
    methods = klt(2, moments, rng=jax.random.key(0), metric="predictions")
    assert len(methods) == model("llama").config.layers
    again = measure_sensitivity(
        model("llama").params,
        model("llama").config,
        windows("llama"),
        moments,
        rng=jax.random.key(3),
        layout=LAYOUT,
    )
    np.testing.assert_array_equal(again.key_fisher, moments.key_fisher)


def test_without_it_there_is_no_metric_of_predictions():
    params, config = model("llama").params, model("llama").config
    plain = measure_moments(params, config, windows("llama")[:2])
    with pytest.raises(InputError, match="--gradients"):
        klt(2, plain, rng=jax.random.key(0), metric="predictions")
    with pytest.raises(InputError, match="a multiple of 128"):
        measure_sensitivity(params, config, [np.zeros(130)], plain, rng=jax.random.key(0))
