"""An index turn by turn: where one goes, how it is taken in, and what an episode is about."""

from __future__ import annotations

from typing import get_args

import numpy as np

from kvjax.core.errors import InputError, known
from kvjax.episodes.index import SPEAKERS, TINY, EpisodeIndex, How, assemble


def joined(index: EpisodeIndex, vector: np.ndarray, episode: int) -> EpisodeIndex:
    """The index with one more segment in `episode`; the number of episodes opens a new one.

    `grow.append` chooses the episode by similarity. A turn is where its cache is: this is for it.

    Args:
      vector: `[D]`, the unit vector of the segment.
    Raises:
      InputError: a vector of another length, an episode beyond the next new one.

    Example:
      >>> import jax
      >>> from kvjax.episodes.index import create
      >>> index = create(np.eye(3, dtype=np.float32)[[0, 0]], 1, rng=jax.random.key(0))
      >>> joined(index, np.eye(3, dtype=np.float32)[1], 1).sizes.tolist()
      [2, 1]
    """
    old, centroids = np.asarray(index.segments), np.asarray(index.centroids)
    if vector.shape != old.shape[1:] or not 0 <= episode <= len(centroids):
        raise InputError(
            "turn",
            got=f"a vector {vector.shape} for episode {episode}",
            expected=f"{old.shape[1:]}, and an episode from 0 to {len(centroids)}",
            fix="embed it like the segments",
        )
    if episode == len(centroids):
        centroids = np.concatenate([centroids, vector[None]])
    else:
        size = int(index.sizes[episode])
        centroids = centroids.copy()
        centroids[episode] = (centroids[episode] * size + vector) / (size + 1)
    return assemble(
        np.concatenate([old, vector[None]]),
        np.append(np.asarray(index.labels), episode),
        centroids,
        index.medoids.shape[1],
        np.concatenate([np.asarray(index.probes), vector[None]]),
        np.append(np.asarray(index.probe_segments), len(old)),
        clustered=int(index.clustered),
    )


def typical(index: EpisodeIndex, episode: int) -> int:
    """The segment that is most like the centroid of an episode."""
    members = np.asarray(index.medoids)[episode]
    members = members[members >= 0]
    similar = np.asarray(index.segments)[members] @ np.asarray(index.centroids)[episode]
    return int(members[similar.argmax()])


def fit(index: EpisodeIndex, vector: np.ndarray, how: How = "segments") -> np.ndarray:
    """`index.scores` of one query `[D]`, on the host: an index that grows by every turn would be
    compiled anew for every turn.

    Example:
      >>> import jax
      >>> from kvjax.episodes.index import create
      >>> index = create(np.eye(3, dtype=np.float32), 3, rng=jax.random.key(0))
      >>> fit(index, np.array([1.0, 0.0, 0.0], np.float32)).max().item()
      1.0
    """
    if how not in get_args(How):
        raise InputError("how", got=how, expected=known(get_args(How)), fix="choose one of them")
    centroids = np.asarray(index.centroids)
    if how != "segments":
        lengths = np.maximum(np.linalg.norm(centroids, axis=1), TINY) if how == "cosine" else 1.0
        return centroids @ vector / lengths
    similar = np.asarray(index.probes) @ vector
    owner = np.asarray(index.labels)[np.asarray(index.probe_segments)]
    nearest = (np.sort(similar[owner == e])[-SPEAKERS:] for e in range(len(centroids)))
    return np.array([near.mean() for near in nearest], np.float32)
