"""What was said: utterances in order, grouped by session, with questions about them."""

from __future__ import annotations

import dataclasses
import itertools

from kvjax.core.errors import InputError


@dataclasses.dataclass(frozen=True)
class Utterance:
    """One turn of one speaker.

    Attributes:
      id: what evidence refers to ("D3:5": session 3, turn 5); "" if nothing does.
      date: of its session or of itself, as the file wrote it; "" if unknown.
      caption: description of an image shared with it; "" if none.
    """

    speaker: str
    text: str
    id: str = ""
    date: str = ""
    caption: str = ""


@dataclasses.dataclass(frozen=True)
class Question:
    """A question about a conversation, with the answer that a data set expects.

    Attributes:
      evidence: ids of the utterances that answer it.
      category: the data set's own name or number of the kind of question.
      date: when it is asked; "" if unknown.
    """

    text: str
    answer: str = ""
    evidence: tuple[str, ...] = ()
    category: str = ""
    date: str = ""


@dataclasses.dataclass(frozen=True)
class Conversation:
    """A conversation of any length, an empty one too (a chat that has not begun).

    Args:
      starts: index of the first utterance of each session; all one session by default.

    Raises:
      InputError: two utterances with one id, a text or speaker that is no string, or starts that
        do not rise from 0; a question whose text or answer is no string.

    Example:
      >>> talk = Conversation("tea", (Utterance("Ana", "Tea?", "D1:1"), Utterance("Ben", "Yes.")))
      >>> talk.speakers, talk.index_of("D1:1")
      (('Ana', 'Ben'), 0)
    """

    name: str
    utterances: tuple[Utterance, ...]
    questions: tuple[Question, ...] = ()
    starts: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        for i, u in enumerate(self.utterances):
            if not (isinstance(u.text, str) and isinstance(u.speaker, str)):
                raise InputError(
                    f"utterance {i} of conversation {self.name}",
                    got=f"speaker {u.speaker!r}, text {u.text!r}"[:100],
                    expected="strings",
                    fix='write "" for what is missing',
                )
        for i, q in enumerate(self.questions):
            if not (isinstance(q.text, str) and isinstance(q.answer, str)):
                raise InputError(
                    f"question {i} of conversation {self.name}",
                    got=f"text {q.text!r}, answer {q.answer!r}"[:100],
                    expected="strings",
                    fix='write "" for what is missing',
                )
        ids = [u.id for u in self.utterances if u.id]
        if len(set(ids)) < len(ids):
            raise InputError(
                f"ids of conversation {self.name}",
                got=f"{next(i for i in ids if ids.count(i) > 1)} twice",
                expected="an id of its own for every utterance",
                fix='number them, or leave ids ""',
            )
        bounds = (*self.starts, max(1, len(self.utterances)))
        if bounds[0] != 0 or any(a >= b for a, b in itertools.pairwise(bounds)):
            raise InputError(
                f"starts of conversation {self.name}",
                got=self.starts,
                expected=f"rising numbers from 0, below {len(self.utterances)}",
                fix="give the index of the first utterance of each session that has any",
            )

    @property
    def speakers(self) -> tuple[str, ...]:
        """Names in the order in which they first speak."""
        return tuple(dict.fromkeys(u.speaker for u in self.utterances))

    @property
    def sessions(self) -> tuple[tuple[Utterance, ...], ...]:
        """The utterances of each session; one empty session if there are none."""
        ends = (*self.starts[1:], len(self.utterances))
        return tuple(self.utterances[a:b] for a, b in zip(self.starts, ends, strict=True))

    def index_of(self, id: str) -> int | None:
        """Where the utterance of this id stands; None if there is no such."""
        return next((i for i, u in enumerate(self.utterances) if id and u.id == id), None)
