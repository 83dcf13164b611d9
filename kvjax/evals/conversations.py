"""Questions about a conversation, asked of caches that have read it: answer-KL, and what it costs.

A reference with every token and the cache under test see the same question and are fed the same
gold answer; their predictions of each of its tokens are compared. Nothing is generated, so a model
too small to answer well still tells how much of the history a cache has lost.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import math
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.cache import Cache, take
from kvjax.core.errors import InputError
from kvjax.core.pytree import pytree
from kvjax.episodes.conversation import Conversation
from kvjax.episodes.prompt import context, question_prompt
from kvjax.episodes.routing import ADVERSARIAL
from kvjax.episodes.segment import WIDTH, evidence_segments
from kvjax.evals.haystack import Encoder
from kvjax.generate.plan import Plan, check_finite, forward_block
from kvjax.models.decoder import Params, logits

Array = jax.Array

ASK = "\nAnswer:"  # between a question and its answer, which begins with a space
HOWS = ("cosine", "dot", "segments")


@dataclasses.dataclass(frozen=True)
class Talk:
    """A conversation and its questions in tokens.

    Attributes:
      history: the conversation, BOS first.
      opening: what all questions begin with: it is read once.
      questions, answers: the rest of each question, and its gold answer.
      evidence: of each question, the segments that answer it.
    """

    conversation: Conversation
    history: tuple[int, ...]
    opening: tuple[int, ...]
    questions: tuple[tuple[int, ...], ...]
    answers: tuple[tuple[int, ...], ...]
    evidence: tuple[tuple[int, ...], ...]

    @property
    def room(self) -> int:
        """Tokens that the longest question and answer add to a cache."""
        pairs = zip(self.questions, self.answers, strict=True)
        return len(self.opening) + max(len(q) + len(a) - 1 for q, a in pairs)

    @property
    def longest(self) -> int:
        """Tokens of the longest answer."""
        return max(map(len, self.answers))

    def targets(self) -> np.ndarray:
        """The answers, int32 `[q, longest]`, zeros behind the shorter ones."""
        out = np.zeros((len(self.answers), self.longest), np.int32)
        for row, answer in zip(out, self.answers, strict=True):
            row[: len(answer)] = answer
        return out


def prefix(conversation: Conversation, tokenizer: Encoder, limit: int) -> Conversation:
    """The longest beginning whose text has at most `limit` tokens, and the questions it answers.

    A question stays where all its evidence has been said by then and it has an answer;
    adversarial ones (category 5 of LoCoMo) go.

    Raises:
      InputError: not one utterance fits, or no question can be answered from what does.
    """
    count = lambda n: len(tokenizer.encode(context(_first(conversation, n))))
    some = bisect.bisect_right(range(1, len(conversation.utterances) + 1), limit, key=count)
    if not some:
        raise InputError(
            conversation.name,
            got=f"a first utterance beyond {limit} tokens",
            expected="a beginning that fits",
            fix="raise the limit",
        )
    cut = _first(conversation, some)
    said = {u.id for u in cut.utterances if u.id}
    questions = tuple(
        q
        for q in conversation.questions
        if q.category != ADVERSARIAL and q.answer and q.evidence and said.issuperset(q.evidence)
    )
    if not questions:
        raise InputError(
            conversation.name,
            got=f"no question that the first {some} utterances answer",
            expected="one or more, with an answer and evidence",
            fix="raise the limit, or choose another conversation",
        )
    return dataclasses.replace(cut, questions=questions)


def _first(conversation: Conversation, count: int) -> Conversation:
    starts = tuple(s for s in conversation.starts if s < max(1, count))
    utterances = conversation.utterances[:count]
    return Conversation(conversation.name, utterances, starts=starts)


def talk(conversation: Conversation, tokenizer: Encoder) -> Talk:
    """A conversation (of `prefix`) and its questions as tokens."""
    encode = lambda text: tuple(tokenizer.encode(text, bos=False))
    asked = [encode(question_prompt(q) + ASK) for q in conversation.questions]
    alike = [len(set(column)) == 1 for column in zip(*(q[:-1] for q in asked), strict=False)]
    shared = (*alike, False).index(False)
    return Talk(
        conversation,
        history=tuple(tokenizer.encode(context(conversation))),
        opening=asked[0][:shared],
        questions=tuple(q[shared:] for q in asked),
        answers=tuple(encode(f" {q.answer}") for q in conversation.questions),
        evidence=tuple(
            evidence_segments(conversation, q.evidence, WIDTH) for q in conversation.questions
        ),
    )


@dataclasses.dataclass(frozen=True)
class Answered:
    """What a model says before each token of some answers.

    Attributes:
      hidden: `[n, longest, D]` float32 after the final norm; meaningless behind shorter answers.
      question_nll: `[n]`, of the question itself, nats per token but the first: how well the cache
        fits the question, whatever its answer.
      seconds: per question and answer, of the fastest batch: where there are several, the first
        has the compiling.
    """

    hidden: np.ndarray
    question_nll: np.ndarray
    seconds: float


def answer(
    plan: Plan,
    params: Params,
    caches: tuple[Cache, ...],
    talk: Talk,
    rows: Sequence[tuple[int, int]],
    *,
    batch: int = 8,
) -> Answered:
    """Teacher-forces answers through forks of caches that have read the history.

    The caches stay as they are: each question goes on from a copy of its sequence.

    Args:
      caches: with room for `talk.room` more tokens.
      rows: (question, sequence of the caches) pairs.
      batch: questions at a time.
    Raises:
      InputError: NaN in a layer's keys or values.
    """
    if talk.opening:
        caches, finite = _open(plan, params, caches, np.asarray(talk.opening, np.int32))
        check_finite(finite)
    fed = [(*q, *a[:-1]) for q, a in zip(talk.questions, talk.answers, strict=True)]
    width = -(-max(map(len, fed)) // 16) * 16
    found, fits, seconds = [], [], []
    for first in range(0, len(rows), batch):
        some = list(rows[first : first + batch])
        some += some[-1:] * (batch - len(some))  # one shape for all batches
        tokens = np.zeros((batch, width), np.int32)
        for row, (question, _) in zip(tokens, some, strict=True):
            row[: len(fed[question])] = fed[question]
        counts = np.array([len(fed[question]) for question, _ in some], np.int32)
        before = np.array([len(talk.questions[question]) - 1 for question, _ in some], np.int32)
        start = time.perf_counter()
        hidden, nll, finite = _forked(
            plan,
            params,
            caches,
            np.array([sequence for _, sequence in some], np.int32),
            tokens,
            counts,
            before,
            talk.longest,
        )
        check_finite(finite)
        found.append(np.asarray(hidden, np.float32))
        fits.append(np.asarray(nll, np.float64))
        seconds.append((time.perf_counter() - start) / batch)
    hidden, nll = (np.concatenate(parts)[: len(rows)] for parts in (found, fits))
    return Answered(hidden, nll, min(seconds))


@jax.jit
def _open(plan: Plan, params: Params, caches, tokens: Array):
    batch = caches[0].length.shape[1]
    return forward_block(plan, params, caches, jnp.tile(tokens, (batch, 1)))[1:]


@functools.partial(jax.jit, static_argnames="longest")
def _forked(plan: Plan, params: Params, caches, sequences, tokens, counts, before, longest):
    """Hidden states `[n, longest, D]` from the last token of each question on (at `before: [n]` of
    `tokens: [n, t]`), NLL of the questions `[n]`, and `finite`."""
    own = tuple(take(cache, sequences) for cache in caches)
    hidden, _, finite = forward_block(plan, params, own, tokens, counts)

    def of_question(inputs):
        hidden, tokens, last = inputs
        log_p = jax.nn.log_softmax(logits(params, plan.config, hidden[:-1]))
        nll = -jnp.take_along_axis(log_p, tokens[1:, None], 1)[:, 0]
        asked = jnp.arange(tokens.shape[0] - 1) < last
        return jnp.where(asked, nll, 0).sum() / jnp.maximum(last, 1)

    nll = jax.lax.map(of_question, (hidden, tokens, before))
    at = jnp.minimum(before[:, None] + jnp.arange(longest), tokens.shape[1] - 1)
    return jnp.take_along_axis(hidden, at[..., None], 1), nll, finite


@pytree
class AnswerScores:
    """Means over the tokens of each answer, `[q]` float64.

    Attributes:
      kl: KL(reference || cache), nats per token.
      nll, full_nll: negative log-likelihood of the gold answer, nats per token.
      same: share of tokens of which both rank the same first.
    """

    kl: np.ndarray
    nll: np.ndarray
    full_nll: np.ndarray
    same: np.ndarray


def compare(
    plan: Plan, params: Params, reference: np.ndarray, ours: np.ndarray, talk: Talk
) -> AnswerScores:
    """Scores of hidden states `[q, longest, D]` of all questions, in their order."""
    numbers = _compared(plan, params, reference, ours, talk.targets())
    real = np.arange(talk.longest) < np.array([len(a) for a in talk.answers])[:, None]
    means = [np.where(real, np.asarray(a, np.float64), 0).sum(1) / real.sum(1) for a in numbers]
    return AnswerScores(*means)


@jax.jit
def _compared(plan: Plan, params: Params, reference: Array, ours: Array, targets: Array):
    def one(inputs):
        reference, ours, targets = inputs
        full, own = (
            jax.nn.log_softmax(logits(params, plan.config, h.astype(params.embed.dtype)))
            for h in (reference, ours)
        )
        pick = lambda lp: -jnp.take_along_axis(lp, targets[:, None], 1)[:, 0]
        kl = (jnp.exp(full) * (full - own)).sum(-1)
        return kl, pick(own), pick(full), full.argmax(-1) == own.argmax(-1)

    return jax.lax.map(one, (reference, ours, targets))


def mean_and_error(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Mean and its standard error over questions (0 for a single one).

    Example:
      >>> mean_and_error([1.0, 3.0])
      (2.0, 1.0)
    """
    x = np.asarray(values, np.float64)
    return float(x.mean()), float(x.std(ddof=1) / math.sqrt(len(x))) if len(x) > 1 else 0.0


def ratio_and_error(
    ours: Sequence[float] | np.ndarray, theirs: Sequence[float] | np.ndarray
) -> tuple[float, float]:
    """Ratio of two means over the same questions, and its standard error (delta method, paired).

    Example:
      >>> ratio_and_error([1.0, 2.0], [2.0, 4.0])
      (0.5, 0.0)
    """
    a, b = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    ratio = float(a.mean() / b.mean())
    return ratio, mean_and_error(a - ratio * b)[1] / float(b.mean())
