"""What each retrieval task hides, asks and expects, before its context is cut to length."""

from __future__ import annotations

import itertools
import string
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from kvjax.evals.haystack import ADJECTIVES, NOUNS, bury


@dataclass(frozen=True)
class Draft:
    """A task whose context is not yet cut to length.

    Attributes:
      render: the context with n units of filler.
      question, answers: as of `Sample`.
      most: how many units there are.
      once: whether each answer must stand in the context exactly once.
    """

    render: Callable[[int], str]
    question: str
    answers: tuple[str, ...]
    most: int
    once: bool = True


@dataclass(frozen=True)
class Setting:
    """What a task is made from: its random numbers, the depth, the filler, the tokens at most."""

    random: np.random.Generator
    depth: float
    sentences: list[str]
    length: int

    def haystack(self, intro: str, needles, question: str, answers, *, once: bool = True) -> Draft:
        """Needles `(depth, text)` in the filler."""
        render = lambda n: f"{intro}\n{bury(self.sentences[:n], needles)}"
        return Draft(render, question, tuple(answers), len(self.sentences), once)

    def names(self, count: int) -> list[str]:
        """Different names of an adjective and a noun."""
        chosen = self.random.permutation(len(ADJECTIVES) * len(NOUNS))[:count]
        return [f"{ADJECTIVES[i // len(NOUNS)]} {NOUNS[i % len(NOUNS)]}" for i in chosen]

    def numbers(self, count: int, digits: int) -> list[str]:
        """Different numbers of so many digits."""
        low = 10 ** (digits - 1)
        return [str(low + i) for i in self.random.choice(9 * low, count, replace=False)]

    def uuids(self, count: int) -> list[str]:
        return [str(uuid.UUID(bytes=self.random.bytes(16), version=4)) for _ in range(count)]

    def words(self, size: int = 6) -> Iterator[str]:
        """Made-up words of so many letters, each once."""
        seen, letters = set(), np.array(list(string.ascii_lowercase))
        while True:
            word = "".join(self.random.choice(letters, size))
            if word not in seen:
                seen.add(word)
                yield word


def passkey(s: Setting) -> Draft:
    """One number of five digits (after arXiv 2305.16300)."""
    (key,) = s.numbers(1, 5)
    needle = f"The pass key is {key}. Remember it."
    intro = "There is a pass key hidden in the text below. Find it and remember it."
    return s.haystack(intro, [(s.depth, needle)], "\nWhat is the pass key? The pass key is", [key])


def multi_key(s: Setting) -> Draft:
    """Four numbers with a key each, one asked for; the others lie anywhere."""
    names, numbers = s.names(4), s.numbers(4, 7)
    return _needles(s, names, numbers, asked=names[:1], answers=numbers[:1])


def multi_query(s: Setting) -> Draft:
    """Four numbers with a key each, all asked for; depth is that of the first, the rest lie
    anywhere."""
    names, numbers = s.names(4), s.numbers(4, 7)
    return _needles(s, names, numbers, asked=names, answers=numbers)


def multi_value(s: Setting) -> Draft:
    """Four numbers with one key, all asked for, in the order of the text; depth is that of one of
    them."""
    (name,), numbers = s.names(1), s.numbers(4, 7)
    return _needles(s, [name] * 4, numbers, asked=[name], answers=None)


def _needles(s: Setting, names, numbers, *, asked, answers) -> Draft:
    depths = [s.depth, *s.random.random(len(names) - 1)]
    texts = [
        f"One of the special magic numbers for {name} is: {number}."
        for name, number in zip(names, numbers, strict=True)
    ]
    order = np.argsort(depths, kind="stable")
    answers = [numbers[i] for i in order] if answers is None else answers
    one = len(answers) == 1
    kind = f"special magic number{'' if one else 's'} for {', '.join(asked)}"
    question = f"\nThe {kind} mentioned in the text above {'is' if one else 'are'}:"
    intro = "Some special magic numbers are hidden in the text below. Remember them."
    return s.haystack(intro, [(depths[i], texts[i]) for i in order], question, answers)


def key_value(s: Setting) -> Draft:
    """Lines of two words and a number of four digits; one is asked for by its words."""
    count = min(s.length // 4 + 2, len(ADJECTIVES) * len(NOUNS))
    return _list(s, s.names(count), s.numbers(count, 4))


def key_value_uuid(s: Setting) -> Draft:
    """Lines of a UUID and its value, a UUID; one is asked for (after arXiv 2307.03172)."""
    count = s.length // 16 + 2
    return _list(s, s.uuids(count), s.uuids(count))


def _list(s: Setting, keys: list[str], values: list[str]) -> Draft:
    (line, *others) = [f"{key}: {value}" for key, value in zip(keys, values, strict=True)]

    def render(n: int) -> str:
        at = round(s.depth * n)
        return "\n".join([*others[:at], line, *others[at:n]])

    return Draft(render, f"\n{keys[0]}:", (values[0],), len(others))


def copy(s: Setting) -> Draft:
    """A line of random words after a marker, to be repeated from its fifth word on."""
    words = list(s.random.choice(sorted({*ADJECTIVES, *NOUNS}), 20, replace=False))
    marker, head, rest = "The secret words are:", " ".join(words[:4]), " ".join(words[4:])
    needle = f"{marker} {head} {rest}."
    intro = "A list of secret words is hidden in the text below. Remember it."
    question = f"\nRepeat the secret words. {marker} {head}"
    return s.haystack(intro, [(s.depth, needle)], question, [rest])


def variables(s: Setting) -> Draft:
    """A number handed on over four hops; depth is that of the first assignment, the others follow
    evenly until the end. All five variables are asked for."""
    words = s.words(5)
    names, (number,) = [next(words).upper() for _ in range(5)], s.numbers(1, 5)
    texts = [f"VAR {names[0]} = {number}."]
    texts += [f"VAR {b} = VAR {a}." for a, b in itertools.pairwise(names)]
    depths = [s.depth + (1 - s.depth) * i / 4 for i in range(5)]
    question = f"\nThe five variables above that have the value {number} are:"
    intro = "Remember the variables in the text below and what is assigned to them."
    needles = list(zip(depths, texts, strict=True))
    return s.haystack(intro, needles, question, names, once=False)


def frequent_words(s: Setting) -> Draft:
    """Made-up words whose counts fall with the square of their rank; the first rank is `...`, the
    three after it are asked for."""
    source = s.words()
    words = ["...", *(next(source) for _ in range(1000))]
    share = 1.0 / np.arange(1, len(words) + 1) ** 2
    order = _evenly(share / share.sum(), s.length)
    shuffle = int(s.random.integers(2**32))

    def render(n: int) -> str:
        mixed = np.random.default_rng([shuffle, n]).permutation(order[: n + 40])
        return "Count the made-up words in the text below.\n" + " ".join(words[i] for i in mixed)

    question = "\nThe three most frequent words in the text above, dots left out, are:"
    return Draft(render, question, tuple(words[1:4]), len(order) - 40, once=False)


def _evenly(share: np.ndarray, count: int) -> np.ndarray:
    """Ranks in such an order that every start of it holds each about as often as its share says."""
    # The k-th time of rank r is due at (k - 1/2) / share[r].
    due = [(np.arange(max(1, int(p * count) + 1)) + 0.5) / p for p in share]
    ranks = np.repeat(np.arange(len(share)), [len(d) for d in due])
    return ranks[np.argsort(np.concatenate(due), kind="stable")][:count]


def common_words(s: Setting) -> Draft:
    """Ten made-up words thirty times each, among others that come three times; the ten are asked
    for."""
    source = s.words()
    common = [next(source) for _ in range(10)]
    rare = [next(source) for _ in range(s.length // 3 + 1)]
    shuffle = int(s.random.integers(2**32))

    def render(n: int) -> str:
        words = common * 30 + rare[:n] * 3
        mixed = np.random.default_rng([shuffle, n]).permutation(len(words))
        return "Count the words in the list below.\n" + " ".join(words[i] for i in mixed)

    question = "\nThe ten most common words in the list above are:"
    return Draft(render, question, tuple(common), len(rare), once=False)
