"""`probe_scores` in interpret mode against softmax in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.probe_scores import probe_scores, probe_scores_reference
from pallas_kernels.probe_scores.config import Config, heuristic

B, H, D = 2, 2, 16
CONFIG = Config(tile=16, step=32, key_splits=2, query_splits=2)


@functools.partial(jax.jit, static_argnames=("config",))
def run(q, key, lengths=None, positions=None, query_positions=None, config=CONFIG):
    mask = {"positions": positions, "query_positions": query_positions}
    return probe_scores(q, key, lengths, **mask, config=config, backend="interpret")


def oracle(q, key, seen):
    """Largest weight and sum of weights by key, `[b, h, t]`.

    Args:
      q: `[b, h, g, n, d]`. key: `[b, h, t, d]`. seen: broadcasts to `[b, h, n, t]`.
    """
    logits = np.einsum("bhgnd,bhtd->bhgnt", np.asarray(q, np.float64), np.asarray(key, np.float64))
    seen = np.broadcast_to(np.expand_dims(seen, 2), logits.shape)
    logits = np.where(seen, logits, -np.inf)
    top = np.where(seen.any(-1, keepdims=True), logits.max(-1, keepdims=True), 0.0)
    p = np.exp(logits - top)
    p = p / np.maximum(p.sum(-1, keepdims=True), 1e-300)
    return p.max((2, 3)), p.sum((2, 3))


def check(got, want, tolerance=1e-5):
    """Relative to the weights: those of float32 logits up to about 20."""
    for mine, true in zip(got, want, strict=True):
        assert mine.shape == true.shape
        assert mine.dtype == jnp.float32
        np.testing.assert_allclose(np.asarray(mine), true, rtol=tolerance, atol=1e-30)


def make(seed, g, n, t, d=D):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    return normal(B, H, g, n, d), normal(B, H, t, d)


@pytest.fixture(scope="module")
def simple():
    """33 rows of queries and 75 keys: no multiple of any block."""
    return make(0, 3, 11, 75)


def lengths_seen(lengths, t):
    lengths = np.asarray(lengths)
    lengths = lengths if lengths.ndim == 2 else lengths[:, None]
    return (np.arange(t) < lengths[..., None])[:, :, None]


@pytest.mark.parametrize(
    "lengths", [(75, 75), (1, 0), (0, 0), (32, 33), (500, -7), ((75, 5), (0, 64))], ids=str
)
def test_lengths(simple, lengths):
    q, key = simple
    got = run(q, key, jnp.array(lengths))
    check(got, oracle(q, key, lengths_seen(lengths, 75)))


def test_all_keys_are_seen_without_lengths_and_masks(simple):
    q, key = simple
    got = run(q, key)
    check(got, oracle(q, key, np.ones((1, 1, 1, 1), bool)))
    np.testing.assert_allclose(got.total.sum(-1), 33, rtol=1e-5)


@pytest.fixture(scope="module")
def masks():
    """Queries in the middle of the keys, some of padding, one before all keys; keys out of order,
    of each head its own, with empty slots."""
    rng = np.random.default_rng(1)
    keys = rng.permuted(np.broadcast_to(np.arange(3, 78), (B, H, 75)), axis=-1)
    keys = np.where(rng.random(keys.shape) < 0.3, -1, keys)
    queries = np.array([[*range(40, 48), 2, -1, -1], [70, 5, 4, 3, 100, 6, 7, 50, -1, 20, 21]])
    return keys.astype(np.int32), queries.astype(np.int32)


def test_causal(simple, masks):
    q, key = simple
    keys, queries = masks
    seen = (keys >= 0)[:, :, None] & (keys[:, :, None] <= queries[:, None, :, None])
    seen = seen & lengths_seen([75, 70], 75)
    got = run(q, key, jnp.array([75, 70]), jnp.asarray(keys), jnp.asarray(queries))
    check(got, oracle(q, key, seen))
    assert np.isfinite(np.asarray(got)).all()


def test_queries_of_padding_and_keys_in_order(simple, masks):
    q, key = simple
    queries = masks[1]
    at = np.arange(75)[None, None, None]
    got = run(q, key, query_positions=jnp.asarray(queries))
    check(got, oracle(q, key, at <= queries[:, None, :, None]))


def test_empty_slots_without_causality(simple, masks):
    q, key = simple
    keys = masks[0][:, 0]
    got = run(q, key, positions=jnp.asarray(keys))
    check(got, oracle(q, key, (keys >= 0)[:, None, None]))


@pytest.mark.parametrize("stored", ["bfloat16", "bits"])
def test_keys_in_bf16_and_odd_channels(stored):
    """Queries are rounded as the keys are, and nothing else is: the products are exact."""
    q, key = make(2, 1, 4, 40, d=24)
    key = key.astype(jnp.bfloat16)
    kept = jax.lax.bitcast_convert_type(key, jnp.uint16) if stored == "bits" else key
    got = run(q, kept, config=Config(tile=32, step=16))
    rounded = q.astype(jnp.bfloat16).astype(jnp.float32)
    check(got, oracle(rounded, key, np.ones((1, 1, 1, 1), bool)))


def test_large_logits():
    """Neither overflow nor weights above 1 by more than the rounding of logits of 5000."""
    q, key = make(3, 2, 3, 40)
    got = run(q * 500, key, config=Config(tile=16, step=16))
    check(got, oracle(q * 500, key, np.ones((1, 1, 1, 1), bool)), tolerance=5e-3)


def test_the_reference_is_the_definition(simple, masks):
    q, key = simple
    keys, queries = masks
    seen = (keys >= 0)[:, :, None] & (keys[:, :, None] <= queries[:, None, :, None])
    seen = seen & lengths_seen([75, 20], 75)
    mask = {"positions": jnp.asarray(keys), "query_positions": jnp.asarray(queries)}
    got = jax.jit(probe_scores_reference)(q, key, jnp.array([75, 20]), **mask)
    check(got, oracle(q, key, seen))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda q, k: (q[0], k), "4 and 4 axes"),
        (lambda q, k: (q[..., :8], k), "same batch, KV heads and channels"),
        (lambda q, k: (q, k[:, :, :0]), "no axis of 0"),
        (lambda q, k: (q, k.astype(jnp.float16)), "keys of float16"),
    ],
)
def test_what_it_does_not_take_is_said_before_launch(simple, change, says):
    with pytest.raises(ValueError, match=says):
        probe_scores(*change(*simple), backend="interpret")


def test_small_work_is_split():
    """One head of 4096 keys leaves processors idle unless both passes are split."""
    one = heuristic(1, 1, queries=256, keys=4096)
    assert one.key_splits == 32
    assert one.query_splits == 2
    many = heuristic(8, 8, queries=8192, keys=131072)
    assert (many.key_splits, many.query_splits) == (1, 1)
