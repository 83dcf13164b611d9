"""Segments: runs of consecutive utterances, the unit that episodes are clusters of."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from kvjax.core.errors import InputError
from kvjax.episodes.conversation import Conversation, Utterance

WIDTH = 4  # utterances; the paper's choice among 2, 4 and 8


@dataclasses.dataclass(frozen=True)
class Segment:
    """Utterances `first` to `stop - 1` of a conversation, and their text."""

    first: int
    stop: int
    text: str


def said(utterance: Utterance) -> str:
    """How an utterance reads within a segment; without date and caption.

    Example:
      >>> said(Utterance("Ana", "Tea?", date="1 May"))
      'Ana said, "Tea?"\\n'
    """
    return f'{utterance.speaker} said, "{utterance.text}"\n'


def cut(utterances: Sequence[Utterance], width: int = WIDTH) -> tuple[Segment, ...]:
    """`width` utterances at a time, across the borders of sessions; the last may be shorter.

    Segment `i` holds utterances `width i` to `width i + width - 1`, none is in two.

    Raises:
      InputError: a width below 1.

    Example:
      >>> talk = [Utterance("Ana", str(i)) for i in range(5)]
      >>> [(s.first, s.stop) for s in cut(talk, 2)]
      [(0, 2), (2, 4), (4, 5)]

    Source: EpiCache (arXiv 2509.17396), appendix A.3, and the text as its code writes it.
    """
    if width < 1:
        raise InputError(
            "width", got=width, expected="1 or more utterances", fix="use 4, as the paper does"
        )
    starts = range(0, len(utterances), width)
    parts = [(i, min(i + width, len(utterances))) for i in starts]
    return tuple(Segment(a, b, "".join(map(said, utterances[a:b]))) for a, b in parts)


def evidence_segments(
    conversation: Conversation, evidence: Iterable[str], width: int = WIDTH
) -> tuple[int, ...]:
    """Indices of the segments of `cut` that hold these utterances, rising, each once.

    Ids that are no utterance's are passed over: data sets have a few that are misspelt.
    """
    at = {u.id: i for i, u in enumerate(conversation.utterances) if u.id}
    return tuple(sorted({at[id] // width for id in evidence if id in at}))
