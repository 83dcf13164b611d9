"""Which layers choose tokens, and which read what an earlier layer has chosen."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from kvjax.core.codec import Array
from kvjax.core.errors import InputError
from kvjax.models.config import ModelConfig

FULL, SHARED, DENSE = 0, 1, 2
LETTERS = "FSD"  # in the order of the numbers above


def seeing_all(config: ModelConfig) -> tuple[int, ...]:
    """The layers without a sliding window: those that a selection is for."""
    return tuple(i for i, window in enumerate(config.windows) if window is None)


def check_pattern(pattern: str, layers: int) -> None:
    """Raises `InputError` unless a pattern has a letter for each of some layers.

    F: the layer has an indexer and chooses. S: it reads what the nearest F before it has chosen. D:
    it reads everything (Quest leaves the first two layers dense; small models need it).
    """
    bad = sorted(set(pattern) - set(LETTERS))
    orphan = "S" in pattern and "F" not in pattern[: pattern.find("S")]
    if bad or len(pattern) != layers or orphan:
        raise InputError(
            "pattern",
            got=repr(pattern) + (f" of {len(pattern)} letters" if len(pattern) != layers else ""),
            expected=f"{layers} letters of F, S and D, an F before the first S",
            fix="write one letter per layer that sees everything",
        )


def kinds_of(pattern: str, config: ModelConfig) -> Array:
    """The pattern as int32 `[l]`: FULL, SHARED or DENSE for each layer that sees everything."""
    check_pattern(pattern, len(seeing_all(config)))
    return jnp.asarray([LETTERS.index(letter) for letter in pattern], jnp.int32)


def periodic_pattern(layers: int, *, every: int = 4, offset: int = 3, dense: int = 0) -> str:
    """GLM-5.2's rule: layer l has an indexer where `max(l - offset + 1, 0) % every == 0`.

    Args:
      every: `index_topk_freq`. offset: `index_skip_topk_offset`. dense: first layers that read
        everything instead.

    Example:
      >>> periodic_pattern(10)
      'FFFSSSFSSS'
      >>> periodic_pattern(78).count("F")
      21

    Raises:
      InputError: an `every` under 1; dense layers under 0, or more than there are.

    Source: GLM-5.2's configuration; IndexCache, arXiv 2603.12201.
    """
    if every < 1 or not 0 <= dense <= layers:
        raise InputError(
            "periodic pattern",
            got=f"every {every}, {dense} dense of {layers} layers",
            expected="every 1 or more, and no more dense layers than layers",
            fix="choose such numbers",
        )
    letters = ["F" if max(l - offset + 1, 0) % every == 0 else "S" for l in range(layers)]
    letters[:dense] = "D" * dense
    if "F" not in letters[:1] and dense < layers:
        letters[dense] = "F"  # whose choice the next ones read
    return "".join(letters)


def owners(pattern: str) -> list[int]:
    """For each layer, the layer whose choice it reads: itself if F, -1 if D.

    Example:
      >>> owners("DFSSF")
      [-1, 1, 1, 1, 4]
    """
    check_pattern(pattern, len(pattern))
    last, found = -1, []
    for layer, letter in enumerate(pattern):
        last = layer if letter == "F" else last
        found.append(-1 if letter == "D" else last)
    return found


def served(pattern: str) -> dict[int, list[int]]:
    """The layers that each F serves, itself first.

    Example:
      >>> served("FSSF")
      {0: [0, 1, 2], 3: [3]}
    """
    own = owners(pattern)
    return {f: [l for l, o in enumerate(own) if o == f] for f in sorted(set(own) - {-1})}


def pattern_score(recall: np.ndarray, pattern: str) -> float:
    """Mean mass recalled over layers.

    Args:
      recall: `[l, m]`, mass that layer l recalls with the choice of layer m <= l.
    """
    own = owners(pattern)
    return float(np.mean([1.0 if o < 0 else recall[l, o] for l, o in enumerate(own)]))


def greedy_pattern(full: int, start: str, score: Callable[[str], float]) -> list[tuple[str, float]]:
    """Turns F into S one by one, each time the one whose loss costs least.

    Args:
      full: how many F stay.
      start: the pattern to begin with; its first F stays.
      score: larger is better: `pattern_score` of a recall matrix, or minus a loss of the model.
    Returns:
      Patterns and their scores, from `start` to the one with `full` F.
    Raises:
      InputError: fewer than one F, or more than `start` has.

    Source: IndexCache, arXiv 2603.12201, whose score is the language-model loss; by a recall
    matrix, measured once, the search is arithmetic.

    Example:
      >>> import numpy as np
      >>> recall = np.array([[1.0, 0, 0], [0.9, 1.0, 0], [0.2, 0.3, 1.0]])
      >>> greedy_pattern(2, "FFF", lambda p: pattern_score(recall, p))[-1][0]
      'FSF'
    """
    _check_full(full, start)
    path = [(start, score(start))]
    while path[-1][0].count("F") > full:
        now = path[-1][0]
        own = [l for l, letter in enumerate(now) if letter == "F"][1:]
        tried = [now[:l] + "S" + now[l + 1 :] for l in own]
        scores = [score(p) for p in tried]
        best = int(np.argmax(scores))
        path.append((tried[best], scores[best]))
    return path


def _check_full(full: int, start: str) -> None:
    check_pattern(start, len(start))
    if not 1 <= full <= start.count("F"):
        raise InputError(
            "full layers",
            got=full,
            expected=f"1 to the {start.count('F')} of the pattern {start!r}",
            fix="choose such a number",
        )


def best_pattern(recall: np.ndarray, full: int, start: str) -> tuple[str, float]:
    """The best pattern with so many F, by dynamic programming over where they are.

    A recall matrix makes the score a sum over groups of layers, so that the optimum is as cheap as
    greedy search. D stay as they are in `start`; its other letters are those that may be an F.

    Raises:
      InputError: as `greedy_pattern`.
    """
    _check_full(full, start)
    layers = [l for l, letter in enumerate(start) if letter != "D"]
    n = len(layers)
    part = recall[np.ix_(layers, layers)]
    gain = np.full((n, n + 1), -np.inf)  # gain[a, b]: layers a .. b - 1 read the choice of a
    for a, b in itertools.product(range(n), range(n + 1)):
        if b > a:
            gain[a, b] = part[a:b, a].sum()
    best = np.full((full + 1, n + 1), -np.inf)
    back = np.zeros((full + 1, n + 1), int)
    best[0, 0] = 0.0
    for count, end in itertools.product(range(1, full + 1), range(1, n + 1)):
        options = best[count - 1, :end] + gain[:end, end]
        back[count, end] = int(options.argmax())
        best[count, end] = options.max()
    letters, end = list(start), n
    for layer in layers:
        letters[layer] = "S"
    for count in range(full, 0, -1):
        end = int(back[count, end])
        letters[layers[end]] = "F"
    pattern = "".join(letters)
    return pattern, pattern_score(recall, pattern)
