"""Which layers choose for which: rules, searches, and a model that follows them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from kvjax.core.errors import InputError
from kvjax.select import best_pattern, greedy_pattern, pattern_score, periodic_pattern
from kvjax.select.share import check_pattern, owners, served


def test_glm_5_2_has_21_indexers():
    pattern = periodic_pattern(78)
    want = "".join("F" if max(l - 2, 0) % 4 == 0 else "S" for l in range(78))
    assert pattern == want
    assert (len(pattern), pattern.count("F")) == (78, 21)
    assert pattern.startswith("FFFSSSF")


def test_dense_layers_come_before_an_indexer():
    assert periodic_pattern(8, dense=2) == "DDFSSSFS"
    assert periodic_pattern(8, dense=3) == "DDDFSSFS"  # the rule has an S there, and no F before it
    for wrong in ({"dense": 9}, {"dense": -1}, {"every": 0}):
        with pytest.raises(InputError, match="periodic pattern"):
            periodic_pattern(8, **wrong)


def test_shared_layers_read_the_nearest_full_one_before():
    assert owners("DFSDSFS") == [-1, 1, 1, -1, 1, 5, 5]
    assert served("DFSDSFS") == {1: [1, 2, 4], 5: [5, 6]}


@pytest.mark.parametrize("pattern", ["FSX", "SF", "DS", "FF"])
def test_patterns_that_cannot_be_are_refused(pattern):
    with pytest.raises(InputError, match="pattern"):
        check_pattern(pattern, 3 if pattern == "FF" else len(pattern))


def recall(n, seed=0):
    """Near layers choose alike; lower triangle only."""
    rng = np.random.default_rng(seed)
    far = np.abs(np.subtract.outer(range(n), range(n)))
    return np.tril(np.clip(0.95 - 0.03 * far - 0.1 * rng.random((n, n)) * (far > 0), 0, 1))


def test_the_best_pattern_is_the_best_of_all():
    found = recall(9)
    for start, full in (("F" * 9, 3), ("DF" + "F" * 7, 2), ("F" * 9, 9), ("FFDFFDFFF", 3)):
        rest = [l for l, letter in enumerate(start) if letter != "D"]
        scores = {}
        for chosen in itertools.combinations(rest[1:], full - 1):
            letters = list(start)
            for l in rest:
                letters[l] = "F" if l in (rest[0], *chosen) else "S"
            scores["".join(letters)] = pattern_score(found, "".join(letters))
        pattern, score = best_pattern(found, full, start)
        assert score == pytest.approx(max(scores.values()), abs=1e-12)
        assert scores[pattern] == pytest.approx(score, abs=1e-12)


def test_greedy_search_turns_one_layer_at_a_time():
    found = recall(8, seed=1)
    path = greedy_pattern(2, "F" * 8, lambda p: pattern_score(found, p))
    assert [p.count("F") for p, _ in path] == [8, 7, 6, 5, 4, 3, 2]
    for (before, _), (after, score) in itertools.pairwise(path):
        changed = [l for l in range(8) if before[l] != after[l]]
        assert len(changed) == 1
        others = [
            pattern_score(found, before[:l] + "S" + before[l + 1 :])
            for l in range(1, 8)
            if before[l] == "F"
        ]
        assert score == max(others) == pattern_score(found, after)
    assert path[-1][1] <= best_pattern(found, 2, "F" * 8)[1] + 1e-12


def test_impossible_searches_are_refused():
    for full in (0, 3):
        with pytest.raises(InputError, match="full layers"):
            greedy_pattern(full, "DFF", lambda p: 0.0)
        with pytest.raises(InputError, match="full layers"):
            best_pattern(np.eye(3), full, "DFF")
