"""A prompt of its own judges the cache: what it attends to stays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, get_args

import jax.numpy as jnp

from kvjax.core.codec import Array
from kvjax.core.errors import InputError
from kvjax.core.pytree import pytree, static
from kvjax.policies.policy import Policy, Seen, columns

Reduce = Literal["max", "mean", "sum"]

Encode = Callable[[str], Sequence[int]]  # text to token ids, without special tokens

FIRST = "\n\nRepeat the previous context exactly."
LATER = "\n\nRepeat the part of the previous context exactly, starting with"
CATALYST = "Summarize the previous context highlighting the most important parts."


@pytree
class Probe(Policy):
    """Attention that the queries of a probe pay to the cache:

        s_j = max over probe queries i and query heads of  softmax_j(q_i . k)

    with the softmax over the kept tokens of the head alone, not the probe's own. Which method it
    is depends on the prompt: KVzip asks to repeat the block (`repeat_prompt`), InfiniPot for a
    summary (`catalyst_prompt`), EpiCache feeds the medoids of an episode.

    Args:
      reduce: "max"; "sum" or "mean" over queries, of the mean over query heads.
      remember: a token keeps the best verdict of all probes so far, where the prompt differs from
        block to block (KVzip): else old tokens are judged by a prompt that repeats the newest
        block, and lose.

    Source: EpiCache, arXiv 2509.17396, eq. 3 (max); KVzip, arXiv 2505.23416 (max); InfiniPot's
    catalyst prompt, arXiv 2410.01518 ("sum").
    Differs from the papers: KVzip's softmax also holds the repeated text, causally, and of the
    cache only the sinks and the block that is repeated.

    Raises:
      InputError: another `reduce`.

    Example:
      >>> sorted(Probe(remember=True).needs)
      ['probe']
    """

    needs: ClassVar[frozenset[str]] = frozenset({"probe"})

    reduce: Reduce = static(default="max")
    remember: bool = static(default=False)

    def __post_init__(self):
        if self.reduce not in get_args(Reduce):
            raise InputError(
                "reduce", got=repr(self.reduce), expected="max, mean or sum", fix="name one of them"
            )

    @property
    def notes(self) -> Literal["verdict"] | None:
        return "verdict" if self.remember else None

    def observe(self, seen: Seen) -> tuple[Array, Any]:
        if not self.remember:
            return seen.mass, seen.memory
        return jnp.maximum(seen.mass, self._verdict(seen)), seen.memory

    def score(self, seen: Seen) -> Array:
        return seen.mass if self.remember else self._verdict(seen)

    def _verdict(self, seen: Seen) -> Array:
        paid = columns(seen)
        if self.reduce == "max":
            return paid.peak
        return paid.total / jnp.maximum(paid.queries, 1) if self.reduce == "mean" else paid.total


def repeat_prompt(
    encode: Encode,
    block: Sequence[int],
    previous: Sequence[int] = (),
    *,
    answer: Sequence[int] = (),
    tail: int = 8,
) -> list[int]:
    """KVzip's probe: the request to repeat a block, and the block as if it were the answer.

    Args:
      encode: text to token ids, without special tokens.
      block: tokens of the block that is judged.
      previous: tokens of the block before, none for the first. Its last `tail` tokens tell where
        to start.
      answer: tokens that end the user's turn and open the assistant's, as the model's chat
        template has them.
    Returns:
      Token ids of the probe.

    Source: arXiv 2505.23416, prompts of its code; blocks of about 2000 tokens there.

    Example:
      >>> words = lambda text: [len(word) for word in text.split()]
      >>> repeat_prompt(words, [100, 101], [7, 8, 9], tail=2)
      [6, 3, 4, 2, 3, 8, 7, 8, 8, 4, 8, 9, 100, 101]
    """
    start = list(previous)[max(0, len(previous) - tail) :]
    return [*encode(LATER if len(previous) else FIRST), *start, *answer, *block]


def catalyst_prompt(encode: Encode, *, answer: Sequence[int] = ()) -> list[int]:
    """InfiniPot's probe, the same after every block: the request for a summary.

    Source: arXiv 2410.01518; wording of EpiCache's code.
    Differs from the paper: InfiniPot also keeps tokens by their novelty, -log P(token).

    Example:
      >>> len(catalyst_prompt(str.split))
      9
    """
    return [*encode(CATALYST), *answer]
