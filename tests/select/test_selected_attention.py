"""Attention over chosen tokens of packed caches, against float64 with the others left out."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import kvjax
from kvjax.codecs import Dense, Uniform
from kvjax.core.errors import InputError
from kvjax.core.method import Method
from kvjax.select import attend_chosen
from kvjax.select.attend import chosen_pages

H, G, D, T, B = 2, 2, 16, 78, 2
LENGTHS = (78, 45)
LAYOUTS = {
    "usual": (kvjax.Layout(sink=4, recent=16, page=16), None),
    "pool": (kvjax.Layout(sink=4, recent=16, page=16, pool=9), None),
    "no sink": (kvjax.Layout(sink=0, recent=0, page=16), None),
    "sliding": (kvjax.Layout(sink=2, recent=16, page=16), 40),
}
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def lossy(layout):
    return Method(Uniform(2, axis="tokens"), Uniform(3), layout)


def data(seed=0):
    rng = np.random.default_rng(seed)
    q = 1.5 * rng.normal(size=(B, H, G, D))
    k = rng.normal(size=(B, T, H, D)) + rng.normal(size=(H, D))
    v = rng.normal(size=(B, T, H, D))
    return tuple(a.astype(np.float32) for a in (q, k, v))


@jit
def filled(method, cache, k, v):
    """A ragged batch: sequence i holds its first `LENGTHS[i]` tokens."""

    def step(cache, token):
        t, k, v = token
        return kvjax.append(method, cache, k, v, active=t < jnp.asarray(LENGTHS)), None

    tokens = jnp.arange(T), jnp.moveaxis(k, 1, 0), jnp.moveaxis(v, 1, 0)
    return jax.lax.scan(step, cache, tokens)[0]


@functools.cache
def case(name):
    layout, window = LAYOUTS[name]
    method = lossy(layout)
    q, k, v = data()
    cache = kvjax.init(
        method,
        capacity=T,
        kv_heads=H,
        head_dim=D,
        batch=B,
        layers=1,
        window=window,
        dtype=jnp.float32,
    )
    return method, window, q, k, v, filled(method, cache, k, v)


attend_jit = jit(attend_chosen)

# A scale of a page that lies between two float16 numbers may be rounded to the other one.
SCALES = 1e-3


def expected(layout, window, q, k, v, chosen, length):
    """One sequence: exact tokens, and packed ones (as their pages decode) where chosen."""
    packed = oracle.packed_tokens(length, sink=layout.sink, recent=layout.recent, page=layout.page)
    k, v = k[:length].astype(np.float64), v[:length].astype(np.float64)
    for first in range(layout.sink, layout.sink + packed, layout.page):
        at = slice(first, first + layout.page)
        for h in range(H):
            k[at, h] = oracle.min_max(k[at, h], 2, axis="tokens")[-1]
            v[at, h] = oracle.min_max(v[at, h], 3, axis="channels")[-1]
    reach = 0 if window is None else length - window
    exact = [*range(layout.sink), *range(layout.sink + packed, length)]
    seen = sorted({t for t in (*exact, *chosen) if reach <= t < length})
    out = np.zeros((H, G, D))
    for h in range(H):
        for g in range(G):
            out[h, g] = oracle.softmax_attention(q[h, g], k[seen, h], v[seen, h])
    return out


@pytest.mark.parametrize("name", LAYOUTS)
def test_only_chosen_tokens_are_attended_to(name):
    method, window, q, k, v, cache = case(name)
    layout = method.layout
    # Packed, exact, or no token at all; of the sliding window some are out of reach.
    chosen = np.full((B, 12), -1, np.int32)
    chosen[0, :8] = [45, 3, 77, 40, 20, 21, 49, 60]
    chosen[1, 2:8] = [6, 12, 0, 40, 17, 5]
    chosen[1, 0] = T + 5
    got = attend_jit(method, cache, q, jnp.asarray(chosen))
    for row in range(B):
        own = [t for t in chosen[row].tolist() if 0 <= t < LENGTHS[row]]
        want = expected(layout, window, q[row], k[row], v[row], own, LENGTHS[row])
        np.testing.assert_allclose(got[row], want, atol=SCALES)
        without = expected(layout, window, q[row], k[row], v[row], [], LENGTHS[row])
        assert np.abs(want - without).max() > 30 * SCALES  # the choice shows


@pytest.mark.parametrize("name", ["usual", "pool", "sliding"])
def test_all_tokens_chosen_is_full_attention(name):
    method, _, q, _, _, cache = case(name)
    everything = jnp.asarray(np.random.default_rng(2).permutation(T), jnp.int32)
    got = attend_jit(method, cache, q, jnp.broadcast_to(everything, (B, T)))
    want = jit(kvjax.attend)(method, cache, q)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_each_page_is_read_once_and_no_other():
    method, _, _, _, _, cache = case("usual")
    chosen = jnp.asarray([[5, 70, 37, 4, 36, 6], [-1, -1, -1, 4, 19, 4]], jnp.int32)
    pages = chosen_pages(method.layout, cache, chosen, 0)
    # 78 tokens: 3 pages at 4, 20, 36 (70 is recent); 45 tokens: 1 page at 4.
    assert pages.slots.tolist() == [[0, 2, -1], [0, -1, -1]]
    assert pages.used.tolist() == [2, 1]
    want = np.zeros((2, 3, 16), bool)
    want[0, 0, [0, 1, 2]] = want[0, 1, [0, 1]] = want[1, 0, [0, 15]] = True
    np.testing.assert_array_equal(pages.wanted, want)


def test_nothing_chosen_leaves_the_windows():
    method, _, q, k, v, cache = case("usual")
    got = attend_jit(method, cache, q, jnp.full((B, 12), -1, jnp.int32))
    for row in range(B):
        want = expected(method.layout, None, q[row], k[row], v[row], [], LENGTHS[row])
        np.testing.assert_allclose(got[row], want, atol=SCALES)


def test_exact_codes_are_exact():
    layout = kvjax.Layout(sink=4, recent=16, page=16)
    method = Method(Dense(jnp.float32), Dense(jnp.float32), layout)
    q, k, v = data(3)
    cache = kvjax.init(method, capacity=T, kv_heads=H, head_dim=D, batch=B, dtype=jnp.float32)
    cache = filled(method, cache, k, v)
    chosen = [[9, 30, 31], [-1, 20, 5]]
    got = attend_jit(method, cache, q, jnp.asarray(chosen, jnp.int32), scale=0.3)
    for row, length in enumerate(LENGTHS):
        packed = oracle.packed_tokens(length, sink=4, recent=16, page=16)
        seen = [*range(4), *sorted(t for t in chosen[row] if 4 <= t < 4 + packed)]
        seen += range(4 + packed, length)
        for h in range(H):
            for g in range(G):
                own = q[row, h, g], k[row, seen, h], v[row, seen, h]
                want = oracle.softmax_attention(*own, 0.3)
                np.testing.assert_allclose(got[row, h, g], want, atol=1e-5)


def test_a_choice_of_another_shape_is_refused():
    method, _, q, _, _, cache = case("usual")
    with pytest.raises(InputError, match="chosen"):
        attend_chosen(method, cache, q, jnp.zeros((B, H, 4), jnp.int32))
    with pytest.raises(InputError, match="chosen"):
        attend_chosen(method, cache, q, jnp.zeros((B, 4)))
    with pytest.raises(InputError, match="k of 1 or more"):
        attend_chosen(method, cache, q, jnp.zeros((B, 0), jnp.int32))
