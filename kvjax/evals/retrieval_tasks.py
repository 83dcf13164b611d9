"""Synthetic retrieval tasks: needles, key-value lists, copying, variables, frequent words.

The needles, chains and frequent words are those of RULER (arXiv 2404.06654). Differs from the
paper: prompts are for models that continue a text; filler, words and numbers are drawn here; the
context ends with a whole sentence; lengths count the answer, not a budget for its generation.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable

import numpy as np

from kvjax.core.errors import InputError, known
from kvjax.evals import retrieval_drafts as drafts
from kvjax.evals.haystack import NOISE, Encoder, Sample, fit, sentences_of, to_tokens

TASKS: dict[str, Callable[[drafts.Setting], drafts.Draft]] = {
    "passkey": drafts.passkey,
    "multi_key": drafts.multi_key,
    "multi_value": drafts.multi_value,
    "multi_query": drafts.multi_query,
    "key_value": drafts.key_value,
    "key_value_uuid": drafts.key_value_uuid,
    "copy": drafts.copy,
    "variables": drafts.variables,
    "frequent_words": drafts.frequent_words,
    "common_words": drafts.common_words,
}
DEPTHLESS = ("frequent_words", "common_words")  # their words are everywhere


def build(
    task: str,
    tokenizer: Encoder,
    *,
    length: int,
    depth: float | None,
    seed: int = 0,
    filler: str | None = None,
) -> Sample:
    """A sample of at most `length` tokens; one more unit of filler would be too much.

    Args:
      task: a name of `TASKS`.
      length: tokens of context (with BOS), question and answer together.
      depth: 0 (the needle comes first) to 1 (last); None for the tasks in `DEPTHLESS`.
      seed: the same seed is the same sample; other lengths and depths draw anew.
      filler: a text whose sentences surround the needle, from one of them on and around again;
        None repeats RULER's noise. Lists and frequent words are their own filler.
    Raises:
      InputError: an unknown task, a depth that does not fit it, a length too short for what is
        hidden, a filler too short for the length, or one that holds the answer.

    Example:
      >>> sample = build("passkey", tokenizer, length=4096, depth=0.5)  # doctest: +SKIP
    """
    if task not in TASKS:
        raise InputError("task", got=repr(task), expected=known(TASKS), fix="use one of these")
    _check_depth(task, depth)
    if length < 1:
        raise InputError("length", got=f"{length} tokens", expected="1 or more", fix="raise it")
    name = f"{task} {length} {depth}"
    random = np.random.default_rng([seed, zlib.crc32(name.encode())])
    sentences = list(NOISE) * (length // len(NOISE) + 1)
    if filler is not None:
        sentences = sentences_of(filler)
        first = int(random.integers(max(1, len(sentences))))
        sentences = sentences[first:] + sentences[:first]
    draft = TASKS[task](drafts.Setting(random, depth or 0.0, sentences, length))
    sample = Sample("", draft.question, draft.answers, task, depth, length)
    _, question, answer = to_tokens(tokenizer, sample)
    context = fit(
        draft.render,
        lambda text: len(tokenizer.encode(text)) + len(question) + len(answer),
        length,
        draft.most,
    )
    for text in draft.answers:
        if draft.once and context.count(text) != 1:
            raise InputError(
                "filler",
                got=f"a text that holds the answer {text!r} too",
                expected="the answer in the needle only",
                fix="use another seed or another text",
            )
    return Sample(context, draft.question, draft.answers, task, depth, length)


def _check_depth(task: str, depth: float | None) -> None:
    fits = depth is None if task in DEPTHLESS else depth is not None and 0 <= depth <= 1
    if not fits:
        raise InputError(
            "depth",
            got=depth,
            expected=f"None for {task}" if task in DEPTHLESS else "a number from 0 to 1",
            fix="choose where the needle goes" if task not in DEPTHLESS else "leave it out",
        )
