"""The index of episodes: routing against its formulas, medoids, growth, and evaluation."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.core.errors import InputError
from kvjax.episodes.conversation import Conversation, Question, Utterance
from kvjax.episodes.grow import append, needs_reclustering, recluster
from kvjax.episodes.index import create, route, scores
from kvjax.episodes.routing import answerable, by_question, evaluate

N, D, E, WIDTH = 24, 6, 3, 2
RNG = jax.random.key(0)


def unit(x: np.ndarray) -> np.ndarray:
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def wide(x) -> np.ndarray:
    """Padded to D, so that all tests share the compiled k-means."""
    x = np.asarray(x, np.float64)
    return np.concatenate([x, np.zeros((*x.shape[:-1], D - x.shape[-1]))], -1)


@pytest.fixture(scope="module")
def vectors():
    """Segments around three axes, tightly to loosely; utterances around their segments."""
    rng = np.random.default_rng(0)
    topic = rng.integers(0, E, N)
    noise = rng.normal(size=(N, D)) * np.array([0.1, 0.2, 0.4])[topic][:, None]
    segments = unit(np.eye(E, D)[topic] + noise)
    utterances = unit(np.repeat(segments, WIDTH, 0) + 0.5 * rng.normal(size=(N * WIDTH, D)))
    return segments, utterances[:-1], topic


@pytest.fixture(scope="module")
def index(vectors):
    segments, utterances, _ = vectors
    return create(segments, E, rng=RNG, medoids=5, utterances=utterances, width=WIDTH)


def test_create(index, vectors):
    segments, _, topic = vectors
    labels = np.asarray(index.labels)
    assert all(len(set(labels[topic == t])) == 1 for t in range(2))  # the loose one may lose some
    np.testing.assert_array_equal(index.sizes, np.bincount(labels))
    for e in range(E):
        mean = segments[labels == e].astype(np.float64).mean(0)
        np.testing.assert_allclose(index.centroids[e], mean, atol=1e-6)
    assert index == create(segments, E, rng=RNG, medoids=5, utterances=vectors[1], width=WIDTH)


def test_medoids_are_nearest_and_in_order(index, vectors):
    segments, labels = vectors[0].astype(np.float64), np.asarray(index.labels)
    for e in range(E):
        members = np.flatnonzero(labels == e)
        cosine = segments[members] @ segments[members].mean(0)
        want = sorted(members[np.argsort(-cosine)[:5]])
        assert index.medoids[e].tolist() == [*want, *[-1] * (5 - len(want))]


def test_scores_follow_their_formulas(index, vectors):
    segments, utterances, _ = vectors
    queries = unit(np.random.default_rng(1).normal(size=(2, 4, D)))
    q, c = queries.astype(np.float64), np.asarray(index.centroids, np.float64)
    labels = np.asarray(index.labels)
    cosine = q @ (c / np.linalg.norm(c, axis=1)[:, None]).T
    np.testing.assert_allclose(scores(index, queries), cosine, atol=1e-6)
    np.testing.assert_allclose(scores(index, queries, "dot"), q @ c.T, atol=1e-6)
    owners = np.append(labels, np.repeat(labels, WIDTH)[: len(utterances)])
    similar = q @ np.concatenate([segments, utterances]).T.astype(np.float64)
    best2 = [np.sort(similar[..., owners == e])[..., -2:].mean(-1) for e in range(E)]
    want = np.stack(best2, -1)
    np.testing.assert_allclose(scores(index, queries, "segments"), want, atol=1e-6)
    ranked = np.argsort(-want, axis=-1)
    np.testing.assert_array_equal(route(index, queries, "segments", 2), ranked[..., :2])
    np.testing.assert_array_equal(route(index, queries[0, 0], "segments"), ranked[0, 0, :1])


def test_dot_favours_tight_episodes():
    between = unit(wide([1.0, 1.05, 0]))
    x = unit(wide([[1, 0, 0], [1, 0, 0], [0, 1, 0.9], [0, 1, -0.9]]))
    tight = create(x, 2, rng=RNG)
    one = int(tight.labels[0])
    assert len(set(tight.labels.tolist())) == 2
    assert int(route(tight, between, "dot")[0]) == one
    assert int(route(tight, between, "cosine")[0]) != one


def test_an_episode_of_one_segment_speaks_for_itself():
    index = create(np.eye(D, dtype=np.float32)[[0, 0, 0, 1]], 2, rng=RNG)
    got = scores(index, unit(wide([3, 4])), "segments")
    np.testing.assert_allclose(np.sort(got), [0.6, 0.8], atol=1e-6)


def test_routing_is_part_of_a_step(index):
    steps = 0

    @jax.jit
    def step(index, query, caches):
        nonlocal steps
        steps += 1
        return caches[route(index, query)[0]]

    for e in range(E):
        query = index.centroids[e] / jnp.linalg.norm(index.centroids[e])
        assert int(step(index, query, jnp.arange(E) * 10)) == 10 * e
    assert steps == 1


def test_append(index):
    old = np.asarray(index.centroids[1], np.float64)
    near, far = unit(old), np.eye(D, dtype=np.float32)[-1] * np.sign(-old[-1])
    new = np.stack([near, far, far])
    grown = append(index, new, threshold=0.5, utterances=new.repeat(WIDTH, 0), width=WIDTH)
    assert grown.labels.tolist() == [*index.labels.tolist(), 1, E, E]
    count = int(index.sizes[1])
    np.testing.assert_allclose(grown.centroids[1], (old * count + near) / (count + 1), atol=1e-6)
    np.testing.assert_allclose(grown.centroids[E], far, atol=1e-6)
    np.testing.assert_array_equal(grown.sizes, np.bincount(grown.labels))
    assert grown.medoids[E].tolist() == [N + 1, N + 2, -1, -1, -1]
    assert grown.probe_segments[-6:].tolist() == [N, N, N + 1, N + 1, N + 2, N + 2]
    assert int(route(grown, far, "segments")[0]) == E
    closed = append(index, new, threshold=-1)
    assert closed.episodes == E
    assert append(index, new[:0], threshold=0) == index
    assert not needs_reclustering(grown, 0.125)
    assert needs_reclustering(grown, 0.12)
    again = recluster(grown, E, rng=RNG)
    assert again.episodes == E
    assert not needs_reclustering(again, 0)
    assert again.probes.shape == grown.probes.shape
    fresh = create(again.segments, E, rng=RNG, medoids=5)
    np.testing.assert_array_equal(again.labels, fresh.labels)


def test_smoothing_keeps_a_topic_together():
    """A segment between topics goes with its neighbours, not with what it is a bit nearer to."""
    a, b, odd = wide([1, 0]), wide([0, 1]), wide([0.45, 0.55])
    x = unit(np.stack([a] * 5 + [odd] + [a] * 5 + [b] * 11))
    plain, smooth = (create(x, 2, rng=RNG, smooth=share) for share in (0.0, 0.5))
    assert plain.labels[5] == plain.labels[-1]
    assert smooth.labels[5] == smooth.labels[0] != smooth.labels[-1]


def test_evaluation(index):
    labels, sizes = np.asarray(index.labels), np.asarray(index.sizes)
    evidence = [(0, 1, 2), (3,)]
    queries = np.asarray(index.segments[:2])
    result = evaluate(index, queries, evidence, top=2)
    routed = np.asarray(route(index, queries, top=2))
    inside = [np.mean([labels[s] in r for s in e]) for r, e in zip(routed, evidence, strict=True)]
    np.testing.assert_allclose(result.inside, inside)
    np.testing.assert_allclose(result.chance, sizes[routed].sum(1) / N)
    counts = [np.bincount(labels[list(e)], minlength=E) / len(e) for e in evidence]
    np.testing.assert_allclose(result.best, np.sort(counts, axis=1)[:, -2:].sum(1))
    everything = evaluate(index, queries, evidence, top=E)
    for part in (everything.inside, everything.chance, everything.best):
        np.testing.assert_allclose(part, 1)
    mean = by_question([result, dataclasses.replace(result, inside=np.zeros(6))])
    np.testing.assert_allclose(mean["inside"], sum(inside) / 8)


def test_which_questions_count():
    utterances = tuple(Utterance("A", "x", f"D1:{i}") for i in range(1, 9))
    questions = (
        Question("a", evidence=("D1:5", "D1:1")),
        Question("b", evidence=("D1:5",), category="5"),
        Question("c", evidence=("D",)),
        Question("d"),
    )
    assert answerable(Conversation("c", utterances, questions)) == ((questions[0], (0, 1)),)


def test_what_is_refused(index, vectors):
    segments, utterances, _ = vectors
    with pytest.raises(InputError, match=r"episodes: got 25 of segments \(24, 6\)"):
        create(segments, 25, rng=RNG)
    with pytest.raises(InputError, match="got 3 of only 2 segments that differ"):
        create(segments[[0, 0, 1, 0]].repeat(6, 0), 3, rng=RNG)
    with pytest.raises(InputError, match="episodes: got 0"):
        create(segments, 0, rng=RNG)
    with pytest.raises(InputError, match="smooth: got 1"):
        create(segments, 2, rng=RNG, smooth=1)
    with pytest.raises(InputError, match=r"utterances: got \(47, 6\) for 24 segments of 4"):
        create(segments, E, rng=RNG, utterances=utterances)
    with pytest.raises(InputError, match="top: got 4; expected 1 to 3"):
        route(index, segments[0], top=4)
    with pytest.raises(InputError, match="how: got best; expected one of cosine, dot, segments"):
        route(index, segments[0], "best")
    with pytest.raises(InputError, match=r"segments: got \(1, 5\)"):
        append(index, segments[:1, :5], threshold=0)
    for evidence in ([], [()], [(N,)], [(-1,)]):
        with pytest.raises(InputError, match="evidence"):
            evaluate(index, segments[:1], evidence)
