"""Long contexts of an exact length: filler around needles, cut to a number of tokens."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from kvjax.core.errors import InputError

# The filler of RULER's noise haystack (arXiv 2404.06654).
NOISE = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
)

ADJECTIVES = """
    amber ancient bitter bold brave bright broken calm clever cold cosmic crisp curious dark deep
    distant dusty eager early empty faint famous fierce foggy gentle giant golden grand happy heavy
    hidden hollow humble icy idle jolly keen late lazy light little lonely loud lucky merry mighty
    modern narrow noble odd pale plain polite proud quiet rapid rusty shy silent simple smooth
    steep
""".split()
NOUNS = """
    anchor apple arrow badger barrel basket beacon bridge bucket butter button camel candle canyon
    carpet castle cloud copper corner cotton desert dolphin engine falcon feather forest garden
    glacier guitar hammer harbor helmet island jacket kettle ladder lantern lemon magnet marble
    meadow mirror mountain needle ocean orchid palace pebble pencil pepper planet ribbon river
    rocket saddle shadow spider temple thunder tiger tunnel valley violin window
""".split()


class Encoder(Protocol):
    """What is asked of a tokenizer; `kvjax.models.tokenizer.Tokenizer` is one."""

    def encode(self, text: str, *, bos: bool = True) -> list[int]: ...
    def decode(self, ids: Iterable[int]) -> str: ...


@dataclass(frozen=True)
class Sample:
    """One question on one long context.

    Attributes:
      context: what is read before the question is known, and what a cache may compress.
      question: read after it; the answer follows at once, so it ends like the start of a sentence.
      answers: what is asked for, in the order in which a model would best give it.
      task: name of the task.
      depth: where in the context the needle lies, 0 (start) to 1 (end); None where there is no
        such place.
      length: tokens asked for, of context, question and answer together.
    """

    context: str
    question: str
    answers: tuple[str, ...]
    task: str
    depth: float | None
    length: int

    @property
    def answer(self) -> str:
        """The answer as it would continue the question."""
        return " " + ", ".join(self.answers)


def to_tokens(tokenizer: Encoder, sample: Sample) -> tuple[list[int], list[int], list[int]]:
    """Ids of the context, the question, and the answer to be teacher-forced.

    The answer is split off the question where the tokenizer itself would: a word keeps its leading
    space, and a token that is only that space (before digits) is the question's.
    """
    head = tokenizer.encode(sample.question, bos=False)
    joint = tokenizer.encode(sample.question + sample.answer, bos=False)
    same = (i for i, (a, b) in enumerate(itertools.zip_longest(head, joint)) if a != b)
    at = next(same)  # joint is longer
    while at < len(joint) - 1 and not tokenizer.decode(joint[at : at + 1]).strip():
        at += 1
    return tokenizer.encode(sample.context), joint[:at], joint[at:]


def sentences_of(text: str) -> list[str]:
    """The sentences of a text, on one line each.

    Example:
      >>> sentences_of("It rains. Does it?\\nIt does!")
      ['It rains.', 'Does it?', 'It does!']
    """
    return [" ".join(s.split()) for s in re.split(r"(?<=[.!?])\s+", text) if s.strip()]


def bury(sentences: Sequence[str], needles: Sequence[tuple[float, str]]) -> str:
    """Sentences in a row, each needle `(depth, text)` between those two that are nearest to it.

    Depth counts characters of the other sentences. Needles of one depth keep their order.

    Example:
      >>> bury(["One two.", "Three.", "Four."], [(0.6, "HERE."), (0, "FIRST.")])
      'FIRST. One two. Three. HERE. Four.'
    """
    ends = np.cumsum([0, *(len(s) + 1 for s in sentences)])
    places = [int(np.abs(ends - depth * ends[-1]).argmin()) for depth, _ in needles]
    parts: list[str] = []
    for i in range(len(sentences) + 1):
        parts += [text for place, (_, text) in zip(places, needles, strict=True) if place == i]
        parts += sentences[i : i + 1]
    return " ".join(parts)


def fit(render: Callable[[int], str], count: Callable[[str], int], length: int, most: int) -> str:
    """`render(n)` with the largest n of up to `most` that fits: n + 1 would be too long.

    Args:
      render: a text with n units of filler. count: its length. length: the most that fits.
    Raises:
      InputError: not even `render(0)` fits, or `render(most)` is not too long.
    """
    small = count(render(0))
    if small > length:
        raise InputError(
            "length",
            got=f"{length} tokens",
            expected=f"at least {small} for what is hidden, the question and the answer",
            fix="use a longer context",
        )
    fits, over = 0, 1
    while over <= most and count(render(over)) <= length:
        fits, over = over, 2 * over
    over = min(over, most + 1)
    while over - fits > 1:
        middle = (fits + over) // 2
        if count(render(middle)) <= length:
            fits = middle
        else:
            over = middle
    if fits == most:
        raise InputError(
            "filler",
            got=f"{most} pieces, {count(render(most))} tokens with all else",
            expected=f"more than {length} tokens",
            fix="give a longer text, or use a shorter context",
        )
    return render(fits)
