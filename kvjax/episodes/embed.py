"""Embedders: from texts to unit vectors, which is all that clustering and routing look at."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from kvjax.core.errors import InputError
from kvjax.models.decoder import Params
from kvjax.models.minilm import MiniLM
from kvjax.models.tokenizer import Tokenizer

Embedder = Callable[[Sequence[str]], npt.ArrayLike]
"""Texts to `[n, D]`. Any function will do: `embed` below scales what it gives to unit length."""


def embed(embedder: Embedder, texts: Sequence[str]) -> np.ndarray:
    """Unit vectors float32 `[n, D]` of the texts: the embedder's own, checked, then scaled.

    Raises:
      InputError: another shape, a value that is not finite, a vector of length 0.

    Example:
      >>> embed(lambda texts: [[3.0, 4.0] for _ in texts], ["tea"])
      array([[0.6, 0.8]], dtype=float32)
    """
    vectors = np.asarray(embedder(list(texts)), np.float32)
    if vectors.ndim != 2 or len(vectors) != len(texts):
        raise InputError(
            "embeddings",
            got=f"shape {vectors.shape} for {len(texts)} texts",
            expected=f"({len(texts)}, D)",
            fix="return one row per text",
        )
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    bad = ~np.isfinite(lengths[:, 0]) | (lengths[:, 0] == 0)
    if bad.any():
        raise InputError(
            f"embedding of text {int(bad.argmax())}",
            got="a vector that is not finite or is zero",
            expected="a direction",
            fix=f"look at the text {texts[int(bad.argmax())][:60]!r} and at the embedder",
        )
    return vectors / lengths


def minilm(folder_or_name: str = "minilm") -> Embedder:
    """all-MiniLM-L6-v2, D = 384: the sentence embedder that is fetched by `kvjax models fetch`.

    Source: EpiCache's embedder "sentence"; the paper's best one is Qwen3-Embedding, which scores
    2.2 points more (arXiv 2509.17396, table 2).
    """
    return MiniLM.load(folder_or_name).embed


def of_model(params: Params, tokenizer: Tokenizer) -> Embedder:
    """A language model's own input embeddings, averaged over the tokens of a text, D = d_model.

    Needs no second model, and knows words but not their order. BOS is left out: it would be the
    same in all.

    Source: EpiCache's embedder "llm" (arXiv 2509.17396, table 2: 4.6 points behind MiniLM).
    """

    def vectors(texts: Sequence[str]) -> np.ndarray:
        ids = [tokenizer.encode(text, bos=False) for text in texts]
        used, where = np.unique(np.concatenate([[0], *ids]).astype(np.int32), return_inverse=True)
        padded = np.zeros(1 << (len(used) - 1).bit_length(), np.int32)  # few shapes, few gathers
        padded[: len(used)] = used
        rows = np.asarray(params.embed[jnp.asarray(padded)], np.float32)
        out = np.zeros((len(texts), rows.shape[1]), np.float32)
        at = 1
        for row, tokens in enumerate(ids):
            if tokens:
                out[row] = rows[where[at : at + len(tokens)]].mean(0)
            at += len(tokens)
        return out

    return vectors
