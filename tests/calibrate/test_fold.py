"""Transforms of values in the weights: the same model, and the same methods over it."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax.calibrate.fold import fold_values, unrotated_values
from kvjax.codecs import Hadamard, Linear, Matrix, Orthogonal, TokenScale, Transform, Uniform
from kvjax.core.errors import InputError
from kvjax.core.method import Method
from kvjax.core.pytree import same
from kvjax.generate.plan import forward_block, init_caches, make_plan
from kvjax.models.causal import keys_and_values
from kvjax.models.config import layer_runs
from kvjax.models.decoder import Params, logits, regroup
from kvjax.models.load import Model, load

TINY = Path(__file__).parents[1] / "models" / "tiny"
ARCHS = ("llama", "qwen2", "qwen3", "gemma3")
T = 40


@functools.cache
def model(arch: str) -> Model:
    """With biases that are not zero, where there are any."""
    made = load(TINY / arch, dtype="float32")
    if not made.config.qkv_bias:
        return made
    rng = np.random.default_rng(9100)
    bias = lambda r: dataclasses.replace(r, bv=jnp.asarray(rng.normal(size=r.bv.shape), "float32"))
    params = dataclasses.replace(made.params, runs=tuple(bias(r) for r in made.params.runs))
    return dataclasses.replace(made, params=params)


def tokens(arch: str) -> jax.Array:
    rng = np.random.default_rng(9000)
    return jnp.asarray(rng.integers(3, model(arch).config.vocab_size, size=(1, T)), jnp.int32)


def transforms(arch: str, kind: str) -> list[Transform]:
    """One per layer, all different."""
    config, rng = model(arch).config, np.random.default_rng(9200)
    h, d = config.kv_heads, config.head_dim

    def one() -> Transform:
        noise = rng.normal(size=(h, 1, d, d))
        if kind == "orthogonal":
            return Orthogonal(jnp.asarray(np.linalg.qr(noise)[0], jnp.float32))
        if kind == "matrix":
            return Matrix.of(np.diag(np.linspace(0.5, 2, d)) + 0.1 / np.sqrt(d) * noise[0, 0])
        return Hadamard(jnp.asarray(np.sign(noise[0, 0, 0]), jnp.float32))

    return [one() for _ in range(config.layers)]


def jit(function):
    """Compiling is what these tests take time for."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


@functools.cache
def passes(config):
    """Logits, keys and values `[l, b, h, t, d]` of a prompt."""

    def one(params, ids):
        hidden, k, v = keys_and_values(params, config, ids)
        return logits(params, config, hidden), k, v

    return jit(one)


def relative(a, b) -> float:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.abs(a - b).max() / np.abs(b).max())


@pytest.mark.parametrize(
    ("arch", "kind"),
    [*((arch, "orthogonal") for arch in ARCHS), ("llama", "matrix"), ("llama", "hadamard")],
)
def test_the_model_stays_the_same(arch, kind):
    """Grouped queries, biases, and Gemma's runs of layers; values are turned, all of them."""
    params, config = model(arch).params, model(arch).config
    chosen = transforms(arch, kind)
    folded = fold_values(params, config, chosen)
    out, k, v = passes(config)(params, tokens(arch))
    out_folded, k_folded, v_folded = passes(config)(folded, tokens(arch))
    assert relative(out_folded, out) <= 1e-5
    assert relative(k_folded, k) <= 1e-5
    turned = [t.forward(v[i, :, :, None])[:, :, 0] for i, t in enumerate(chosen)]
    assert relative(v_folded, np.stack(turned)) <= 1e-5
    assert relative(v_folded, v) > 0.1


def test_weights_against_numpy():
    """Each block of each head, written out, in float64."""
    params, config = model("qwen2").params, model("qwen2").config
    h, g, d = config.kv_heads, config.q_per_kv, config.head_dim
    assert h > 1
    assert g > 1
    chosen = transforms("qwen2", "orthogonal")
    folded = fold_values(params, config, chosen)
    before, after = params.runs[0], folded.runs[0]
    for layer in range(before.wv.shape[0]):
        for i in range(h):
            a = np.asarray(chosen[layer].matrix[i, 0], np.float64)
            head = slice(i * d, (i + 1) * d)
            close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7)
            close(after.wv[layer][:, head], np.asarray(before.wv[layer])[:, head] @ a.T)
            close(after.bv[layer][head], a @ np.asarray(before.bv[layer])[head])
            for j in range(g):
                rows = slice((i * g + j) * d, (i * g + j + 1) * d)
                expected = np.linalg.inv(a).T @ np.asarray(before.wo[layer])[rows]
                close(after.wo[layer][rows], expected)
    assert folded.embed is params.embed
    assert after.wq is before.wq
    assert after.w_down is before.w_down


def outputs(config, method, params: Params, ids: jax.Array) -> np.ndarray:
    """Hidden states `[t, D]` of a block read through compressed caches with float32 windows."""
    plan = make_plan(config, method)
    caches = init_caches(plan, batch=1, capacity=64, dtype=jnp.float32)
    run = jit(lambda plan, params, caches, ids: forward_block(plan, params, caches, ids)[:2])
    parts = []
    for block in jnp.split(ids[:, :32], 2, axis=1):
        hidden, caches = run(plan, params, caches, block)
        parts.append(hidden[0])
    assert all(int(cache.packed.max()) > 0 for cache in caches)
    return np.concatenate(parts)


def test_a_method_is_itself_over_folded_weights():
    """Codes of `A v` in both; 8 bits, so that a code that rounding flips moves little."""
    params, config = model("llama").params, model("llama").config
    layout = kvjax.Layout(sink=0, recent=16, page=16)
    chosen = transforms("llama", "matrix")
    methods = [Method(Uniform(8), Linear(t, Uniform(8)), layout, "m") for t in chosen]
    stripped = unrotated_values(methods)
    assert all(same(a.key, b.key) for a, b in zip(methods, stripped, strict=True))
    assert all(type(m.value) is Uniform and m.layout == layout for m in stripped)
    expected = outputs(config, methods, params, tokens("llama"))
    folded = fold_values(params, config, chosen)
    same_codes = outputs(config, stripped, folded, tokens("llama"))
    other_codes = outputs(config, stripped, params, tokens("llama"))
    assert relative(same_codes, expected) < relative(other_codes, expected) / 10


def test_any_runs_of_layers_will_do():
    """Weights stacked one layer at a time, as plans with a method per layer may have them."""
    params, config = model("llama").params, model("llama").config
    single = regroup(params, layer_runs(config, range(config.layers)))
    chosen = transforms("llama", "orthogonal")
    whole, apart = fold_values(params, config, chosen), fold_values(single, config, chosen)
    assert same(regroup(apart, layer_runs(config)).runs, whole.runs)


def test_bf16_weights_are_rounded_once():
    params, config = model("llama").params, model("llama").config
    narrow = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
    chosen = transforms("llama", "orthogonal")
    folded = fold_values(narrow, config, chosen)
    wide = fold_values(jax.tree.map(lambda a: a.astype(jnp.float32), narrow), config, chosen)
    for a, b in zip(folded.runs, wide.runs, strict=True):
        assert a.wv.dtype == a.wo.dtype == jnp.bfloat16
        np.testing.assert_array_equal(a.wv, b.wv.astype(jnp.bfloat16))
        np.testing.assert_array_equal(a.wo, b.wo.astype(jnp.bfloat16))


def test_mistakes_are_told():
    params, config = model("llama").params, model("llama").config
    d, h = config.head_dim, config.kv_heads
    good = transforms("llama", "orthogonal")
    with pytest.raises(InputError, match="one for each of the"):
        fold_values(params, config, good[:-1])
    other = jnp.broadcast_to(jnp.eye(d), (h + 1, 1, d, d))
    with pytest.raises(InputError, match="transform of layer 1"):
        fold_values(params, config, [good[0], Orthogonal(other), *good[2:]])
    with pytest.raises(InputError, match="vectors of"):
        fold_values(params, config, [Orthogonal(jnp.eye(d // 2)), *good[1:]])
    flat = jnp.eye(d).at[0].set(0)
    with pytest.raises(InputError, match="an invertible one"):
        fold_values(params, config, [Matrix(flat, flat), *good[1:]])
    rotated = Linear(good[0], Uniform(2))
    fine = Method(Uniform(2), rotated)
    for value in (Uniform(2), TokenScale(rotated)):
        with pytest.raises(InputError, match="value codec of layer 1"):
            unrotated_values([fine, dataclasses.replace(fine, value=value)])
