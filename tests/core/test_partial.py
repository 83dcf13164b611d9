"""The softmax monoid: any partition, in any order, over devices too, gives the whole softmax."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh, PartitionSpec

from kvjax.core.partial import EMPTY_LSE, Partial, dense_partial
from kvjax.core.storage import narrow

T, D, ROWS = 24, 8, 3


@functools.cache
def data(seed: int = 0):
    rng = np.random.default_rng(seed)
    q, k, v = rng.normal(size=(ROWS, D)) * 2, rng.normal(size=(T, D)), rng.normal(size=(T, D))
    return tuple(jnp.asarray(a, jnp.float32) for a in (q, k, v))


def part(mask, seed: int = 0) -> Partial:
    return dense_partial(*data(seed), jnp.asarray(mask)[None])


def whole(mask=slice(None), seed: int = 0) -> np.ndarray:
    q, k, v = (np.asarray(a, np.float64) for a in data(seed))
    return np.stack([oracle.softmax_attention(row, k[mask], v[mask], scale=1.0) for row in q])


def close(a: Partial, b: Partial):
    np.testing.assert_allclose(a.out, b.out, atol=1e-6)
    np.testing.assert_allclose(a.lse, b.lse, rtol=1e-6)


@given(st.lists(st.integers(0, 4), min_size=T, max_size=T))
def test_merging_a_partition_is_softmax(owners):
    owners = np.array(owners)
    merged = functools.reduce(Partial.merge, [part(owners == i) for i in range(5)])
    np.testing.assert_allclose(merged.out, whole(), atol=2e-6)
    q, k, _ = (np.asarray(a, np.float64) for a in data())
    np.testing.assert_allclose(merged.lse, np.log(np.exp(q @ k.T).sum(-1)), rtol=1e-6)


def test_merge_is_associative_and_commutative():
    at = np.arange(T) % 3
    a, b, c = (part(at == i) for i in range(3))
    close(a.merge(b).merge(c), a.merge(b.merge(c)))
    close(a.merge(b), b.merge(a))


def test_empty_is_the_identity():
    a, empty = part(np.arange(T) < 5), Partial.empty((ROWS,), D)
    assert a.merge(empty) == a
    assert empty.merge(a) == a
    both = empty.merge(empty)
    assert (np.asarray(both.out) == 0).all()
    assert np.isfinite(np.asarray(both.lse)).all()
    assert (np.asarray(both.lse) < EMPTY_LSE / 2).all()


def test_all_masked_rows_are_empty():
    masked = part(np.zeros(T, bool))
    assert masked == Partial.empty((ROWS,), D)
    mask = jnp.asarray([[True] * T, [False] * T, [True] * T])  # one row of three sees nothing
    mixed = dense_partial(*data(), mask)
    assert (np.asarray(mixed.out[1]) == 0).all()
    np.testing.assert_allclose(mixed.out[0], whole()[0], atol=1e-6)


def test_mask_hides_exactly_its_tokens():
    mask = np.arange(T) % 4 != 1
    np.testing.assert_allclose(part(mask).out, whole(mask), atol=1e-6)


def test_huge_logits_do_not_overflow():
    q, k, v = data()
    mask = jnp.ones((1, T), bool)
    half = jnp.arange(T)[None] < T // 2
    big = dense_partial(q * 1e4, k, v, half).merge(dense_partial(q * 1e4, k, v, ~half))
    best = np.asarray(v)[np.asarray(q @ k.T).argmax(-1)]  # softmax of huge logits is the argmax
    np.testing.assert_allclose(big.out, best, atol=1e-5)
    np.testing.assert_allclose(big.out, dense_partial(q * 1e4, k, v, mask).out, atol=1e-5)


def test_kept_bf16_is_widened():
    q, k, v = data()
    rounded = tuple(a.astype(jnp.bfloat16).astype(jnp.float32) for a in (k, v))
    mask = jnp.ones((1, T), bool)
    kept = dense_partial(q, narrow(k, jnp.bfloat16), narrow(v, jnp.bfloat16), mask)
    close(kept, dense_partial(q, *rounded, mask))


@pytest.mark.skipif(jax.device_count() < 4, reason="needs four (simulated) devices")
@pytest.mark.parametrize("seen", [T, 6], ids=["all", "one device has tokens"])
def test_merge_over_a_mesh_axis(seen):
    """Tokens in four shards, with and without shards that hold nothing: no NaN, the same answer."""
    mesh = Mesh(np.array(jax.devices()[:4]), ("sequence",))
    tokens, everywhere = PartitionSpec("sequence"), PartitionSpec()

    @jax.jit
    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(everywhere, tokens, tokens, tokens),
        out_specs=everywhere,
    )
    def attention(q, k, v, mask):
        return dense_partial(q, k, v, mask[None]).merge_axis("sequence")

    mask = np.arange(T) < seen
    merged = attention(*data(), jnp.asarray(mask))
    close(merged, part(mask))
    np.testing.assert_allclose(merged.out, whole(mask), atol=1e-6)


def test_merge_over_an_axis_without_any_token():
    merged = jax.vmap(lambda p: p.merge_axis("parts"), axis_name="parts")(
        Partial.empty((4, ROWS), D)
    )
    assert (np.asarray(merged.out) == 0).all()
    assert np.isfinite(np.asarray(merged.lse)).all()
