"""OSCAR's rotations: eigenbases of second moments, mixed by a Hadamard matrix and shuffled.

Everything here is float64 numpy on the host, in OSCAR's row convention `k' = k R`; `transform`
turns a result into what `Linear` takes. Second moments are uncentred, of queries, keys and values
after RoPE.
"""

from __future__ import annotations

import functools
from typing import Literal, get_args

import jax.numpy as jnp
import numpy as np

from kvjax.codecs import Orthogonal
from kvjax.core.errors import InputError

Composition = Literal[
    "plain", "pbr", "br", "br_h128", "r_h", "h_pbr", "h_r_pbr", "h_pbr_r", "r_h_pbr"
]

# The factors of each, from left to right: r is U, h is H, p is P.
_FACTORS: dict[str, str] = {
    "plain": "r",
    "pbr": "p",
    "br": "rp",
    "br_h128": "rph",
    "r_h": "rh",
    "h_pbr": "hp",
    "h_r_pbr": "hrp",
    "h_pbr_r": "hpr",
    "r_h_pbr": "rhp",
}


def oscar_rotation(gram: np.ndarray, composition: Composition = "r_h_pbr") -> np.ndarray:
    """The rotation of OSCAR for a second moment: by default `R = U H P`.

        gram = U diag(ev) U^T, ev ascending;  H: Sylvester's matrix / sqrt(d);
        P = I[:, perm],  perm[br[i]] = argsort(ev, descending)[i],  br: bits of i reversed

    Column j of `X P` is column perm[j] of X. With ev ascending perm is `d - 1 - br`, the same for
    all data. At one group per token P changes nothing: minima, maxima and order statistics do not
    see the order of channels.

    Args:
      gram: `[..., d, d]`, symmetric. For keys the moment of the queries that read them, for values
        `value_gram` or `proxy_value_gram`; one per KV head ("V2"), or of all heads by `pooled`
        ("V1"). Its scale does not matter.
      composition: which factors, by the names of the released script; U is r in them.
    Returns:
      `[..., d, d]` float64, orthogonal. The signs of the columns of U are LAPACK's choice, so two
      machines may differ in them.
    Raises:
      InputError: an unknown composition, a gram that is not square, finite and symmetric, or a d
        that is no power of two.

    Source: OSCAR, arXiv 2605.17757, and its released script.

    Example:
      >>> gram = np.diag([3.0, 1.0, 4.0, 2.0])
      >>> (oscar_rotation(gram, "plain").argmax(0) + 1).tolist()  # channels by rising weight
      [2, 4, 1, 3]
      >>> abs(oscar_rotation(gram)).tolist()[0]
      [0.5, 0.5, 0.5, 0.5]
    """
    if composition not in get_args(Composition):
        raise InputError(
            "composition",
            got=repr(composition),
            expected=f"one of {get_args(Composition)}",
            fix="name one of them",
        )
    gram = _symmetric(gram)
    d = gram.shape[-1]
    factors = {
        "r": np.linalg.eigh(gram)[1],
        "h": sylvester(d),
        "p": np.eye(d)[:, d - 1 - bit_reversal(d)],
    }
    product = functools.reduce(np.matmul, [factors[f] for f in _FACTORS[composition]])
    return np.broadcast_to(product, gram.shape).copy()


def residual_rotation(gram: np.ndarray, error: np.ndarray) -> np.ndarray:
    """OSCAR's "uresidual": the directions that matter most go where the quantizer errs least.

        gram = U_Q diag(h) U_Q^T,  error = U_E diag(e) U_E^T,  R = U_Q Pi U_E^T

    with Pi pairing the largest h with the smallest e. It is the one variant that acts on errors
    that are not white; the logit error it predicts, `trace(error R^T gram R)`, is the least of all
    rotations.

    Args:
      gram: `[..., d, d]`, as of `oscar_rotation`.
      error: `[..., d, d]`, the second moment of `x_hat - x` in the coordinates that the quantizer
        sees, measured once with a reference rotation.

    Source: the released script of arXiv 2605.17757, where it is off by default.
    Differs from the paper: written for row vectors, so it is the transpose of `U_E Pi U_Q^T`.
    """
    _, important = np.linalg.eigh(_symmetric(gram, any_size=True))
    _, noisy = np.linalg.eigh(_symmetric(error, any_size=True))
    return important[..., ::-1] @ noisy.swapaxes(-1, -2)  # both ascending: one of them reversed


def pooled(gram: np.ndarray) -> np.ndarray:
    """One moment per layer, the mean over KV heads: `[..., h, d, d] -> [..., d, d]` (OSCAR's V1).

    Heads that differ suffer from it: WikiText perplexity of Qwen3-30B-A3B rises by 16.6 % with one
    rotation per layer and by 0.35 % with one per KV head (OSCAR's report, not measured here).
    """
    return np.asarray(gram, np.float64).mean(-3)


def value_gram(scores: np.ndarray, v: np.ndarray) -> np.ndarray:
    """The moment of attention outputs, `C_S = V^T S^T S V / rows`: the paper's target for values.

    Args:
      scores: `[..., s, t]` softmax probabilities; rows are the queries of all heads of a group.
      v: `[..., t, d]`.

    Source: arXiv 2605.17757; `proxy_value_gram` is what the released script computes instead.
    """
    out = np.asarray(scores, np.float64) @ np.asarray(v, np.float64)  # [..., s, d]
    return out.swapaxes(-1, -2) @ out / out.shape[-2]


def proxy_value_gram(k: np.ndarray, v: np.ndarray, query_gram: np.ndarray) -> np.ndarray:
    """What OSCAR's script computes for values, without softmax or mask:

        w_t = k_t^T G_q k_t, scaled to a mean of 1;   C_S = V^T diag(w) V / t

    Args:
      k, v: `[..., t, d]`, of one KV head.
      query_gram: `[..., d, d]`, the mean of `q^T q` over the queries of that head.

    Source: the released script of arXiv 2605.17757 ("sst").
    """
    k, v, query_gram = (np.asarray(a, np.float64) for a in (k, v, query_gram))
    w = ((k @ query_gram) * k).sum(-1)  # [..., t]
    w = w / np.maximum(w.sum(-1, keepdims=True), 1e-12)
    return (v * w[..., None]).swapaxes(-1, -2) @ v


def transform(rotation: np.ndarray) -> Orthogonal:
    """The `Transform` of a rotation in row convention: `forward(x)` is `x R`.

    Args:
      rotation: `[d, d]`, or `[h, d, d]` for one per KV head.
    Raises:
      InputError: another shape, or `R^T R` off the identity by 0.005 or more.

    Example:
      >>> transform(np.eye(64)[[np.arange(64)] * 8]).matrix.shape
      (8, 1, 64, 64)
    """
    rotation = np.asarray(rotation, np.float64)
    d = rotation.shape[-1] if rotation.ndim in (2, 3) else 0
    off = defect(rotation) if d and rotation.shape[-2] == d else np.inf
    if not off < 5e-3:
        raise InputError(
            "rotation",
            got=f"shape {rotation.shape}, off orthogonal by {off:.2g}",
            expected="an orthogonal [d, d] or [h, d, d]",
            fix="fit it again, or use Matrix for other maps",
        )
    matrix = rotation.swapaxes(-1, -2)  # ours computes y = A x of columns
    return Orthogonal(jnp.asarray(matrix if matrix.ndim == 2 else matrix[:, None], jnp.float32))


def defect(rotation: np.ndarray) -> float:
    """The largest entry of `|R^T R - I|`; NaN where R has one."""
    eye = np.eye(rotation.shape[-1])
    return float(abs(rotation.swapaxes(-1, -2) @ rotation - eye).max())


def sylvester(d: int) -> np.ndarray:
    """The Hadamard matrix of Sylvester over sqrt(d): orthogonal and symmetric."""
    index = np.arange(_power_of_two(d))
    parity = np.bitwise_count(index[:, None] & index) % 2
    return (1.0 - 2.0 * parity) / np.sqrt(d)


def bit_reversal(d: int) -> np.ndarray:
    """`[d]`: the numbers below d with their log2(d) bits reversed.

    Example:
      >>> bit_reversal(8).tolist()
      [0, 4, 2, 6, 1, 5, 3, 7]
    """
    bits = _power_of_two(d).bit_length() - 1
    index = np.arange(d)
    return sum((((index >> b) & 1) << (bits - 1 - b) for b in range(bits)), np.zeros(d, int))


def _symmetric(gram: np.ndarray, any_size: bool = False) -> np.ndarray:
    gram = np.asarray(gram, np.float64)
    square = gram.ndim >= 2 and gram.shape[-1] == gram.shape[-2]
    turned = gram.swapaxes(-1, -2) if square else gram
    size = abs(gram).max(initial=0)
    if not (square and np.isfinite(size) and (abs(gram - turned) <= 1e-6 * size).all()):
        raise InputError(
            "gram",
            got=f"shape {gram.shape}, largest entry {size:.3g}",
            expected="a symmetric, finite [..., d, d]",
            fix="sum x^T x over the rows, in float64",
        )
    if not any_size:
        _power_of_two(gram.shape[-1])
    return (gram + turned) / 2


def _power_of_two(d: int) -> int:
    if d < 1 or d & (d - 1):
        raise InputError(
            "head_dim", got=d, expected="a power of two", fix="use another transform, as Hadamard"
        )
    return d
