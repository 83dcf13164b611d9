"""Retrieval in long contexts: the samples of all tasks, lengths and depths, scored one by one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from kvjax.core.errors import InputError
from kvjax.evals.haystack import Encoder, Sample, to_tokens
from kvjax.evals.retrieval_runner import Runner
from kvjax.evals.retrieval_tasks import DEPTHLESS, build


def score(
    samples: Iterable[Sample], runner: Runner, *, tokenizer: Encoder, method: str = ""
) -> list[dict[str, Any]]:
    """A row per sample.

    `exact`: 1 if greedy decoding would give the whole answer, else 0. `token_accuracy`: share of
    answer tokens that greedy decoding gives when all before them are right. `nll`: nats per answer
    token.

    Raises:
      InputError: a runner's arrays that do not fit the answer, or that are not log-probabilities.
    """
    rows = []
    for sample in samples:
        context, question, answer = to_tokens(tokenizer, sample)
        log_probs, greedy = map(np.asarray, runner(context, question, answer))
        if log_probs.shape != (len(answer),) or greedy.shape != (len(answer),):
            raise InputError(
                "runner",
                got=f"arrays of shape {log_probs.shape} and {greedy.shape}",
                expected=f"two of shape ({len(answer)},), one number per answer token",
                fix="return the scores of the answer tokens only",
            )
        if not (log_probs <= 1e-5).all():  # NaN too
            raise InputError(
                "runner",
                got="log-probabilities above 0, or NaN",
                expected="natural logarithms of probabilities",
                fix="normalize the logits over the vocabulary",
            )
        rows.append(
            {
                "method": method,
                "task": sample.task,
                "length": sample.length,
                "depth": sample.depth,
                "tokens": len(context) + len(question) + len(answer),
                "answer_tokens": len(answer),
                "exact": float(greedy.all()),
                "token_accuracy": float(greedy.mean()),
                "nll": float(-log_probs.mean()),
            }
        )
    return rows


def run(
    tasks: Sequence[str],
    lengths: Sequence[int],
    depths: Sequence[float],
    samples: int,
    runner: Runner,
    *,
    tokenizer: Encoder,
    method: str = "",
    filler: str | None = None,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Rows of `score` for all tasks, lengths and depths.

    All methods get the same samples. Tasks without a depth are asked once per length.

    Args:
      samples: per cell. method: written into the rows. filler, seed: as of `build`.
    Raises:
      InputError: what `build`, `score` or the runner refuses, before anything is run where that
        can be told from the samples.
    """
    if samples < 1 or not (tasks and lengths and depths):
        raise InputError(
            "retrieval",
            got=f"{samples} samples of {len(tasks)} tasks, {len(lengths)} lengths, "
            f"{len(depths)} depths",
            expected="at least one of each",
            fix="ask for something",
        )
    made = [
        build(task, tokenizer, length=length, depth=depth, seed=seed + i, filler=filler)
        for task in tasks
        for length in lengths
        for depth in ((None,) if task in DEPTHLESS else depths)
        for i in range(samples)
    ]
    return score(made, runner, tokenizer=tokenizer, method=method)
