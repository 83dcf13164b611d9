"""k-means: a fixed point of Lloyd's algorithm, found again, and as good as the best there is."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.core.errors import InputError
from kvjax.episodes.kmeans import _lloyd, kmeans

N, D, E = 60, 8, 3


def blobs(spread: float = 0.2) -> tuple[np.ndarray, np.ndarray]:
    """Points around E centres that are far apart, and the centre of each."""
    rng = np.random.default_rng(0)
    truth = rng.integers(0, E, N)
    centres = 3 * np.eye(E, D)
    return (centres[truth] + spread * rng.normal(size=(N, D))).astype(np.float32), truth


@pytest.fixture(scope="module")
def clustered():
    x, truth = blobs()
    return x, truth, kmeans(x, E, rng=jax.random.key(0), restarts=4)


def inertia(x: np.ndarray, labels: np.ndarray) -> float:
    """Sum of squared distances to the means, in float64."""
    x = x.astype(np.float64)
    return sum(((x[labels == e] - x[labels == e].mean(0)) ** 2).sum() for e in set(labels))


def test_finds_the_blobs(clustered):
    x, truth, found = clustered
    labels = np.asarray(found.labels)
    assert {len(set(labels[truth == e])) for e in range(E)} == {1}
    assert len(set(labels)) == E
    np.testing.assert_allclose(found.inertia, inertia(x, labels), rtol=1e-5)


def test_is_a_fixed_point(clustered):
    x, _, found = clustered
    labels, centroids = np.asarray(found.labels), np.asarray(found.centroids, np.float64)
    means = np.stack([x[labels == e].mean(0) for e in range(E)])
    np.testing.assert_allclose(centroids, means, atol=1e-5)
    distances = ((x[:, None].astype(np.float64) - centroids) ** 2).sum(-1)
    np.testing.assert_array_equal(labels, distances.argmin(1))


def test_the_key_decides(clustered):
    x, _, found = clustered
    assert found == kmeans(x, E, rng=jax.random.key(0), restarts=4)
    noise = np.random.default_rng(1).normal(size=(N, D)).astype(np.float32)
    once = lambda seed: kmeans(noise, E, rng=jax.random.key(seed), restarts=4).labels.tolist()
    assert once(0) == once(0)
    assert len({tuple(once(seed)) for seed in range(4)}) > 1


def test_padding_changes_nothing(clustered):
    x, _, found = clustered
    padded = np.concatenate([x, np.full((4, D), 9, np.float32)])
    weights = np.append(np.ones(N), np.zeros(4)).astype(np.float32)
    with_pads = kmeans(padded, E, rng=jax.random.key(0), weights=weights, restarts=4)
    np.testing.assert_array_equal(with_pads.labels[:N], found.labels)
    np.testing.assert_allclose(with_pads.centroids, found.centroids, atol=1e-5)
    np.testing.assert_allclose(with_pads.inertia, found.inertia, rtol=1e-5)


def test_a_weight_is_a_repetition():
    few = np.random.default_rng(5).normal(size=(7, D)).astype(np.float32)
    times = np.array([1, 2, 3, 1, 2, 3, 1])
    x, weights = np.zeros((N + 4, D), np.float32), np.zeros(N + 4, np.float32)
    x[:7], weights[:7] = few, times
    found = kmeans(x, E, rng=jax.random.key(0), weights=weights, restarts=4)
    best = min(  # of all ways to label the points, repeated
        inertia(np.repeat(few, times, axis=0), np.repeat(labels, times))
        for labels in map(np.array, itertools.product(range(E), repeat=7))
    )
    np.testing.assert_allclose(found.inertia, best, rtol=1e-5)


def test_a_batch_is_one_by_one(clustered):
    x, _, found = clustered
    batch = jnp.stack([x, x[::-1]])
    keys = jnp.stack([jax.random.key(0)] * 2)
    both = jax.vmap(lambda points, rng: kmeans(points, E, rng=rng, restarts=4))(batch, keys)
    np.testing.assert_allclose(both.inertia, [found.inertia] * 2, rtol=1e-5)
    np.testing.assert_array_equal(both.labels[0], found.labels)


def test_a_cluster_that_loses_its_points_goes_to_the_farthest():
    x, truth = blobs()
    lost = np.stack([x[truth == 0].mean(0), *np.full((E - 1, D), 100, np.float32)])
    found = _lloyd(jnp.asarray(x), jnp.ones(N), jnp.asarray(lost), 100)
    assert len(set(found.labels.tolist())) == E
    np.testing.assert_allclose(found.inertia, inertia(x, np.asarray(found.labels)), rtol=1e-5)


def test_fewer_points_that_differ_than_clusters():
    x = np.repeat(np.eye(2, D, dtype=np.float32), [N - 1, 1], axis=0)
    found = kmeans(x, E, rng=jax.random.key(0), restarts=4)
    assert len(set(found.labels.tolist())) == 2
    assert np.isfinite(found.centroids).all()
    assert float(found.inertia) < 1e-9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clusters": 61}, "got 61 of 60 points; expected at most 60"),
        ({"clusters": 0}, "clusters: got 0"),
        ({"clusters": 2, "restarts": 0}, "restarts: got 0"),
        ({"clusters": 2, "iterations": 0}, "iterations: got 0"),
    ],
)
def test_what_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        kmeans(blobs()[0], rng=jax.random.key(0), **options)
