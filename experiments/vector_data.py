"""Vectors for experiments/vector_search.py: embedded sentences, and synthetic ones."""

from __future__ import annotations

import hashlib

import numpy as np

from kvjax.core.errors import InputError
from kvjax.evals.text import sentences
from kvjax.models import hub
from kvjax.models.minilm import MiniLM


def vectors(name: str, count: int, *, seed: int) -> tuple[str, np.ndarray]:
    """What the data is, and `count` distinct unit vectors `[count, d]` in random order.

    Args:
      name: "minilm", or "clustered-D" and "gaussian-D" for D dimensions.
    """
    rng = np.random.default_rng([seed, 77])
    kind, _, size = name.partition("-")
    if name == "minilm":
        about, x = _minilm(count, rng)
    elif kind in ("clustered", "gaussian") and size.isdigit() and int(size) > 1:
        about, x = f"{name}, numpy seed [{seed}, 77]", rng.normal(size=(count, int(size)))
        if kind == "clustered":  # 100 centres as far apart as the clusters are wide, off the origin
            centres = rng.normal(size=(100, int(size))) + rng.normal(size=int(size))
            x = x + centres[rng.integers(0, len(centres), count)]
    else:
        raise InputError(
            "data",
            got=repr(name),
            expected="minilm, clustered-D or gaussian-D",
            fix="name such data in the config",
        )
    x = x / np.linalg.norm(x, axis=-1, keepdims=True)
    return about, x.astype(np.float32)


def _minilm(count: int, rng: np.random.Generator) -> tuple[str, np.ndarray]:
    """Embeddings of `count` sentences; kept in the cache folder, they take a minute or two."""
    texts = sentences()
    if len(texts) < count:
        raise InputError(
            "vectors",
            got=f"{count} with queries",
            expected=f"at most the {len(texts)} sentences of this Python's documentation",
            fix="ask for fewer",
        )
    chosen = sorted(rng.permutation(len(texts))[:count])
    about = f"all-MiniLM-L6-v2 of {count} of {len(texts)} sentences of Python's documentation"
    kept = hub.home() / "embeddings" / f"minilm_{_fingerprint([texts[i] for i in chosen])}.npy"
    if kept.is_file():
        x = np.load(kept)
    else:
        x = MiniLM.load("minilm").embed([texts[i] for i in chosen])
        kept.parent.mkdir(parents=True, exist_ok=True)
        np.save(kept, x)
    return about, x[rng.permutation(len(x))]


def _fingerprint(texts: list[str]) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]
