"""The ladder from TurboQuant to the limit, and the recipes for two of its rungs.

Between TurboQuant and the rate-distortion bound lie a few ideas, one more on each rung: the mean of
the keys taken out, a transform that knows the queries, bits by importance, trellis codes. What each
should err is in `kvjax.calibrate.predicted`; `kvjax limits` holds it against what is measured.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.calibrate.hybrid import Leaf, Mean, key_covariance, value_codec, without_mean
from kvjax.calibrate.klt import metric_klt
from kvjax.calibrate.moments import Moments
from kvjax.codecs import (
    Codebook,
    Hadamard,
    Linear,
    Matrix,
    Normalized,
    Trellis,
    rotated,
)
from kvjax.codecs.normalized import Gain
from kvjax.core.method import Method
from kvjax.core.rng import fold

LADDER = ("turboquant", "centred", "balanced", "klt-lloyd-max", "klt")  # from the worst to the best


def centred(
    bits: int,
    moments: Moments,
    *,
    rng: jax.Array,
    leaf: Leaf = "lloyd_max",
    mean: Mean = "rotary",
    gain: Gain = "unbiased",
) -> tuple[Method, ...]:
    """TurboQuant on keys without their mean, one method per layer; values as in `klt`.

        keys: mean apart -> randomized Hadamard -> one length per token, one width

    Args:
      mean: see `klt`. gain: of keys and values, see `Normalized`.

    Source: TurboQuant (arXiv 2504.19874) with a mean shift as OptR's (arXiv 2608.02691).
    """
    layers, _, d = moments.shape
    key = rotated("hadamard", d, _one_width(bits, d, leaf, gain), rng=fold(rng, "key"))
    value = value_codec(bits, d, leaf, gain, fold(rng, "value"))
    keys = (without_mean(moments, layer, mean, key) for layer in range(layers))
    return tuple(Method(key, value, name=f"centred-{bits}") for key in keys)


def balanced(
    bits: int,
    moments: Moments,
    *,
    rng: jax.Array,
    leaf: Leaf = "lloyd_max",
    mean: Mean = "rotary",
    gain: Gain = "unbiased",
) -> tuple[Method, ...]:
    """The best of all invertible transforms for a single width, one method per layer.

        keys: mean apart -> T = Q Lam^(-1/4) V^T S^(1/2) -> one length per token, one width

    with `S^(1/2) C S^(1/2) = V Lam V^T` as in `metric_klt` and Q a randomized Hadamard: half of
    what whitens keys, and half of what whitens queries. Values as in `klt`.

    Q is multiplied into T, so it costs nothing.

    Source: WUSH-KV, written for keys; damping as in `metric_klt`.
    Differs from the paper: the mean apart, Lloyd-Max levels and a length per token in place of a
    uniform grid.
    """
    layers, _, d = moments.shape
    basis = metric_klt(moments.query_gram, key_covariance(moments, mean))
    q = np.asarray(Hadamard.random(d, rng=fold(rng, "key")).forward(jnp.eye(d)), np.float64).T
    scale = basis.weight**0.25  # [l, h, d]
    forward = q @ (scale[..., None] * basis.forward)
    inverse = (basis.inverse / scale[..., None, :]) @ q.T
    per_head = lambda a: jnp.asarray(a, jnp.float32)[:, None]  # [h, 1, d, d]
    value = value_codec(bits, d, leaf, gain, fold(rng, "value"))
    methods = []
    for layer in range(layers):
        matrix = Matrix(per_head(forward[layer]), per_head(inverse[layer]))
        inner = Linear(matrix, _one_width(bits, d, leaf, gain))
        key = without_mean(moments, layer, mean, inner)
        methods.append(Method(key, value, name=f"balanced-{bits}"))
    return tuple(methods)


Rung = Callable[[Moments, jax.Array], tuple[Method, ...]]


def _rung(recipe: Callable[..., tuple[Method, ...]], bits: int) -> Rung:
    return lambda moments, rng: recipe(bits, moments, rng=rng)


RUNGS: dict[str, Rung] = {
    **{f"centred-{b}": _rung(centred, b) for b in (2, 3, 4)},
    **{f"balanced-{b}": _rung(balanced, b) for b in (2, 3, 4)},
}


def _one_width(bits: int, d: int, leaf: Leaf, gain: Gain) -> Normalized:
    code = Trellis(bits, std=d**-0.5) if leaf == "trellis" else Codebook.lloyd_max(d, bits)
    return Normalized(code, gain=gain)
