"""Moments against sums in float64 over recorded queries, keys and values; files of them."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.calibrate.artefact import FILE, Provenance, load_moments, save_moments
from kvjax.calibrate.drift import drift_share
from kvjax.calibrate.moments import SKIP, Moments, measure_moments
from kvjax.cli.main import main
from kvjax.core.errors import InputError
from kvjax.models.causal import causal_attend
from kvjax.models.config import layer_runs
from kvjax.models.decoder import decode_layers, rope_frequencies
from kvjax.models.load import Model, load

TINY = Path(__file__).parents[1] / "models" / "tiny"
T = 48


@functools.cache
def model(arch: str) -> Model:
    return load(TINY / arch, dtype="float32")


@functools.cache
def windows(arch: str) -> list[np.ndarray]:
    rng = np.random.default_rng(8000)
    return list(rng.integers(3, model(arch).config.vocab_size, size=(3, T)).astype(np.int32))


@functools.cache
def measured(arch: str) -> Moments:
    return measure_moments(model(arch).params, model(arch).config, windows(arch))


@functools.cache
def recorded(arch: str):
    """q `[n, l, t, h, g, d]`, k, v `[n, l, t, h, d]` and outputs, float64, of every window."""
    params, config = model(arch).params, model(arch).config
    runs = layer_runs(config)
    positions = jnp.arange(T)[None]
    exact = causal_attend(runs, positions)

    @jax.jit
    def one(tokens):
        def attend(run, layer, cache, q, k, v, extra):
            out, _ = exact(run, layer, None, q, k, v, extra)
            new = (q[0], k[0], v[0], out[0])
            return out, jax.tree.map(lambda a, b: a.at[layer].set(b), cache, new)

        h, g, d = config.kv_heads, config.q_per_kv, config.head_dim
        blank = lambda run: (
            jnp.zeros((run.length, T, h, g, d)),
            jnp.zeros((run.length, T, h, d)),
            jnp.zeros((run.length, T, h, d)),
            jnp.zeros((run.length, T, h, g, d)),
        )
        _, caches, _ = decode_layers(
            params, config, tokens[None], positions, attend, [blank(run) for run in runs]
        )
        return jax.tree.map(lambda *a: jnp.concatenate(a), *caches)

    parts = [jax.device_get(one(jnp.asarray(w))) for w in windows(arch)]
    return [np.stack([p[i] for p in parts]).astype(np.float64) for i in range(4)]


def derotated(arch: str, k: np.ndarray) -> np.ndarray:
    """Keys before RoPE: each pair turned back, in complex numbers."""
    config = model(arch).config
    half = config.head_dim // 2
    runs = [run for run in layer_runs(config) for _ in range(run.length)]
    angles = np.stack([np.outer(np.arange(T), rope_frequencies(r, config.head_dim)) for r in runs])
    pairs = (k[..., :half] + 1j * k[..., half:]) * np.exp(-1j * angles)[None, :, :, None]
    return np.concatenate([pairs.real, pairs.imag], -1)


def grouped_derotated(arch: str) -> np.ndarray:
    """Queries before RoPE, `[n, l, t, h, g, d]`."""
    q = recorded(arch)[0]
    flat = q.reshape(*q.shape[:3], -1, q.shape[-1])
    return derotated(arch, flat).reshape(q.shape)


def turned_pairs(x: np.ndarray, turns: np.ndarray):
    """The two halves of x turned by each row of angles."""
    first, second = np.split(x, 2, -1)
    for angles in turns:
        pairs = (first + 1j * second) * np.exp(1j * angles)
        yield pairs.real, pairs.imag


@pytest.mark.parametrize("arch", ["llama", "gemma3"])
def test_moments_are_those_of_the_recorded_tokens(arch):
    q, k, v, out = (a[:, :, SKIP:] for a in recorded(arch))
    pre = derotated(arch, recorded(arch)[1])
    mean_pre = pre[:, :, SKIP:].mean((0, 2))  # [l, h, d]
    rest_pre = (pre - mean_pre[None, :, None])[:, :, SKIP:]
    made = measured(arch)
    n = len(windows(arch)) * (T - SKIP)
    assert made.tokens == n
    close = functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-6)
    close(made.key_mean, k.mean((0, 2)))
    close(made.value_mean, v.mean((0, 2)))
    close(made.key_mean_pre, mean_pre)
    gram = lambda x: np.einsum("nlthd,nlthe->lhde", x, x) / n
    close(made.key_cov, gram(k - made.key_mean[None, :, None]))
    close(made.value_cov, gram(v - made.value_mean[None, :, None]))
    g = q.shape[4]
    close(made.query_gram, np.einsum("nlthgd,nlthge->lhde", q, q) / n / g)
    close(made.output_gram, np.einsum("nlthgd,nlthge->lhde", out, out) / n)
    # Turning keeps lengths: the traces of what the two frames leave are equal.
    trace = np.trace(made.key_cov_pre, axis1=-2, axis2=-1)
    close(trace, (rest_pre**2).sum((0, 2, 4)) / n)
    close(made.key_cov_pre_rope, gram(rest_pre))
    still, count = grouped_derotated(arch)[:, :, SKIP:], n * g
    for layer, run in enumerate(r for r in layer_runs(model(arch).config) for _ in range(r.length)):
        turns = np.outer(np.arange(min(run.window or T, T)), made.frequencies[layer])  # [s, d/2]
        met = [np.concatenate(to, -1) for to in turned_pairs(still[:, layer], turns)]
        oracle = sum(np.einsum("nthgd,nthge->hde", x, x) for x in met) / count / len(met)
        close(made.query_gram_pre_rope[layer], oracle)
    for name in ("key_cov", "key_cov_pre", "value_cov", "query_gram", "out_gram", "value_proxy"):
        a = getattr(made, name)
        close(a, a.swapaxes(-1, -2))
        assert (np.linalg.eigvalsh(a) > -1e-5 * np.abs(a).max()).all()


SIDES = {"key_scales": 1, "value_scales": 2}  # where `recorded` has them


@pytest.mark.parametrize("arch", ["llama", "gemma3"])
def test_scales_are_those_of_the_recorded_tokens(arch):
    for name, side in SIDES.items():
        x = recorded(arch)[side][:, :, SKIP:]  # [n, l, t, h, d]
        norm = np.sqrt((x**2).sum(-1))
        parts = norm, np.log(norm), np.abs(x).max(-1)
        oracle = [[a.mean((0, 2)), a.var((0, 2))] for a in parts]  # [3, 2, l, h]
        found = getattr(measured(arch), name)
        np.testing.assert_allclose(found, np.transpose(oracle, (2, 3, 0, 1)), rtol=2e-4, atol=1e-7)


def by_bucket(k: np.ndarray) -> list[np.ndarray]:
    """`[n, l, t, h, d]` of positions 4 to 47 in eight parts, by hand."""
    starts = [4, 9, 15, 20, 26, 31, 37, 42, 48]
    return [k[:, :, a:b] for a, b in itertools.pairwise(starts)]


@pytest.mark.parametrize("arch", ["llama", "gemma3"])
def test_buckets_are_those_of_the_recorded_keys(arch):
    k, made = recorded(arch)[1], measured(arch)
    parts = by_bucket(k)
    means = np.stack([part.mean((0, 2)) for part in parts], 2)  # [l, h, b, d]
    traces = np.stack([part.var((0, 2)).sum(-1) for part in parts], 2)
    np.testing.assert_array_equal(made.bucket_edges, [4, 9, 15, 20, 26, 31, 37, 42, 48])
    np.testing.assert_allclose(made.key_bucket_mean, means, rtol=2e-4, atol=2e-6)
    np.testing.assert_allclose(made.key_bucket_var, traces, rtol=2e-4)
    # What lies between buckets is what is left of the variance when each has its own mean.
    rest = sum((part.var((0, 2)) * part.shape[2]).sum(-1) for part in parts) / (T - SKIP)
    share = 1 - rest / k[:, :, SKIP:].var((0, 2)).sum(-1)
    np.testing.assert_allclose(drift_share(made), share, atol=1e-4)
    assert share.max() > 0.01
    # And together they make the covariance of all.
    whole = np.trace(made.key_cov, axis1=-2, axis2=-1)
    between = ((means - made.key_mean[:, :, None]) ** 2).sum(-1)
    sizes = np.diff(made.bucket_edges) / (T - SKIP)
    np.testing.assert_allclose((sizes * (traces + between)).sum(-1), whole, rtol=2e-4)


def test_a_dead_head_has_finite_scales():
    """Values of zeros, as pruned heads have: not NaN, and not infinitely many orders below."""
    params, config = model("llama").params, model("llama").config
    runs = [dataclasses.replace(r, wv=jnp.zeros_like(r.wv)) for r in params.runs]
    dead = dataclasses.replace(params, runs=tuple(runs))
    scales = measure_moments(dead, config, windows("llama")).value_scales
    least = -126 * np.log(2)
    np.testing.assert_allclose(scales[..., 0], np.broadcast_to([0, least, 0], scales.shape[:-1]))
    np.testing.assert_allclose(scales[..., 1], 0, atol=1e-9)


def test_the_same_windows_give_the_same_bits(tmp_path):
    again = measure_moments(model("llama").params, model("llama").config, windows("llama"))
    about = Provenance("tiny", "none", "0", again.tokens, T, "0123")
    first = save_moments(measured("llama"), tmp_path / "a", about).read_bytes()
    assert save_moments(again, tmp_path / "b", about).read_bytes() == first


def test_files_come_back_and_refuse_other_models(tmp_path):
    config = model("llama").config
    about = Provenance(config.name, "text", "0", measured("llama").tokens, T, "0123")
    save_moments(measured("llama"), tmp_path, about)
    moments, provenance = load_moments(tmp_path, config)
    assert provenance == about
    for field in dataclasses.fields(Moments):
        mine, back = getattr(measured("llama"), field.name), getattr(moments, field.name)
        if mine is None:  # no sensitivities
            assert back is None
            continue
        np.testing.assert_allclose(back, mine, rtol=1e-6, atol=1e-12)
    with pytest.raises(InputError, match="kvjax calibrate --model"):
        load_moments(tmp_path, model("gemma3").config)
    path = tmp_path / FILE
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match="calibrate again"):
        load_moments(tmp_path, config)
    with pytest.raises(InputError, match="no such file"):
        load_moments(tmp_path / "nowhere")


def test_bad_input_is_named():
    params, config = model("llama").params, model("llama").config
    with pytest.raises(InputError, match="calibration text"):
        measure_moments(params, config, [])
    with pytest.raises(InputError, match="calibration text"):
        measure_moments(params, config, [np.zeros(SKIP, np.int32)])
    broken = dataclasses.replace(
        params,
        runs=tuple(
            dataclasses.replace(r, wv=r.wv.at[1].set(jnp.nan)) if i == 0 else r
            for i, r in enumerate(params.runs)
        ),
    )
    with pytest.raises(InputError, match="layer 1"):
        measure_moments(broken, config, windows("llama"))


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["calibrate", "--model", "nothing-such"], "nothing-such"),
        (["calibrate", "--model", str(TINY / "llama"), "--tokens", "0"], "--tokens"),
        (["calibrate", "--model", str(TINY / "llama"), "--tokens", "100"], "--tokens"),
        (["compare", "--methods", "klt-2"], "kvjax calibrate"),
    ],
)
def test_mistakes_on_the_command_line(words, error, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("A few words. " * 50)
    extra = ["--out", str(tmp_path / "out")]
    extra += ["--text", str(text)] if words[0] == "calibrate" else []
    assert main([*words, *extra]) == 2
    assert error in capsys.readouterr().err
    assert not (tmp_path / "out" / FILE).exists()
