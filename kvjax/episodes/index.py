"""The index of episodes: clusters of segments, what stands for each, and where a question goes."""

from __future__ import annotations

import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.core.errors import InputError, known
from kvjax.core.pytree import pytree
from kvjax.core.rng import fold
from kvjax.episodes.kmeans import kmeans
from kvjax.episodes.segment import WIDTH

Array = jax.Array
How = Literal["cosine", "dot", "segments"]

TINY = 1e-12  # length below which a centroid, of opposite segments, has no direction
_PAD = 64  # segments: k-means is compiled for multiples of it
SPEAKERS = 2  # of the probes of an episode, so many nearest ones speak for it


@pytree
class EpisodeIndex:
    """Episodes of one conversation; a pytree, so that `route` can be part of a jitted step.

    Attributes:
      segments: `[n, D]` float32 unit vectors, in the order of the conversation.
      labels: `[n]` int32, the episode of each.
      centroids: `[E, D]` their means, not of unit length: that of a tight episode is longer.
      sizes: `[E]` int32.
      medoids: `[E, m]` int32, the segments most like the centroid, in the order of the
        conversation; -1 fills up an episode that has fewer.
      probes: `[p, D]` what a question is compared with under "segments": the segments, and the
        single utterances if they were given.
      probe_segments: `[p]` int32, the segment of each.
      clustered: `[]` int32, segments that were there when clusters were last made.
    """

    segments: Array
    labels: Array
    centroids: Array
    sizes: Array
    medoids: Array
    probes: Array
    probe_segments: Array
    clustered: Array

    @property
    def episodes(self) -> int:
        """E."""
        return self.centroids.shape[0]


def create(
    segments: Array | np.ndarray,
    episodes: int = 4,
    *,
    rng: Array,
    medoids: int = 8,
    smooth: float = 0.0,
    utterances: Array | np.ndarray | None = None,
    width: int = WIDTH,
) -> EpisodeIndex:
    """Clusters segments into episodes.

    Args:
      segments: `[n, D]` unit vectors of `segment.cut`, from `embed.embed`.
      episodes: E; the paper finds E = 8 1.5 points better than 4, at twice the bytes.
      medoids: m segments that stand for an episode in its prompt.
      smooth: share of both neighbours that is added to a segment before it is clustered, so that
        a topic is not torn apart; 0.3 is worth 2 to 3 points of evidence reached (ours).
      utterances: `[u, D]` unit vectors of the single utterances, for `route(how="segments")`.
      width: utterances per segment.

    Raises:
      InputError: fewer segments than episodes, or fewer that differ; counts that do not fit.

    Example:
      >>> x = np.eye(4, dtype=np.float32)[[0, 0, 1, 1, 1]]
      >>> index = create(x, 2, rng=jax.random.key(0), medoids=2)
      >>> int(index.labels[0]) == int(route(index, x[1])[0]), sorted(index.sizes.tolist())
      (True, [2, 3])

    Source: EpiCache (arXiv 2509.17396); its scripts use E = 4 and 8 medoids. Differs
    from the paper: 32 beginnings of k-means in place of 10, and probes.
    """
    x = np.asarray(segments, np.float32)
    if x.ndim != 2 or len(x) < episodes:
        raise InputError(
            "episodes",
            got=f"{episodes} of segments {x.shape}",
            expected="at most as many as segments [n, D]",
            fix="ask for fewer episodes, or cut shorter segments",
        )
    for name, count in (("episodes", episodes), ("medoids", medoids), ("width", width)):
        if count < 1:
            raise InputError(name, got=count, expected="1 or more", fix="give a positive number")
    labels = _clusters(_smoothed(x, smooth), episodes, rng)
    sizes = np.bincount(labels, minlength=episodes)
    if sizes.min() == 0:
        raise InputError(
            "episodes",
            got=f"{episodes} of only {int((sizes > 0).sum())} segments that differ",
            expected="an episode for every cluster",
            fix="ask for fewer episodes",
        )
    centroids = np.stack([x[labels == e].mean(0) for e in range(episodes)])
    probes, owners = probes_of(x, utterances, width)
    return assemble(x, labels, centroids, medoids, probes, owners, clustered=len(x))


@functools.partial(jax.jit, static_argnames="how")
def scores(index: EpisodeIndex, queries: Array | np.ndarray, how: How = "cosine") -> Array:
    """How well each episode fits: queries `[..., D]` -> `[..., E]` float32, higher is better.

        cosine:    <q, c_e> / |c_e|, 0 where c_e is 0             (the paper)
        dot:       <q, c_e>, which favours tight episodes         (the code)
        segments:  mean of the two greatest <q, p>, p of e        (ours)

    Args:
      queries: unit vectors of questions.
      how: "segments" asks which episode has said the most similar things, not which is similar on
        average; it costs the vectors of the utterances and not a byte of cache.
    """
    queries = jnp.asarray(queries, jnp.float32)
    dot = lambda a: jnp.matmul(queries, a.T, precision="highest")
    if how == "dot":
        return dot(index.centroids)
    if how == "cosine":
        lengths = jnp.linalg.norm(index.centroids, axis=-1, keepdims=True)
        return dot(index.centroids / jnp.maximum(lengths, TINY))
    if how != "segments":
        raise InputError(
            "how", got=how, expected=known(("cosine", "dot", "segments")), fix="choose one of them"
        )
    owner = index.labels[index.probe_segments]  # [p]
    mine = owner == jnp.arange(index.episodes)[:, None]  # [E, p]
    similar = jnp.where(mine, dot(index.probes)[..., None, :], -jnp.inf)  # [..., E, p]
    nearest = jax.lax.top_k(similar, min(SPEAKERS, similar.shape[-1]))[0]
    there = jnp.isfinite(nearest)
    return jnp.where(there, nearest, 0).sum(-1) / there.sum(-1)


@functools.partial(jax.jit, static_argnames=("how", "top"))
def route(
    index: EpisodeIndex, queries: Array | np.ndarray, how: How = "cosine", top: int = 1
) -> Array:
    """The `top` episodes of queries `[..., D]`, best first: int32 `[..., top]`.

    Source: EpiCache (arXiv 2509.17396), equation 7.
    """
    if not 1 <= top <= index.episodes:
        raise InputError(
            "top", got=top, expected=f"1 to {index.episodes} episodes", fix="ask for as many"
        )
    return jax.lax.top_k(scores(index, queries, how), top)[1]


def _smoothed(x: np.ndarray, share: float) -> np.ndarray:
    """Segments with a share of their neighbours, of unit length."""
    if not 0 <= share < 1:
        raise InputError("smooth", got=share, expected="0 to below 1", fix="use 0 or 0.3")
    mixed = x.copy()
    mixed[1:] += share * x[:-1]
    mixed[:-1] += share * x[1:]
    return mixed / np.maximum(np.linalg.norm(mixed, axis=1, keepdims=True), TINY) if share else x


def _clusters(x: np.ndarray, episodes: int, rng: Array) -> np.ndarray:
    """Labels `[n]`; padded, so that conversations of like length share a compilation."""
    n = len(x)
    padded = np.zeros((-(-n // _PAD) * _PAD, x.shape[1]), np.float32)
    padded[:n] = x
    weights = (np.arange(len(padded)) < n).astype(np.float32)
    found = kmeans(padded, episodes, rng=fold(rng, "episodes"), weights=weights)
    return np.asarray(found.labels)[:n]


def probes_of(
    segments: np.ndarray, utterances: Array | np.ndarray | None, width: int
) -> tuple[np.ndarray, np.ndarray]:
    """Vectors `[p, D]` to compare questions with, and the segment of each."""
    owners = np.arange(len(segments))
    if utterances is None:
        return segments, owners
    single = np.asarray(utterances, np.float32)
    if single.ndim != 2 or -(-len(single) // width) != len(segments):
        raise InputError(
            "utterances",
            got=f"{single.shape} for {len(segments)} segments of {width}",
            expected="a vector for each utterance of the segments",
            fix="embed the utterances that the segments were cut from",
        )
    return np.concatenate([segments, single]), np.append(owners, np.arange(len(single)) // width)


def assemble(
    segments: np.ndarray,
    labels: np.ndarray,
    centroids: np.ndarray,
    medoids: int,
    probes: np.ndarray,
    owners: np.ndarray,
    *,
    clustered: int,
) -> EpisodeIndex:
    """An index of these parts, with the sizes and medoids that follow from them."""
    whole = lambda a: jnp.asarray(a, jnp.int32)
    return EpisodeIndex(
        segments=jnp.asarray(segments),
        labels=whole(labels),
        centroids=jnp.asarray(centroids),
        sizes=whole(np.bincount(labels, minlength=len(centroids))),
        medoids=whole(_medoids(segments, labels, centroids, medoids)),
        probes=jnp.asarray(probes),
        probe_segments=whole(owners),
        clustered=whole(clustered),
    )


def _medoids(x: np.ndarray, labels: np.ndarray, centroids: np.ndarray, count: int) -> np.ndarray:
    """`[E, count]`: the segments of each episode nearest its centroid by cosine, in order."""
    out = np.full((len(centroids), count), -1)
    for e, centroid in enumerate(centroids):
        members = np.flatnonzero(labels == e)
        nearest = np.argsort(-(x[members] @ centroid), kind="stable")[:count]
        out[e, : len(nearest)] = np.sort(members[nearest])
    return out
