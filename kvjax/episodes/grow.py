"""An index that grows with its conversation: new segments, new episodes, new clusters."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from kvjax.core.errors import InputError
from kvjax.episodes.index import TINY, EpisodeIndex, assemble, create, probes_of
from kvjax.episodes.segment import WIDTH

Array = jax.Array


def append(
    index: EpisodeIndex,
    segments: Array | np.ndarray,
    *,
    threshold: float,
    utterances: Array | np.ndarray | None = None,
    width: int = WIDTH,
) -> EpisodeIndex:
    """The index with new segments: each goes to its most similar episode by cosine, and moves its
    centroid to the new mean; below `threshold` it opens an episode of its own.

    Segments that were there keep their labels, and a new episode needs a cache of its own. On the
    host: shapes grow.

    Args:
      segments: `[k, D]` unit vectors, the next ones of the conversation; wait until a segment is
        whole, since none is embedded again.
      threshold: least cosine to a centroid; -1 opens none.
      utterances: `[u, D]` those of the new segments, if the index has them.

    Source: EpiCache (arXiv 2509.17396), its stage 3b, where the threshold has no number.
    """
    new = np.asarray(segments, np.float32)
    old = np.asarray(index.segments)
    if new.ndim != 2 or new.shape[1] != old.shape[1]:
        raise InputError(
            "segments", got=new.shape, expected=f"(k, {old.shape[1]})", fix="embed them alike"
        )
    centroids, sizes = [*np.asarray(index.centroids)], [*np.asarray(index.sizes)]
    labels = [*np.asarray(index.labels)]
    for x in new:
        c = np.stack(centroids)
        cosine = c @ x / np.maximum(np.linalg.norm(c, axis=1), TINY)
        best = int(cosine.argmax())
        if cosine[best] < threshold:
            best = len(centroids)
            centroids.append(x)
            sizes.append(0)
        else:
            centroids[best] = (centroids[best] * sizes[best] + x) / (sizes[best] + 1)
        sizes[best] += 1
        labels.append(best)
    probes, owners = probes_of(new, utterances, width)
    return assemble(
        np.concatenate([old, new]),
        np.asarray(labels),
        np.stack(centroids),
        index.medoids.shape[1],
        np.concatenate([np.asarray(index.probes), probes]),
        np.concatenate([np.asarray(index.probe_segments), owners + len(old)]),
        clustered=int(index.clustered),
    )


def needs_reclustering(index: EpisodeIndex, growth: float = 0.5) -> bool:
    """Whether `append` has added more than `growth` times the segments that were clustered.

    The paper rebuilds when the cache has outgrown its budget by a block, which the owner of the
    cache sees; this is for the index alone.
    """
    clustered = int(index.clustered)
    return index.segments.shape[0] - clustered > growth * clustered


def recluster(
    index: EpisodeIndex, episodes: int | None = None, *, rng: Array, smooth: float = 0.0
) -> EpisodeIndex:
    """New episodes from all segments, by default as many as there are; labels start afresh, so
    caches that were built for the old ones no longer fit."""
    fresh = create(
        index.segments,
        index.episodes if episodes is None else episodes,
        rng=rng,
        medoids=index.medoids.shape[1],
        smooth=smooth,
    )
    return dataclasses.replace(fresh, probes=index.probes, probe_segments=index.probe_segments)
