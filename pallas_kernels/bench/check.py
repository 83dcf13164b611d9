"""Whether a format's numbers are right, before anything is said of its speed."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels._call import Backend
from pallas_kernels.arg_specs import Spec
from pallas_kernels.packed import Packed, unpack
from pallas_kernels.packed_decode import packed_decode, packed_decode_reference

Array = jax.Array

SPREAD = 2.0  # standard deviation of logits over tokens: so that keys matter, and many tokens do
# Largest error of outputs, in units of the largest output. Operands of a product are rounded, to 11
# bits of codes' queries and weights and to 8 of bf16's.
TOLERANCE = {"codes": 4e-3, "bf16": 2e-2}


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What was found: errors by what they were measured against, and whether they are too large."""

    errors: dict[str, float]
    tolerance: float

    @property
    def reason(self) -> str | None:
        """Why the format is not measured, or None."""
        bad = {k: e for k, e in self.errors.items() if not e <= self.tolerance}
        told = ", ".join(f"{e:.2g} against {name}" for name, e in bad.items())
        return f"WRONG NUMBERS: error {told}, beyond {self.tolerance:g}" if bad else None


def check(spec: Spec, backend: Backend) -> Verdict:
    """A ragged batch of two sequences of these codes, against float64 and against the reference.

    Args:
      spec: of two sequences.
    """
    args = spec.arrays(np.random.default_rng(1))
    args["q"] = args["q"] * sharpness(args["q"], args["key"])
    args["lengths"] = jnp.array([spec.tokens - 5, spec.tokens // 3 + 1], jnp.int32)
    got = jax.jit(lambda args: packed_decode(**args, **spec.options, backend=backend))(args)
    errors = {
        "float64": _error(got, _attention(args, spec.tokens)),
        "the reference": _error(got, _reference(args)),
    }
    return Verdict(errors, tolerance(spec))


def check_last(spec: Spec, args: dict[str, Any], out: Array) -> Verdict:
    """The last sequence of the last layer of what is measured, where offsets are largest, against
    the reference. Without a window.

    Args:
      out: `[b, h, g, d]`, what the kernel made of it.
    """
    one = {**args, "q": args["q"][-1:], "lengths": args["lengths"][-1:]}
    for side in ("key", "value"):
        rows = slice(None) if spec.paged else slice(-1, None)
        one[side] = jax.tree.map(lambda a, r=rows: a if a.ndim == 1 else a[-1:, r], args[side])
    if spec.paged:
        one["table"] = args["table"][-1:]
    right = np.asarray(_reference(one)[0], np.float64)
    return Verdict({"the reference": _part(out[-1:], right)}, tolerance(spec))


def tolerance(spec: Spec) -> float:
    """Of a pair of formats."""
    return TOLERANCE["bf16" if "bf16" in (spec.key, spec.value) else "codes"]


def sharpness(q: Array, key: Packed) -> float:
    """What to multiply queries with for logits that differ by `SPREAD` from token to token, judged
    by the first page."""
    pool = key[0].blocks[0].words[0].ndim == 5
    cut = (slice(1), slice(1)) if pool else (slice(1), slice(1), slice(None), 0)
    page = jax.tree.map(lambda a: a if a.ndim == 1 else a[cut], key)
    return SPREAD / float(_spread(q[0], page))


@jax.jit
def _spread(q: Array, page: Packed) -> Array:
    keys = unpack(_layer(page))[0]  # [h, t, d]
    return jnp.einsum("hgd,htd->hgt", q, keys).std(-1).mean()


def _layer(packed: Packed) -> Packed:
    return jax.tree.map(lambda a: a if a.ndim == 1 else a[0], packed)


@jax.jit
def _reference(args: dict[str, Any]) -> tuple[Array, Array]:
    with jax.default_matmul_precision("highest"):
        return packed_decode_reference(**args)


def _attention(args: dict[str, Any], tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Softmax attention in float64, from the formula."""
    keys, values = (np.asarray(unpack(_layer(args[s])), np.float64) for s in ("key", "value"))
    if "table" in args:
        at = np.asarray(args["table"])
        keys, values = (np.moveaxis(x[at], 1, 2) for x in (keys, values))
    keys, values = (x.reshape(*x.shape[:2], -1, x.shape[-1]) for x in (keys, values))
    logits = np.einsum("bhgd,bhtd->bhgt", np.asarray(args["q"], np.float64), keys)
    unseen = np.arange(keys.shape[2]) >= np.asarray(args["lengths"])[:, None]
    logits = np.where(unseen[:, None, None], -np.inf, logits)
    top = logits.max(-1, keepdims=True)
    p = np.exp(logits - top)
    total = p.sum(-1, keepdims=True)
    out = np.einsum("bhgt,bhtd->bhgd", p / total, values)
    return out, (top + np.log(total))[..., 0]


def _error(got, want) -> float:
    """The larger error of outputs, in units of the largest, and of half the log-sum-exp."""
    lse = np.abs(np.asarray(got[1], np.float64) - np.asarray(want[1], np.float64)).max() / 2
    return _part(got[0], want[0], float(lse))


def _part(out, right, other: float = 0.0) -> float:
    """The error of outputs, in units of the largest, or another that is larger; NaN is infinite."""
    out, right = (np.asarray(x, np.float64) for x in (out, right))
    worst = float(np.max([np.abs(out - right).max() / np.abs(right).max(), other]))
    return worst if np.isfinite(worst) else float("inf")
