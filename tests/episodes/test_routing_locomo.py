"""Clusters and routing on LoCoMo conversations, against scikit-learn's.

LoCoMo (CC BY-NC 4.0) is not part of the project: these tests need it beside the repository. They
embed one of its conversations, in half a minute on two cores; with KVJAX_LONG_CHECKS=1 all five, in
five minutes.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import get_args

import jax
import numpy as np
import pytest

from kvjax.episodes.embed import embed, minilm
from kvjax.episodes.formats import read
from kvjax.episodes.index import How, create
from kvjax.episodes.routing import answerable, by_question, evaluate
from kvjax.episodes.segment import cut
from kvjax.models import hub

LOCOMO = Path(__file__).parents[2].parent / "shared" / "data" / "locomo"
LONG = os.environ.get("KVJAX_LONG_CHECKS") == "1"
SEEDS = range(4)  # the rates move by a point from one clustering to the next, of one talk by three
# Least shares of evidence inside: cosine, dot, segments, two of eight; and the most by chance.
BOUNDS = (0.62, 0.62, 0.69, 0.76, 0.33) if LONG else (0.44, 0.42, 0.61, 0.70, 0.37)

pytestmark = [pytest.mark.model, pytest.mark.slow]


@pytest.fixture(scope="module")
def conversations():
    if not (LOCOMO / "locomo_dev5.json").is_file():
        pytest.skip("LoCoMo is not here")
    return read(LOCOMO / "locomo_dev5.json")


@pytest.fixture(scope="module")
def embedded(conversations):
    """Of each conversation (of conv-30 alone, unless LONG): vectors of segments and utterances, of
    its questions, the evidence."""
    if hub.installed(hub.find("minilm")) is None:
        pytest.skip("not fetched: run `kvjax models fetch minilm`")
    model = minilm()
    found = {}
    for talk in conversations if LONG else conversations[1:2]:
        questions, evidence = zip(*answerable(talk), strict=True)
        texts = ([s.text for s in cut(talk.utterances)], [s.text for s in cut(talk.utterances, 1)])
        vectors = [embed(model, t) for t in (*texts, [q.text for q in questions])]
        found[talk.name] = (*vectors, evidence)
    return found


def test_what_is_read(conversations):
    assert [len(c.utterances) for c in conversations] == [419, 369, 663, 629, 680]
    assert sum(len(c.questions) for c in conversations) == 999
    assert sum(q.category == "5" for c in conversations for q in c.questions) == 237
    assert sum(len(answerable(c)) for c in conversations) == 760
    lost = {
        id
        for c in conversations
        for q in c.questions
        for id in q.evidence
        if c.index_of(id) is None
    }
    assert lost == {"D", "D10:19"}


def test_inertia_is_that_of_scikit_learn(embedded):
    """Within 1 % of KMeans(n_init=10, random_state=42) on every conversation."""
    rows = {row["id"]: row for row in json.loads((LOCOMO / "routing_baseline.json").read_text())}
    assert len(embedded) == (5 if LONG else 1)
    for name, (segments, *_) in embedded.items():
        row = rows[name]
        assert len(segments) == row["windows"]
        index = create(segments, 4, rng=jax.random.key(0))
        means = np.asarray(index.centroids, np.float64)[np.asarray(index.labels)]
        assert ((segments - means) ** 2).sum() < 1.01 * row["inertia"]


def test_evidence_is_reached(embedded):
    def rate(how: How, episodes: int = 4, top: int = 1, **options) -> dict[str, float]:
        parts = []
        for seed in SEEDS:
            for segments, utterances, questions, evidence in embedded.values():
                index = create(
                    segments,
                    episodes,
                    rng=jax.random.key(seed),
                    utterances=utterances,
                    **options,
                )
                parts.append(evaluate(index, questions, evidence, how, top))
        return by_question(parts)

    cosine, dot, segments = (rate(how) for how in get_args(How))
    halves = rate("segments", 8, 2, smooth=0.3)  # two caches of half the budget
    *least, most = BOUNDS
    for found, bound in zip((cosine, dot, segments, halves), least, strict=True):
        assert found["inside"] > bound
        assert found["chance"] < most
