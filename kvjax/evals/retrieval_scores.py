"""Scores of a generated answer against the right ones: contained, equal, or words in common."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

from kvjax.core.errors import InputError

_DIGITS = dict(
    zip(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
        "0123456789",
        strict=True,
    )
)
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def string_match_all(prediction: str, answers: Sequence[str]) -> float:
    """The share of the answers that stand in the prediction, whatever their case.

    RULER's score (arXiv 2404.06654) of one sample, 0 to 1. A wrong text beside them costs nothing.

    Raises:
      InputError: no answers.

    Example:
      >>> string_match_all("They are 12 and 34.", ["12", "56"])
      0.5
    """
    text = prediction.lower()
    return sum(answer.lower() in text for answer in _some(answers)) / len(answers)


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1 if the prediction, `normalized`, is one of the answers, else 0.

    Raises:
      InputError: no answers.

    Example:
      >>> exact_match("The Eiffel Tower.", ["Louvre", "eiffel tower"])
      1.0
    """
    text = normalized(prediction)
    return float(any(text == normalized(answer) for answer in _some(answers)))


def token_f1(prediction: str, answers: Sequence[str]) -> float:
    """F1 of the words, `normalized`, that prediction and answer have in common; the best answer's.

    Twice the common words over the words of both, each counted as often as it stands in both; 1
    where both have none.

    Raises:
      InputError: no answers.

    Source: SQuAD (arXiv 1606.05250), with number words as EpiCache scores them (arXiv 2509.17396).

    Example:
      >>> token_f1("two red cats", ["2 cats"])
      0.8
    """
    return max(_f1(normalized(prediction), normalized(answer)) for answer in _some(answers))


def normalized(text: str) -> str:
    """Lower case without punctuation and articles; the words zero to nine become digits.

    Example:
      >>> normalized("The cat, a dog and TWO birds!")
      'cat dog and 2 birds'
    """
    plain = re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_NO_PUNCTUATION))
    return " ".join(_DIGITS.get(word, word) for word in plain.split())


def _f1(prediction: str, answer: str) -> float:
    ours, theirs = prediction.split(), answer.split()
    if not ours and not theirs:
        return 1.0
    common = (Counter(ours) & Counter(theirs)).total()
    return 2 * common / (len(ours) + len(theirs))


def _some(answers: Sequence[str]) -> Sequence[str]:
    if isinstance(answers, str) or not answers:
        raise InputError(
            "answers",
            got=repr(answers),
            expected="a list of at least one text",
            fix="put a single answer in a list",
        )
    return answers
