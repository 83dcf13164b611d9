"""Pages encoded by the fused kernel in interpret mode against those of the codec, on whole caches."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax.attention import encode_kernel
from kvjax.attention.encode_kernel import backend, encode_page, why_not, why_not_encode
from kvjax.codecs import (
    Centered,
    Codebook,
    Dense,
    Hadamard,
    Linear,
    Matrix,
    Normalized,
    Orthogonal,
    Tiers,
    TokenScale,
    Uniform,
)
from kvjax.core.storage import narrow, widen
from pallas_kernels import planes
from pallas_kernels.ahead.lowering import kernels, lower

B, H, G, D, T = 2, 2, 2, 32, 90
PAGE = 16
LAYOUT = kvjax.Layout(sink=2, recent=16, page=PAGE, encode_batch=2)


def method_of(name, attention):
    return kvjax.methods.get(name, head_dim=D, layout=LAYOUT).with_attention(attention)


def tokens(seed=0, t=T):
    """k and v `[b, t, h, d]`, with lengths over two orders of magnitude."""
    rng = np.random.default_rng(seed)
    lengths = np.exp(rng.normal(size=(2, B, t, H, 1)))
    return tuple(jnp.asarray(lengths * rng.normal(size=(2, B, t, H, D)), jnp.float32))


def empty(method):
    return kvjax.init(method, capacity=T, kv_heads=H, head_dim=D, batch=B)


@jax.jit
def stepwise(method, cache, k, v):
    fill = lambda c, kv: (kvjax.append(method, c, *kv), None)
    return jax.lax.scan(fill, cache, tuple(a.swapaxes(0, 1) for a in (k, v)))[0]


@jax.jit
def in_blocks(method, cache, k, v):
    return kvjax.prefill(method, cache, k, v, block=2 * PAGE + 3)[1]


def unpacked(code, bits):
    words = code.code if hasattr(code, "code") else code.words
    return np.asarray(planes.unpack(words, bits)).astype(int)


def packed_pages(cache, bits):
    """Codes and scales of keys and of values, in the pages that are packed."""
    n = int(cache.packed[0, 0])
    assert n == LAYOUT.packed_pages(T)
    sides = (cache.key_pages, cache.value_pages)
    return [
        (unpacked(side, bits)[:, :, :, :n], np.asarray(widen(side.scale))[:, :, :, :n])
        for side in sides
    ]


@pytest.fixture(scope="module", params=["turboquant-3", "int4"])
def filled(request):
    """By both, one token after the other and in blocks: of a rotated codebook, of a bare grid."""
    k, v = tokens()
    caches = {}
    for how in ("page_scan", "interpret"):
        method = method_of(request.param, how)
        caches[how] = {
            "append": stepwise(method, empty(method), k, v),
            "blocks": in_blocks(method, empty(method), k, v),
        }
    return request.param, caches


def test_append_and_blocks_make_the_same_cache(filled):
    """A page's codes do not depend on what was encoded beside it."""
    _, caches = filled
    one, other = caches["interpret"]["append"], caches["interpret"]["blocks"]
    pairs = zip(jax.tree.leaves_with_path(one), jax.tree.leaves(other), strict=True)
    for (path, a), b in pairs:
        if "window" not in jax.tree_util.keystr(path):  # slots of no token differ
            np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))


def test_codes_are_those_of_the_codec(filled):
    """Of 8,192 values a side (4 pages of 2 sequences and 2 heads) a few. See `encode_page`."""
    name, caches = filled
    bits = int(name[-1])
    got = packed_pages(caches["interpret"]["append"], bits)
    want = packed_pages(caches["page_scan"]["append"], bits)
    for (codes, scale), (true_codes, true_scale) in zip(got, want, strict=True):
        assert np.abs(codes - true_codes).max() <= 1
        assert (codes != true_codes).mean() < 5e-4
        # Scales in 8 bits of bf16 or 11 of fp16: at most the last bit differs.
        np.testing.assert_allclose(scale, true_scale, rtol=2.0**-7)
        assert (scale != true_scale).mean() < 0.02


def test_attention_over_both_agrees(filled):
    """Read by the same page scan: what is left is the difference of the codes."""
    name, caches = filled
    q = jnp.asarray(np.random.default_rng(3).normal(size=(B, H, G, D)), jnp.float32)
    method = method_of(name, "page_scan")
    read = jax.jit(lambda cache: kvjax.attend(method, cache, q))
    kernel, codec = (read(caches[how]["append"]) for how in ("interpret", "page_scan"))
    np.testing.assert_allclose(kernel, codec, atol=2e-3)


def test_it_is_the_kernel_that_runs(monkeypatch):
    """In the program that `append` makes, on both sides or on the one that it takes."""
    calls = []
    real = encode_kernel.kernel.encode
    seen = lambda x, *a, **kw: calls.append(x.dtype) or real(x, *a, **kw)
    monkeypatch.setattr(encode_kernel.kernel, "encode", seen)
    k = jnp.zeros((B, H, D))
    for name, count in (("turboquant-2", 2), ("fp8/int4", 1), ("fp8", 0)):
        for how, of in (("interpret", count), ("page_scan", 0), ("auto", 0)):
            method = method_of(name, how)
            calls.clear()
            jax.eval_shape(lambda m, c: kvjax.append(m, c, k, k), method, empty(method))
            assert calls == [jnp.bfloat16] * of  # as kept: 16 bits are read, not 32


def test_lowers_for_cuda():
    """`append` as a GPU gets it: a kernel for keys, one for values."""
    method = method_of("turboquant-2/int4", "triton")
    k = jnp.zeros((B, H, D))
    step = lambda method, cache, k: kvjax.append(method, cache, k, k)
    assert kernels(lower(step, "cuda", method, empty(method), k), "cuda") == 2


CHAINS = {
    "mean of each head, dense": Centered(
        jnp.asarray(np.random.default_rng(1).normal(size=(H, 1, 1, D)), jnp.float32),
        Linear(
            Matrix.of(np.random.default_rng(2).normal(size=(D, D))),
            Normalized(Codebook.lloyd_max(D, 2), gain="unbiased", scale_dtype=jnp.float32),
        ),
    ),
    "grid in bf16, groups, turned": Linear(
        Orthogonal.random(D, rng=jax.random.key(0)),
        Uniform(3, group=16, clip=0.95, scale_dtype=jnp.bfloat16, transposed=True),
    ),
}


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_chains(name, dtype):
    """Leaves have the codec's shapes and dtypes; decoded, they are the same vectors."""
    codec = CHAINS[name]
    method = kvjax.Method(codec, codec, LAYOUT, attention="interpret")
    k, _ = tokens(4, 2 * PAGE)
    kept = narrow(k.swapaxes(1, 2).reshape(B, H, 2, PAGE, D), dtype)
    at = jnp.zeros((B, 1, 2, PAGE), jnp.int32)
    run = jax.jit(lambda method, x: (encode_page(method, codec, x, at), codec.encode(widen(x), at)))
    got, want = run(method, kept)
    like = lambda code: jax.tree.map(lambda a: (a.shape, a.dtype), code)
    assert like(got) == like(want)
    mine, theirs = codec.decode(got), codec.decode(want)
    far = np.abs(mine - theirs) > 0.02 * np.abs(theirs).max(-1, keepdims=True)
    assert far.any(-1).mean() < 0.02  # tokens with a code at a border, all of whose channels move


@pytest.mark.parametrize(
    ("codec", "says"),
    [
        (Uniform(4), None),
        (Uniform(4, axis="tokens"), "scales of channels"),
        (Uniform(4, symmetric=True), "without a zero point"),
        (Uniform(4, scale_dtype="float8_e4m3fn"), "scales in float8_e4m3fn"),
        (Uniform(4, group=8), "groups of 8"),
        (Normalized(Codebook.lloyd_max(D, 5)), "got 5 bits"),
        (Normalized(Codebook.lloyd_max(D, 2), search=9), "search over 9 lengths"),
        (Normalized(Codebook.lloyd_max(D, 2), metric=jnp.ones(D)), "metric"),
        (Normalized(Uniform(2)), "Normalized codes"),
        (TokenScale(Uniform(2, axis="tokens")), "TokenScale codes"),
        (Tiers((Uniform(4), Uniform(2)), (16, 16)), "Tiers codes"),
        (Dense(), "Dense codes"),
        (Linear(Matrix.of(np.stack([np.eye(D)] * H)), Uniform(4)), "one for all"),
        (Linear(Hadamard(jnp.ones((H, D))), Uniform(4)), "got signs"),
        (Linear(Hadamard.plain(D), Linear(Hadamard.plain(D), Uniform(4))), "Linear codes"),
    ],
)
def test_reasons(codec, says):
    reason = why_not(codec, D, PAGE)
    assert reason is None if says is None else says in reason
    method = kvjax.Method(codec, codec, LAYOUT)
    taken = "triton" if says is None else None
    assert backend(method.with_attention("triton"), codec, D) == taken
    assert backend(method, codec, D) is None  # on a CPU nothing is chosen by itself
    assert why_not_encode(method, D) == {"key": reason, "value": reason}


def test_sizes_that_the_kernel_does_not_take():
    assert "96 channels" in why_not(Linear(Hadamard.plain(96), Uniform(4)), 96, PAGE)
    assert "40 channels" in why_not(Uniform(4), 40, PAGE)
    assert "pages of 8" in why_not(Uniform(1), D, 8)
    other = dataclasses.replace(kvjax.methods.get("int4", head_dim=D), attention="tpu")
    assert backend(other, other.key, D) is None
