"""k-means: clusters of points by Lloyd's algorithm from several k-means++ beginnings."""

from __future__ import annotations

import functools
from math import log

import jax
import jax.numpy as jnp

from kvjax.core.errors import InputError
from kvjax.core.pytree import pytree
from kvjax.core.rng import fold

Array = jax.Array


@pytree
class KMeans:
    """Clusters: `centroids: [E, D]` the means of their points, `labels: [n]` int32 the cluster of
    each, `inertia: []` the sum of squared distances to them. More axes in front for a batch."""

    centroids: Array
    labels: Array
    inertia: Array


@functools.partial(jax.jit, static_argnames=("clusters", "restarts", "iterations"))
def kmeans(
    x: Array,
    clusters: int,
    *,
    rng: Array,
    weights: Array | None = None,
    restarts: int = 32,
    iterations: int = 100,
) -> KMeans:
    """The clustering of least inertia among `restarts` runs of Lloyd's algorithm.

        inertia = sum_i weights_i min_e |x_i - c_e|^2,   c_e = weighted mean of the points of e

    Runs begin with k-means++ centroids, each the best of 2 + log(clusters) candidates, and end
    when no label changes. A cluster that loses all its points goes to the point that is farthest
    from its centroid; so one is empty in the end only if fewer points differ than there are
    clusters. Everything follows from `rng`. Use `jax.vmap` for a batch.

    Args:
      x: points `[n, D]`; computed in float32.
      clusters: E, static, 1 to n.
      weights: `[n]`, of 0 or more, at least `clusters` of them positive; default 1. Points of
        weight 0 are padding: they change nothing but their own labels.
      restarts: beginnings, static.
      iterations: at most so many of each run, static.

    Raises:
      InputError: more clusters than points, or a number below 1.

    Example:
      >>> x = jnp.array([[0.0], [0.1], [5.0], [5.1]])
      >>> found = kmeans(x, 2, rng=jax.random.key(0))
      >>> [round(c, 2) for c in sorted(found.centroids[:, 0].tolist())]
      [0.05, 5.05]

    Source: k-means++ (Arthur and Vassilvitskii, 2007) with the candidates of its section 7; it
    is what EpiCache (arXiv 2509.17396) clusters segments with.
    """
    n = x.shape[0]
    for name, count in (("clusters", clusters), ("restarts", restarts), ("iterations", iterations)):
        if count < 1:
            raise InputError(name, got=count, expected="1 or more", fix="give a positive number")
    if clusters > n:
        raise InputError(
            "clusters", got=f"{clusters} of {n} points", expected=f"at most {n}", fix="ask for less"
        )
    x = jnp.asarray(x, jnp.float32)
    w = jnp.ones(n, jnp.float32) if weights is None else jnp.asarray(weights, jnp.float32)

    draws = (restarts, clusters, 2 + int(log(clusters)))
    uniform = jax.random.uniform(fold(rng, "k-means++"), draws)
    runs = jax.vmap(lambda u: _lloyd(x, w, _plus_plus(x, w, u), iterations))(uniform)
    best = jnp.argmin(runs.inertia)
    return jax.tree.map(lambda leaf: leaf[best], runs)


def _plus_plus(x: Array, w: Array, uniform: Array) -> Array:
    """Beginning centroids `[E, D]`: points drawn with odds of their squared distance to those
    that are there, of some candidates the one that leaves the least sum of distances.

    Args:
      uniform: `[E, candidates]` in [0, 1), the draws.
    """
    clusters = uniform.shape[0]

    def draw(odds: Array, u: Array) -> Array:
        total = jnp.cumsum(odds)  # not `choice`: padding at the end must not change the draw
        at = jnp.sum(total <= u[:, None] * total[-1], axis=1)
        last = jnp.max(jnp.where(odds > 0, jnp.arange(len(odds)), 0))
        return jnp.minimum(at, last)

    def add(e: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        centroids, nearest = state  # [E, D], [n] squared distance to the nearest so far
        odds = w * nearest
        picks = draw(jnp.where(odds.sum() > 0, odds, w), uniform[e])  # [candidates]
        left = jnp.minimum(nearest, _distances(x[picks], x))  # [candidates, n]
        best = jnp.argmin(jnp.matmul(left, w, precision="highest"))
        return centroids.at[e].set(x[picks[best]]), left[best]

    first = draw(w, uniform[0, :1])[0]
    centroids = jnp.zeros((clusters, x.shape[1])).at[0].set(x[first])
    nearest = _distances(x[first][None], x)[0]
    return jax.lax.fori_loop(1, clusters, add, (centroids, nearest))[0]


def _lloyd(x: Array, w: Array, centroids: Array, iterations: int) -> KMeans:
    clusters = centroids.shape[0]

    def step(state: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        _, labels, i, _ = state
        member = jax.nn.one_hot(labels, clusters) * w[:, None]  # [n, E]
        size = member.sum(0)
        mean = jnp.matmul(member.T, x, precision="highest") / jnp.where(size, size, 1)[:, None]
        apart = jnp.square(x - mean[labels]).sum(1)
        farthest = jax.lax.top_k(jnp.where(w > 0, apart, -1), clusters)[1]
        empty = size == 0
        mean = jnp.where(empty[:, None], x[farthest[jnp.cumsum(empty) - 1]], mean)
        new = jnp.argmin(_distances(x, mean), axis=1).astype(jnp.int32)
        return mean, new, i + 1, jnp.any((new != labels) & (w > 0))

    labels = jnp.argmin(_distances(x, centroids), axis=1).astype(jnp.int32)
    state = (centroids, labels, jnp.int32(0), jnp.bool_(True))
    centroids, labels, _, _ = jax.lax.while_loop(lambda s: s[3] & (s[2] < iterations), step, state)
    apart = jnp.square(x - centroids[labels]).sum(1)
    return KMeans(centroids, labels, jnp.matmul(apart, w, precision="highest"))


def _distances(a: Array, b: Array) -> Array:
    """Squared distances `[n, m]` of `a: [n, D]` and `b: [m, D]`."""
    inner = jnp.matmul(a, b.T, precision="highest")
    return jnp.maximum(jnp.square(a).sum(1)[:, None] - 2 * inner + jnp.square(b).sum(1), 0)
