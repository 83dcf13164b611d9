"""What goes into a generation, checked and padded before anything is traced."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from kvjax.core.errors import InputError


def token_counts(
    prompts: Sequence[Sequence[int]], *, vocab: int | None = None, what: str = "prompt"
) -> np.ndarray:
    """Lengths of prompts, int32 `[b]`.

    Args:
      vocab: tokens that the model has an embedding for; None does not look at the ids.
      what: the name that a mistake is told by.
    Raises:
      InputError: no prompt, or one without tokens; what is no list of ids, or an id that the
        model does not know (its embedding would be another token's).

    Example:
      >>> token_counts([[5, 6, 7], [8]], vocab=100)
      array([3, 1], dtype=int32)
    """
    if not len(prompts) or any(np.ndim(p) == 1 and not len(p) for p in prompts):
        raise InputError(what, got="no tokens", expected="at least one", fix="give some text")
    for row, prompt in enumerate(prompts):
        ids = np.asarray(prompt)
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise InputError(
                what,
                got=f"{ids.dtype} of shape {ids.shape} as sequence {row}",
                expected="a list of token ids for each sequence",
                fix="encode the text; one prompt is [ids]",
            )
        if vocab is not None and not 0 <= ids.min() <= ids.max() < vocab:
            wrong = ids[(ids < 0) | (ids >= vocab)][0]
            raise InputError(
                what,
                got=f"token {wrong} in sequence {row}",
                expected=f"0 to {vocab - 1}, the tokens of the model",
                fix="use the tokenizer that belongs to it",
            )
    return np.array([len(p) for p in prompts], np.int32)


def pad_rows(rows: Sequence[Sequence[int]], width: int) -> np.ndarray:
    """Ragged rows as int32 `[b, width]`, zeros after each.

    Example:
      >>> pad_rows([[5, 6], [7]], 3)
      array([[5, 6, 0],
             [7, 0, 0]], dtype=int32)
    """
    out = np.zeros((len(rows), width), np.int32)
    for padded, row in zip(out, rows, strict=True):
        padded[: len(row)] = row
    return out


def check_sampling(max_new: int, temperature: float, rng: jax.Array | None, block: int) -> None:
    """Raises `InputError` for numbers that make no sense, and for samples without a key."""

    def refuse(what: str, got: Any, expected: str, fix: str):
        raise InputError(what, got=got, expected=expected, fix=fix)

    if max_new < 1:
        refuse("max_new", max_new, "1 token or more", "ask for so many")
    if block < 1:
        refuse("block", block, "1 token or more", "256 is the default")
    if not 0 <= temperature < math.inf:
        refuse("temperature", temperature, "0 or more, and finite", "0 takes the best token")
    if temperature > 0 and rng is None:
        refuse("rng", "none", "a key to draw tokens with", "give rng=jax.random.key(seed)")
