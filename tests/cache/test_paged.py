"""A shared pool of pages: the same answers, shared prefixes, and an end that is seen."""

from __future__ import annotations

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import (
    LAYOUTS,
    T,
    assert_same,
    empty,
    exact,
    extend,
    jit,
    lossy,
    lossy_pages,
    sequence,
    stepwise,
    tokens,
    windows,
)

import kvjax
from kvjax.cache import fork

LAYOUT = kvjax.Layout(sink=4, recent=16, page=16)


def used(cache: kvjax.Cache) -> int:
    """Pages of the pool that somebody reads."""
    return int((cache.page_readers[0] > 0).sum())


def pooled(pages: int) -> kvjax.Layout:
    return dataclasses.replace(LAYOUT, pool=pages)


def test_a_pool_gives_the_same_bits():
    """Ragged sequences, so that their pages lie mixed in the pool."""
    q, k, v = tokens(2, seed=11)
    active = np.stack([np.ones(T, bool), np.arange(T) % 5 > 0])
    plain, shared = lossy(LAYOUT), lossy(LAYOUTS["pool"])
    out, contiguous = stepwise(plain, empty(plain, 2), q, k, v, active)
    out_2, cache = stepwise(shared, empty(shared, 2), q, k, v, active)
    np.testing.assert_array_equal(out_2, out)
    packed = np.asarray(contiguous.packed[0])
    assert used(cache) == packed.sum() > packed.max()
    table = np.asarray(cache.page_table[0])
    assert sorted(table[table >= 0]) == list(range(packed.sum()))
    for row in range(2):  # through the table, the pages are those of the contiguous cache
        ids = table[row, : packed[row]]
        code, code_2 = contiguous.key_pages, cache.key_pages
        for a, b in zip(jax.tree.leaves(code), jax.tree.leaves(code_2), strict=True):
            np.testing.assert_array_equal(a[0, row, :, : packed[row]].swapaxes(0, 1), b[0, ids])


@pytest.mark.parametrize("pool", [None, 6])
def test_chunks_that_do_not_divide_the_pages(pool, monkeypatch):
    """Four pages in chunks of three: the second chunk overlaps the first, and counts nothing twice."""
    layout = dataclasses.replace(LAYOUT, sink=0, recent=0, pool=pool)
    # The package's `attend` is the function; its module goes by the same name.
    monkeypatch.setattr(sys.modules["kvjax.cache.attend"], "CHUNK_TOKENS", 48)
    method = exact(layout)
    q, k, v = tokens(1, seed=12)
    out, cache = jit(lambda *a: kvjax.extend(*a))(method, empty(method, 1), q, k, v)
    assert int(cache.packed[0, 0]) == 4
    np.testing.assert_allclose(out[0], oracle.causal_attention(q[0], k[0], v[0]), atol=1e-5)


def test_forked_sequences_share_their_prefix():
    """Sequence 1 continues sequence 0: two different continuations, one copy of the prefix."""
    layout, prefix = LAYOUTS["pool"], 57
    method = lossy(layout)
    q, k, v = tokens(2, seed=13)
    count = jnp.array([prefix, 5], jnp.int32)  # what sequence 1 held before is forgotten
    _, cache = extend(method, empty(method, 2), *(a[:, :prefix] for a in (q, k, v)), count=count)
    before = oracle.packed_tokens(prefix, **windows(layout)) // layout.page
    assert before == 2
    forked = fork(cache, 0, 1)
    assert (np.asarray(forked.length) == prefix).all()
    assert used(forked) == used(cache) == before
    np.testing.assert_array_equal(forked.page_table[0, 1], cache.page_table[0, 0])
    assert_same((forked.key_pages, forked.value_pages), (cache.key_pages, cache.value_pages))
    # The continuations, and then steps that do nothing: so the shapes of the other tests serve.
    steps = [np.roll(a, -prefix, 1) for a in (q, k, v)]
    active = np.broadcast_to(np.arange(T) < T - prefix, (2, T))
    out, grown = stepwise(method, forked, *steps, active)
    for i in range(2):
        whole = (np.concatenate([a[0, :prefix], a[i, prefix:]]) for a in (q, k, v))
        expected = oracle.cache_attention(*whole, **windows(layout), **lossy_pages())
        np.testing.assert_allclose(out[i, : T - prefix], expected[prefix:], atol=1e-4)
    after = oracle.packed_tokens(T, **windows(layout)) // layout.page
    assert after > before
    assert used(grown) == before + 2 * (after - before)
    table = np.asarray(grown.page_table[0])
    np.testing.assert_array_equal(table[0, :before], table[1, :before])
    assert not set(table[0, before:after]) & set(table[1, before:after])


def test_fork_of_a_contiguous_cache_copies_the_pages():
    method = lossy(LAYOUT)
    q, k, v = tokens(2, 57, seed=13)
    count = jnp.array([57, 5], jnp.int32)
    _, cache = extend(method, empty(method, 2), q, k, v, count=count)
    forked = fork(cache, 0, 1)
    assert_same(sequence(forked, 0), sequence(cache, 0))
    assert_same(sequence(forked, 1), sequence(cache, 0))


def test_fork_copies_every_layer():
    method = lossy(pooled(4))
    cache = empty(method, 3, layers=2)
    rng = np.random.default_rng(0)
    cache = jax.tree.map(lambda a: jnp.asarray(rng.integers(0, 5, a.shape), a.dtype), cache)
    forked = jax.jit(fork)(cache, 2, 0)
    for name in (
        "window_key",
        "window_value",
        "window_positions",
        "page_table",
        "length",
        "packed",
    ):
        before, after = np.asarray(getattr(cache, name)), np.asarray(getattr(forked, name))
        np.testing.assert_array_equal(after[:, 0], before[:, 2], err_msg=name)
        np.testing.assert_array_equal(after[:, 1:], before[:, 1:], err_msg=name)


def test_an_exhausted_pool_is_nan():
    """From the very step that would need a page too many; and for good."""
    method = lossy(pooled(2))
    q, k, v = tokens(1, seed=14)
    out, cache = stepwise(method, empty(method, 1), q, k, v)
    needed = [oracle.packed_tokens(t + 1, **windows(LAYOUT)) // LAYOUT.page for t in range(T)]
    enough = np.array(needed) <= 2
    assert 0 < enough.sum() < T
    assert np.isfinite(out[0, enough]).all()
    assert np.isnan(out[0, ~enough]).all()
    assert cache.page_table[0, 0, :3].tolist() == [0, 1, -2]
    assert cache.page_readers[0].tolist() == [1, 1]
