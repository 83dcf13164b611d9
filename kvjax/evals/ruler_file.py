"""Samples from files that RULER's own generator wrote."""

from __future__ import annotations

import json
import os
from pathlib import Path

from kvjax.core.errors import InputError
from kvjax.evals.haystack import Encoder, Sample, to_tokens


def read_ruler(
    path: str | os.PathLike,
    tokenizer: Encoder,
    *,
    length: int | None = None,
    limit: int | None = None,
) -> list[Sample]:
    """Samples of a `.jsonl` file with a row `{"input", "outputs"}` per line (arXiv 2404.06654).

    The last line of `input`, and the `answer_prefix` if a row has one, is the question; all before
    it is the context, as far as a cache may be compressed before it knows what is asked. The task
    is the name of the file, the depth where the first answer begins in the context (in characters),
    None if it is not in there. All outputs are asked for, one after the other; files whose outputs
    are other words for one answer (RULER's `qa`) do not fit.

    Args:
      length: what the samples say of their length, to put rows together; None counts the tokens.
      limit: rows to read; None is all.
    Raises:
      InputError: a file that cannot be read, a line that is no such row.
    """
    source = Path(path).expanduser()
    try:
        lines = source.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"file {path}", got=error, expected="a readable .jsonl file", fix="check the path"
        ) from None
    numbered = [(i, line) for i, line in enumerate(lines, 1) if line.strip()][:limit]
    samples = [_sample(f"{path}, line {i}", line, source.stem, length or 0) for i, line in numbered]
    if length is not None:
        return samples
    return [_counted(tokenizer, sample) for sample in samples]


def _sample(what: str, line: str, task: str, length: int) -> Sample:
    try:
        row = json.loads(line)
        text, listed = row["input"], row["outputs"]
        answers = tuple(map(str, listed)) if isinstance(listed, list) else ()
        context, question = text.rstrip().rsplit("\n", 1)
    except (ValueError, TypeError, KeyError, AttributeError):
        answers = ()
    if not answers or "" in answers:
        raise InputError(
            what,
            got=repr(line[:40]),
            expected='{"input": context, line end and question, "outputs": a list of answers}',
            fix="write it with RULER's generator, or split it so",
        )
    question = f"\n{question}{row.get('answer_prefix', '')}".rstrip()
    at = context.find(answers[0])
    depth = None if at < 0 else at / len(context)
    return Sample(context, question, answers, task, depth, length)


def _counted(tokenizer: Encoder, sample: Sample) -> Sample:
    tokens = sum(map(len, to_tokens(tokenizer, sample)))
    return Sample(
        sample.context, sample.question, sample.answers, sample.task, sample.depth, tokens
    )
