"""`logits_only` in interpret mode against products in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from packs import block, part

from pallas_kernels.logits_only import logits_only, logits_only_reference
from pallas_kernels.packed_decode.config import Config

B, H, D, LAYERS = 2, 2, 32, 2


@functools.partial(jax.jit, static_argnames=("page", "splits", "tokens"))
def run(q, key, lengths, table=None, *, page, splits=2, tokens=64):
    config = Config(splits=splits, tokens=tokens)
    setup = functools.partial(logits_only, config=config, backend="interpret", layer=1)
    return setup(q, key, lengths, page=page, table=table)


def oracle(q, keys, lengths):
    """Products of `q: [b, h, g, d]` and `keys: [b, h, t, d]`, -1e30 from each length on."""
    logits = np.einsum("bhgd,bhtd->bhgt", np.asarray(q, np.float64), keys)
    lengths = np.asarray(lengths)
    lengths = lengths if lengths.ndim == 2 else lengths[:, None]
    seen = np.arange(keys.shape[2]) < lengths[..., None]
    return np.where(seen[:, :, None], logits, -1e30)


def check(got, want, tolerance=1e-3):
    assert got.shape == want.shape
    assert got.dtype == jnp.float32
    real = want > -1e29
    np.testing.assert_array_equal(np.asarray(got) > -1e29, real)
    np.testing.assert_array_equal(np.asarray(got)[~real], np.float32(-1e30))
    scale = np.abs(want[real]).max(initial=0.0)
    np.testing.assert_allclose(np.asarray(got)[real], want[real], atol=tolerance * scale)


def flat(x):
    """Pages of the second layer in a row, `[b, h, t, d]`."""
    return x[1].reshape(B, H, -1, x.shape[-1])


def make(rng, lead, page, kind):
    bits, levels, scale = kind
    packed, x = part(rng, lead, page, [block(rng, lead, page, D, bits, levels)], scale)
    return (packed,), x


def queries(rng, g=3, d=D):
    return jnp.asarray(rng.normal(size=(B, H, g, d)), jnp.float32)


CASES = {
    "sign plane": (1, True, "token"),
    "2 bits, channel scales": (2, False, "channel"),
    "3 bits levels": (3, True, "token"),
    "4 bits": (4, False, "token"),
    "bf16": (16, False, "none"),
}


@pytest.mark.parametrize("case", CASES)
def test_is_the_product(case):
    """Three pages of 32 tokens in steps of two: the last step has a page too many."""
    rng = np.random.default_rng(0)
    key, k64 = make(rng, (LAYERS, B, H, 3), 32, CASES[case])
    q, lengths = queries(rng), np.array([96, 41])
    # Queries are rounded to 11 bits beside codes, to 8 beside bf16.
    tolerance = 5e-3 if case == "bf16" else 1e-3
    check(run(q, key, jnp.asarray(lengths), page=32), oracle(q, flat(k64), lengths), tolerance)


@pytest.fixture(scope="module")
def simple():
    """Two-bit keys of four pages of 32 tokens, with their values."""
    rng = np.random.default_rng(1)
    key, k64 = make(rng, (LAYERS, B, H, 4), 32, (2, True, "token"))
    return queries(rng), key, flat(k64)


@pytest.mark.parametrize("lengths", [(128, 128), (1, 0), (0, 0), (32, 65), (500, -7)], ids=str)
def test_lengths(simple, lengths):
    """Also those beyond what there is room for, which are clamped."""
    q, key, k64 = simple
    got = run(q, key, jnp.array(lengths), page=32)
    check(got, oracle(q, k64, np.clip(lengths, 0, 128)))


def test_heads_may_differ_in_length(simple):
    q, key, k64 = simple
    lengths = np.array([[128, 5], [0, 70]])
    check(run(q, key, jnp.asarray(lengths), page=32), oracle(q, k64, lengths))


@pytest.mark.parametrize("splits", [1, 7])
def test_any_number_of_splits(simple, splits):
    q, key, k64 = simple
    got = run(q, key, jnp.array([100, 3]), page=32, splits=splits, tokens=32)
    check(got, oracle(q, k64, [100, 3]))


def test_pages_through_a_table(simple):
    rng, pool, q = np.random.default_rng(2), 11, simple[0]
    key, k64 = make(rng, (LAYERS, pool, H), 32, (2, False, "token"))
    table = rng.permutation(pool)[: B * 3].reshape(B, 3)
    rows = np.moveaxis(k64[1][table], 2, 1).reshape(B, H, 96, D)
    table[1, 2:] = -1  # beyond that sequence's length
    got = run(q, key, jnp.array([96, 50]), jnp.asarray(table), page=32)
    check(got, oracle(q, rows, [96, 50]))
    same = logits_only_reference(q, key, jnp.array([96, 50]), layer=1, table=jnp.asarray(table))
    check(same, oracle(q, rows, [96, 50]), 1e-5)


def test_parts_and_more_than_eight_queries():
    """Parts with scales of their own: tiers of 16 and 8 channels, then 24."""
    rng, lead, page = np.random.default_rng(3), (LAYERS, B, H, 2), 32
    tier = lambda size, bits: block(rng, lead, page, size, bits)
    one = part(rng, lead, page, [tier(16, 4), tier(8, 8)], "token")
    two = part(rng, lead, page, [tier(24, 4)], "token")
    q = queries(rng, 9, 48)
    got = run(q, (one[0], two[0]), jnp.array([64, 40]), page=page)
    check(got, oracle(q, flat(np.concatenate([one[1], two[1]], -1)), [64, 40]))


def test_one_query(simple):
    q, key, k64 = simple
    got = run(q[:, :, :1], key, jnp.array([128, 9]), page=32)
    check(got, oracle(q[:, :, :1], k64, [128, 9]))


def test_what_it_does_not_take_is_said_before_launch(simple):
    q, key, _ = simple
    with pytest.raises(ValueError, match=r"logits_only: got keys of 32 channels"):
        logits_only(q[..., :8], key, jnp.array([1, 1]), page=32, backend="interpret")
    with pytest.raises(ValueError, match="17 query heads"):
        logits_only(jnp.zeros((B, H, 17, D)), key, jnp.array([1, 1]), page=32, backend="interpret")
