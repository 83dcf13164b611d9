"""A name for the weights of a model that the weights themselves give."""

from __future__ import annotations

import dataclasses
import hashlib

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.models.decoder import Params

_SAMPLE = 256  # numbers of a matrix or vector that are looked at, at most


def fingerprint(params: Params) -> str:
    """SHA-256, 16 hex digits, over shapes and an even sample of every leaf of every layer.

    At most 256 numbers of a matrix or vector are looked at: enough to tell checkpoints apart
    (fine-tuning moves nearly all weights), not to see an edit of single rows. Numbers are rounded
    to bf16 first and layers taken one by one, so that a checkpoint has the same fingerprint in
    float32 and bf16 and however its layers are grouped.

    Example:
      >>> from kvjax.models.load import load
      >>> fingerprint(load("smollm2-135m").params)  # doctest: +SKIP
      '1293b07844eb9edc'
    """
    digest = hashlib.sha256()

    def add(name: str, layer: int, sample: np.ndarray, shape: tuple[int, ...]) -> None:
        digest.update(f"{name} {layer} {shape};".encode())
        digest.update(np.ascontiguousarray(sample).view(np.uint16).astype("<u2").tobytes())

    for name in ("embed", "final_norm", "head"):
        leaf = getattr(params, name)
        if leaf is not None:
            add(name, 0, _sample(leaf), leaf.shape)
    for name in [field.name for field in dataclasses.fields(params.runs[0])]:
        layer = 0
        for run in params.runs:
            leaf = getattr(run, name)
            for one in () if leaf is None else _sample(leaf, kept=1):
                add(name, layer, one, leaf.shape[1:])
                layer += 1
    return digest.hexdigest()[:16]


def _sample(leaf: jax.Array, kept: int = 0) -> np.ndarray:
    """Every so many of the last axes, all of the first `kept`, in bf16 on the host."""
    most = round(_SAMPLE ** (1 / (leaf.ndim - kept)))  # along each axis
    steps = [slice(None)] * kept + [slice(None, None, -(-n // most)) for n in leaf.shape[kept:]]
    return np.asarray(leaf[tuple(steps)].astype(jnp.bfloat16))
