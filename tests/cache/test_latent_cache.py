"""The latent cache: one row per token that is key and value of all heads, kept once."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import LAYOUTS, T, assert_same, jit, windows

import kvjax
from kvjax.attention.packed_kernel import why_not
from kvjax.cache.state import history_bits_per_value
from kvjax.codecs import Dense, Hadamard, Linear, Uniform, View, latent
from kvjax.core.method import Method

R, TURN, G = 16, 8, 5  # rank of the latent, rotary channels, query heads
D = R + TURN

# float32 sums of 78 weighted tokens, against float64
ATOL = 1e-4


def tokens(b: int, t: int = T, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """`q: [b, t, 1, G, D]` and keys `[b, t, 1, D]`, with a common part."""
    rng = np.random.default_rng(700 + seed)
    k = rng.normal(size=(b, t, 1, D)) + rng.normal(size=D)
    return tuple(a.astype(np.float32) for a in (rng.normal(size=(b, t, 1, G, D)), k))


def exact(layout: kvjax.Layout) -> Method:
    return Method(*latent(Dense("float32"), R, D, Dense("float32")), layout)


def rotated(layout: kvjax.Layout, bits: int = 3) -> Method:
    """A rotated latent with coarse codes: an output left in the rotated basis would be far off."""
    inner = Linear(Hadamard.random(R, rng=jax.random.key(5)), Uniform(bits))
    return Method(*latent(inner, R, D), layout)


def start(method: Method, b: int = 1, **options) -> kvjax.Cache:
    options = {"capacity": T, "dtype": jnp.float32, **options}
    return kvjax.init(method, kv_heads=1, head_dim=D, batch=b, **options)


@functools.partial(jit, static_argnames="block")
def blockwise(method, cache, q, k, block):
    return kvjax.cache.prefill(method, cache, k, None, q=q, block=block)


@jit
def stepwise(method, cache, q, k):
    def step(cache, token):
        cache = kvjax.append(method, cache, token[1], None)
        return cache, kvjax.attend(method, cache, token[0])

    cache, out = jax.lax.scan(step, cache, [jnp.moveaxis(a, 1, 0) for a in (q, k)])
    return jnp.moveaxis(out, 0, 1), cache


def values_of(k: np.ndarray) -> np.ndarray:
    return np.where(np.arange(D) < R, k, 0)


def attended(method: Method, q, k, **options) -> np.ndarray:
    """The oracle, reading of packed pages `[h, p, d]` what the key's codes decode to."""
    decode = jit(lambda x: method.key.decode(method.key.encode(x[None, :, None]))[0, :, 0])
    key = lambda x: np.asarray(decode(jnp.asarray(x, jnp.float32)))
    pages = {"key_page": key, "value_page": lambda x: values_of(key(x))}
    return oracle.cache_attention(q, k, values_of(k), **windows(method.layout), **pages, **options)


@pytest.mark.parametrize("name", ["usual", "pool"])
def test_exact_latent_is_causal_attention_and_keeps_no_values(name):
    layout = LAYOUTS[name]
    q, k = tokens(2)
    method = exact(layout)
    cache = start(method, 2)
    out, cache = blockwise(method, cache, q, k, 13)
    expected = [oracle.causal_attention(q[i], k[i], values_of(k[i])) for i in range(2)]
    np.testing.assert_allclose(out, expected, atol=ATOL)
    assert (np.asarray(cache.packed) > 0).all()
    assert cache.window_value.size == 0
    assert jax.tree.leaves(cache.value_pages) == []


def test_a_rotated_latent_gives_outputs_that_are_not_rotated():
    """Codes in a rotated basis, rotary channels in bf16: attention over what the codes decode to,
    in steps and in blocks."""
    method = rotated(LAYOUTS["encode two"])
    q, k = tokens(2, seed=1)
    out, cache = stepwise(method, start(method, 2), q, k)
    for i in range(2):
        np.testing.assert_allclose(out[i], attended(method, q[i], k[i]), atol=ATOL)
    again, other = blockwise(method, start(method, 2), q, k, 39)
    np.testing.assert_allclose(again, out, atol=1e-5)
    assert_same(other, cache)


def test_sliding_window():
    layout, t, window = kvjax.Layout(sink=2, recent=16, page=16), 96, 29
    method = rotated(layout)
    q, k = tokens(1, t, seed=2)
    out, _ = blockwise(method, start(method, capacity=t, window=window), q, k, 16)
    expected = attended(method, q[0], k[0], window=window)
    np.testing.assert_allclose(out[0], expected, atol=ATOL)


def test_bytes_count_a_token_once():
    """R + TURN numbers per token, of 3 and of 16 bits; not twice, and no windows of values."""
    layout = kvjax.Layout(sink=0, recent=16, page=16)
    method = rotated(layout)
    cache = start(method, capacity=16 * 9, dtype=jnp.bfloat16)
    pages = cache.page_starts.size
    code = sum(a.nbytes for a in jax.tree.leaves(cache.key_pages))
    scales = 2 * 2 * 16  # scale and zero of each token, 16 bits each
    assert code == pages * (16 * R * 3 // 8 + scales + 16 * TURN * 2)
    starts = 4 * pages
    assert history_bits_per_value(method, cache) == 8 * (code + starts) / (pages * 16 * D)
    window = 32 * D * 2
    notes = cache.window_positions.nbytes + cache.length.nbytes + cache.packed.nbytes
    assert kvjax.cache_bytes(cache) == code + starts + window + notes


def test_deepseek_bytes_per_token():
    """(512 + 64) numbers of 2 bytes for each token and layer, beside 4 bytes for a page."""
    method = Method(*latent(Dense(), 512, 576), kvjax.Layout(sink=0, recent=64, page=64))
    size = lambda capacity: kvjax.cache_bytes(
        jax.eval_shape(
            lambda: kvjax.init(method, capacity=capacity, kv_heads=1, head_dim=576, layers=27)
        )
    )
    assert size(64 * 101) - size(64 * 100) == 27 * (64 * 576 * 2 + 4)


def test_a_step_is_in_place():
    method = rotated(LAYOUTS["usual"])
    cache = jax.eval_shape(lambda: start(method))
    q = jax.ShapeDtypeStruct((1, 1, G, D), jnp.float32)
    k = jax.ShapeDtypeStruct((1, 1, D), jnp.float32)

    def step(method, cache, q, k):
        cache = kvjax.append(method, cache, k, None)
        return kvjax.attend(method, cache, q), cache

    compiled = jit(step, donate_argnums=1).lower(method, cache, q, k).compile()
    assert compiled.memory_analysis().alias_size_in_bytes == kvjax.cache_bytes(cache)


def test_sequences_are_forked_taken_put_back_and_emptied():
    method = rotated(LAYOUTS["usual"])
    q, k = tokens(2, seed=3)
    _, cache = blockwise(method, start(method, 2), q, k, 39)
    copied = kvjax.cache.fork(cache, 1, 0)
    assert_same(kvjax.cache.take(copied, 0), kvjax.cache.take(cache, 1))
    now = jnp.asarray(q[:, -1])
    attend = jit(lambda cache: kvjax.attend(method, cache, now))
    last = attend(cache)
    other = attend(kvjax.cache.put(cache, 0, kvjax.cache.take(cache, 1)))
    np.testing.assert_allclose(other[1], last[1], atol=1e-6)
    assert float(abs(other[0] - last[0]).max()) > 0.1
    emptied = kvjax.cache.reset(cache, 0)
    assert emptied.length.tolist() == [[0, T]]
    assert (attend(emptied)[0] == 0).all()


def test_values_may_be_given_if_they_are_the_keys_own():
    method = exact(LAYOUTS["usual"])
    _, k = tokens(1, 1)
    k, cache = jnp.asarray(k[:, 0]), start(method)
    assert_same(
        kvjax.append(method, cache, k, jnp.asarray(values_of(k))),
        kvjax.append(method, cache, k, None),
    )
    with pytest.raises(kvjax.InputError, match="v: got values of their own"):
        kvjax.append(method, cache, k, k)
    plain = Method(Dense(), Dense())
    with pytest.raises(kvjax.InputError, match="v: got None; expected values"):
        kvjax.append(plain, kvjax.init(plain, capacity=9, kv_heads=1, head_dim=D), k, None)
    with pytest.raises(kvjax.InputError, match="cache: got one without values; expected one made"):
        kvjax.append(plain, cache, k, k)
    with pytest.raises(kvjax.InputError, match="cache: got one that keeps values"):
        kvjax.append(method, kvjax.init(plain, capacity=9, kv_heads=1, head_dim=D), k, None)


def test_a_view_obeys_both_laws_on_its_own():
    view = rotated(LAYOUTS["usual"]).value
    q, x = jax.random.normal(jax.random.key(1), (2, 3, 32, D))
    p = jax.nn.softmax(q @ x.swapaxes(-1, -2), -1)

    @jit
    def both(view, q, x, p):
        code = view.encode(x)
        out = view.restore(view.accumulate(p, code))
        return view.decode(code), view.logits(view.prepare(q), code), out

    decoded, logits, out = both(view, q, x, p)
    assert decoded.shape == x.shape
    np.testing.assert_array_equal(decoded[..., R:], 0)
    np.testing.assert_allclose(logits, q @ decoded.swapaxes(-1, -2), atol=1e-4)
    np.testing.assert_allclose(out, p @ decoded, atol=1e-5)


def test_what_does_not_fit_is_refused():
    method = rotated(LAYOUTS["usual"])
    turned = Linear(Hadamard.random(D, rng=jax.random.key(0)), Dense())  # latent and rotary mixed
    mixed = dataclasses.replace(method, key=turned)
    with pytest.raises(kvjax.InputError, match="key codec: got Linear; expected a Split"):
        start(mixed)
    other = Linear(Hadamard.random(R, rng=jax.random.key(6)), Uniform(3))
    with pytest.raises(kvjax.InputError, match="another codec than the key's own"):
        start(dataclasses.replace(method, value=View(other, R, D)))
    with pytest.raises(kvjax.InputError, match="split: got 16 of 24 channels"):
        kvjax.init(method, capacity=9, kv_heads=1, head_dim=32)
    with pytest.raises(kvjax.InputError, match="view: got 16 of 24 channels, for keys of 32"):
        method.value.check(32, 16)
    with pytest.raises(kvjax.InputError, match="latent: got rank 24 of 24"):
        latent(Dense(), D, D)
    assert why_not(method) == "values: a view of the keys, which the kernel would read twice"
