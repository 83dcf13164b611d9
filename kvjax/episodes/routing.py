"""How often a question reaches the episode of its evidence, against chance."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import jax
import numpy as np

from kvjax.core.errors import InputError
from kvjax.core.pytree import pytree
from kvjax.episodes.conversation import Conversation, Question
from kvjax.episodes.index import EpisodeIndex, How, route
from kvjax.episodes.segment import WIDTH, evidence_segments

ADVERSARIAL = "5"  # the category of LoCoMo whose questions have no answer


@pytree
class Routing:
    """Of each question that has evidence, `[q]` float64 from 0 to 1.

    Attributes:
      inside: the share of its evidence segments that lie in the episodes it is routed to.
      chance: the share of all segments that do, which is what `inside` would be on average if
        the evidence were anywhere. Uneven episodes have a higher one.
      best: `inside` for the best choice of as many episodes.
    """

    inside: np.ndarray
    chance: np.ndarray
    best: np.ndarray


def answerable(
    conversation: Conversation, *, width: int = WIDTH
) -> tuple[tuple[Question, tuple[int, ...]], ...]:
    """Questions with the segments of their evidence; without adversarial ones (category 5) and
    those whose evidence names no utterance."""
    asked = [q for q in conversation.questions if q.category != ADVERSARIAL]
    pairs = [(q, evidence_segments(conversation, q.evidence, width)) for q in asked]
    return tuple((q, segments) for q, segments in pairs if segments)


def evaluate(
    index: EpisodeIndex,
    queries: jax.Array | np.ndarray,
    evidence: Sequence[Sequence[int]],
    how: How = "cosine",
    top: int = 1,
) -> Routing:
    """Routes questions and looks whether their evidence is there.

    Args:
      queries: `[q, D]` unit vectors of the questions.
      evidence: of each question, its segments: one or more.

    Raises:
      InputError: a question without evidence, or a number that is no segment.

    Example:
      >>> import jax
      >>> from kvjax.episodes.index import create
      >>> x = np.eye(3, dtype=np.float32)[[0, 0, 0, 1]]
      >>> result = evaluate(create(x, 2, rng=jax.random.key(0)), x[:1], [[0, 3]])
      >>> result.inside.item(), result.chance.item(), result.best.item()
      (0.5, 0.75, 0.5)
    """
    return evaluate_choice(index, np.asarray(route(index, queries, how, top)), evidence)


def evaluate_choice(
    index: EpisodeIndex, routed: np.ndarray, evidence: Sequence[Sequence[int]]
) -> Routing:
    """`evaluate` of any way to choose episodes, `routed: [q, top]`."""
    n = index.segments.shape[0]
    if len(routed) != len(evidence) or not all(e and 0 <= min(e) <= max(e) < n for e in evidence):
        raise InputError(
            "evidence",
            got=f"{len(evidence)} entries for {len(routed)} questions",
            expected=f"one or more segments from 0 to {n - 1} of each question",
            fix="take questions and segments from answerable()",
        )
    labels, sizes = np.asarray(index.labels), np.asarray(index.sizes)
    held = np.stack([_shares(labels[list(e)], len(sizes)) for e in evidence])  # [q, E]
    return Routing(
        inside=np.take_along_axis(held, routed, 1).sum(1),
        chance=(sizes / n)[routed].sum(1),
        best=np.sort(held, axis=1)[:, -routed.shape[1] :].sum(1),
    )


def by_question(parts: Iterable[Routing]) -> dict[str, float]:
    """Means over the questions of several conversations: each question counts the same."""
    parts = list(parts)
    mean = lambda name: float(np.concatenate([getattr(part, name) for part in parts]).mean())
    return {name: mean(name) for name in ("inside", "chance", "best")}


def _shares(labels: np.ndarray, episodes: int) -> np.ndarray:
    return np.bincount(labels, minlength=episodes) / len(labels)
