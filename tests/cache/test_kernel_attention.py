"""Decode steps through `packed_decode` in interpret mode against the page scan, on whole caches."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax.attention.packed_kernel import backend, why_not
from kvjax.codecs import (
    Centered,
    Codebook,
    Dense,
    Dropped,
    Linear,
    Matrix,
    Normalized,
    Residual,
    Split,
    Tiers,
    Uniform,
)
from kvjax.core.errors import InputError
from kvjax.generate import generate, make_plan
from kvjax.models.load import load

B, H, G, D, T = 2, 2, 3, 32, 150
TINY = Path(__file__).parents[1] / "models" / "tiny"


def matrix(seed):
    a = np.random.default_rng(seed).normal(size=(H, 1, D, D)) / D**0.5 + 2 * np.eye(D)
    return Matrix(jnp.asarray(a, jnp.float32), jnp.asarray(np.linalg.inv(a), jnp.float32))


def hybrid():
    """What calibrated keys are made of: a mean and a transform per head, tiers, some dropped."""
    book = lambda bits: Codebook.lloyd_max(24, bits)
    coded = Normalized(Tiers((book(3), book(2)), (8, 16)))
    mean = jnp.asarray(np.random.default_rng(3).normal(size=(H, 1, 1, D)), jnp.float32)
    key = Centered(mean, Linear(matrix(1), Tiers((coded, Dropped()), (24, 8))))
    order = jnp.asarray(np.random.default_rng(4).permutation(D - 1), jnp.int32)
    value = Split(order, Residual(Uniform(2), Uniform(2)), Dense(), 16)
    return kvjax.Method(key, Linear(matrix(2), Tiers((value, Dropped()), (31, 1))))


METHODS = {
    "turboquant-2": {"window": 70},
    "turboquant-prod-3": {},
    "kivi-2": {"pool": 9},
    "int4/bf16": {},
}


def method_of(name, pool=None):
    layout = kvjax.Layout(sink=2, recent=32, page=32, pool=pool)
    return kvjax.methods.get(name, head_dim=D).with_layout(layout)


def filled(method, window=None):
    cache = kvjax.init(method, capacity=T, kv_heads=H, head_dim=D, batch=B, window=window)
    rng = np.random.default_rng(0)
    k, v = (jnp.asarray(rng.normal(size=(T - 4, B, H, D)), jnp.float32) for _ in range(2))
    fill = lambda c, kv: (kvjax.append(method, c, *kv), None)
    return jax.jit(lambda c: jax.lax.scan(fill, c, (k, v))[0])(cache)


def attend_both(method, cache):
    q = jnp.asarray(np.random.default_rng(1).normal(size=(B, H, G, D)), jnp.float32)
    run = jax.jit(lambda method, cache: kvjax.attend(method, cache, q))
    return [run(method.with_attention(how), cache) for how in ("page_scan", "interpret")]


@pytest.mark.parametrize("name", METHODS)
def test_kernel_and_page_scan_agree(name):
    options = METHODS[name]
    method = method_of(name, options.get("pool"))
    scan, kernel = attend_both(method, filled(method, options.get("window")))
    # Operands are fp16 (bf16 where values are): 2e-4 of the output's size (3e-3).
    np.testing.assert_allclose(kernel, scan, atol=1e-2 if "bf16" in name else 1e-3)
    assert float(jnp.abs(kernel - scan).max()) > 0  # it is another program


def test_calibrated_codecs_agree():
    layout = kvjax.Layout(sink=2, recent=32, page=32)
    method = dataclasses.replace(hybrid(), layout=layout)
    assert why_not(method, group=G) is None
    scan, kernel = attend_both(method, filled(method))
    np.testing.assert_allclose(kernel, scan, atol=1e-2)


def test_nothing_packed_yet():
    method = method_of("turboquant-2")
    cache = kvjax.init(method, capacity=T, kv_heads=H, head_dim=D, batch=B)
    k = jnp.ones((B, H, D))
    scan, kernel = attend_both(method, kvjax.append(method, cache, k, 2 * k))
    np.testing.assert_allclose(kernel, 2.0, rtol=1e-6)
    np.testing.assert_array_equal(kernel, scan)


def test_the_same_tokens_are_generated():
    """Through the model: prefill, layers in a scan, decode steps in one program."""
    model = load(TINY / "llama")
    prompts = [list(range(3, 58)), list(range(5, 45))]
    layout = kvjax.Layout(sink=2, recent=16, page=16)
    method = kvjax.methods.get("int4", head_dim=model.config.head_dim).with_layout(layout)

    def run(how):
        plan = make_plan(model.config, method.with_attention(how))
        return generate(plan, model.params, prompts, max_new=6)[0]

    np.testing.assert_array_equal(run("page_scan"), run("interpret"))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("turboquant-2.5", "keys: Outliers codes"),
        ("fp8", "keys: Float8 codes"),
        ("e8-2", "two scales per token"),
        ("turboquant-4", "8 products per value"),
        ("int8/kivi-2", None),
    ],
)
def test_reasons(name, says):
    method = kvjax.methods.get(name, head_dim=64)
    reason = why_not(method)
    assert reason is None if says is None else says in reason
    assert backend(method) is None  # on a CPU nothing is chosen by itself
    if says is None:
        assert backend(method.with_attention("triton")) == "triton"
    else:
        with pytest.raises(InputError, match="attention: got 'triton'"):
            backend(method.with_attention("triton"))


def test_mistakes():
    method = kvjax.methods.get("int4", head_dim=64)
    with pytest.raises(InputError, match="attention: got 'cuda'; expected one of auto"):
        method.with_attention("cuda")
    with pytest.raises(InputError, match="17 query heads"):
        backend(method.with_attention("triton"), group=17)
    odd = method.with_layout(kvjax.Layout(page=40, recent=40))
    assert "pages of 40" in why_not(odd)
