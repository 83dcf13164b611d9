"""Attention-aware keys: the coordinates that queries look at get the bits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.calibrate.klt import (
    LLOYD_MAX_ERROR,
    TRELLIS_ERROR,
    allocate,
    allocate_layers,
    blocks,
    metric_klt,
    mix,
    shrink,
)
from kvjax.calibrate.moments import Moments
from kvjax.codecs import (
    Centered,
    Codebook,
    Dropped,
    Linear,
    Matrix,
    Normalized,
    Rotary,
    RotaryMean,
    Tiers,
    Trellis,
    rotated,
)
from kvjax.codecs.normalized import Gain
from kvjax.core.codec import Codec
from kvjax.core.errors import InputError
from kvjax.core.method import Method
from kvjax.core.rng import fold

Leaf = Literal["trellis", "lloyd_max"]
Mean = Literal["rotary", "after_rope", "pre_rope"]
Metric = Literal["queries", "predictions"]

# Of the Gram of the queries in a metric of predictions, which some thousand drawn labels leave
# noisy. KL of SmolLM2 with exact values at 0.2, 1 and 5: 0.0065, 0.0071, 0.0083.
SHRINK = 0.2


def klt(
    bits: float,
    moments: Moments,
    *,
    rng: jax.Array,
    leaf: Leaf = "trellis",
    mean: Mean = "rotary",
    metric: Metric = "queries",
    by_layer: bool = False,
    mixed: bool = True,
    choices: Sequence[int] | None = None,
    key_gain: Gain = "unbiased",
    value_gain: Gain = "unbiased",
    value_bits: float | None = None,
) -> tuple[Method, ...]:
    """One method per layer, from calibration.

        keys:   mean apart -> metric KLT -> widths by reverse water-filling -> a rotation of the
                coordinates of each width -> one length per token
        values: TurboQuant, or its trellis form, at `bits`

    Args:
      bits: mean width of key coordinates, in whole bits per vector; lengths come on top.
      value_bits: mean width of values, `bits` if None. A fraction gives the first channels, after
        the rotation any of them, a bit more.
      leaf: "trellis" runs paths along the tokens of a page for keys and along channels for values;
        "lloyd_max" is scalar.
      mean: "rotary" takes out the mean before RoPE, at each position turned; "after_rope" the plain
        mean of the keys. "pre_rope" takes out the first and codes the keys as they were before
        RoPE, see `Rotary`.
      metric: errors of keys cost what they do to logits ("queries": the Gram of the queries), or
        what they do to the model's predictions ("predictions": Fisher information, from
        `measure_sensitivity`).
      by_layer: layers that matter more get more bits, and `bits` is their mean; wants the metric of
        predictions, in which layers can be compared.
      mixed: see `mix`. choices: the widths of key coordinates that are allowed, see `allocate`.
      key_gain, value_gain: see `Normalized`; that of keys counts errors as the queries do.

    Differs from what is published: see docs/results-log.md for where each part comes from. Values
    are not allocated: dropped directions bias every output, and cost nine times what they save.
    """
    if by_layer and metric == "queries":
        raise InputError(
            "widths by layer",
            got="metric='queries'",
            expected="a metric in which layers can be compared",
            fix="use metric='predictions'",
        )
    layers, _, d = moments.shape
    value_bits = bits if value_bits is None else value_bits
    transform = metric_klt(key_cost(moments, metric, mean), key_covariance(moments, mean))
    errors = TRELLIS_ERROR if leaf == "trellis" else LLOYD_MAX_ERROR
    if by_layer:
        widths = allocate_layers(transform.weight, bits, errors=errors, choices=choices)
    else:
        widths = (allocate(transform.weight, bits, errors=errors, choices=choices),) * layers
    if mixed:
        transform = mix(transform, widths, rng=fold(rng, "key"))
    value = value_codec(value_bits, d, leaf, value_gain, fold(rng, "value"))
    per_head = lambda a: jnp.asarray(a, jnp.float32)[:, None]  # [h, 1, ...]
    methods = []
    for layer in range(layers):
        weight = per_head(transform.weight[layer][:, None])  # [h, 1, 1, d]
        inner = _coded(widths[layer], weight, leaf, key_gain)
        matrix = Matrix(per_head(transform.forward[layer]), per_head(transform.inverse[layer]))
        key = without_mean(moments, layer, mean, Linear(matrix, inner))
        methods.append(Method(key, value, name=f"klt-{bits:g}"))
    return tuple(methods)


def key_covariance(moments: Moments, mean: Mean) -> np.ndarray:
    """`[l, h, d, d]`: of keys about that mean, shrunk where few tokens were seen."""
    if mean == "pre_rope":
        cov = _measured(moments.key_cov_pre_rope)
    else:
        cov = moments.key_cov_pre if mean == "rotary" else moments.key_cov
    return shrink(cov, moments.tokens)


def without_mean(moments: Moments, layer: int, mean: Mean, inner: Codec) -> Codec:
    """`inner` on the keys of a layer less their mean, before RoPE or after it."""
    per_head = lambda a: jnp.asarray(a[layer], jnp.float32)[:, None, None]  # [h, 1, 1, d]
    frequencies = jnp.asarray(moments.frequencies[layer], jnp.float32)
    if mean == "rotary":
        return RotaryMean(per_head(moments.key_mean_pre), frequencies, inner)
    if mean == "pre_rope":
        return Rotary(frequencies, Centered(per_head(moments.key_mean_pre), inner))
    return Centered(per_head(moments.key_mean), inner)


def key_cost(moments: Moments, metric: Metric, mean: Mean = "rotary") -> np.ndarray:
    """`[l, h, d, d]`: what errors of keys cost, in that metric."""
    queries, fisher = moments.query_gram, moments.key_fisher
    if mean == "pre_rope":
        queries = _measured(moments.query_gram_pre_rope)
    if metric == "queries":
        return queries
    if fisher is None:
        raise InputError(
            "calibration",
            got="no sensitivities",
            expected="what errors of keys do to predictions",
            fix="calibrate with --gradients",
        )
    if mean == "pre_rope":
        fisher = _measured(moments.key_fisher_pre_rope)
    size = lambda a: np.trace(a, axis1=-2, axis2=-1)[..., None, None]
    return fisher + SHRINK * queries * (size(fisher) / size(queries))


def _measured(moment: np.ndarray | None) -> np.ndarray:
    if moment is None:
        raise InputError(
            "calibration",
            got="no moments of queries and keys before RoPE, as older ones",
            expected="those that methods called pre-rope are fitted to",
            fix="calibrate again",
        )
    return moment


def _coded(widths: tuple[int, ...], weight: jax.Array, leaf: Leaf, gain: Gain) -> Codec:
    """A length per token over the coded coordinates, and their widths; the rest is dropped."""
    kept = int(np.count_nonzero(widths))
    if not kept:
        return Dropped()
    coded = Normalized(_tiers(widths[:kept], leaf), gain=gain, metric=weight[..., :kept])
    if kept == len(widths):
        return coded
    return Tiers((coded, Dropped()), (kept, len(widths) - kept))


def value_codec(bits: float, d: int, leaf: Leaf, gain: Gain, rng: jax.Array) -> Codec:
    """TurboQuant, or its trellis form, with the first channels a bit wider if `bits` is broken."""
    low = math.floor(bits)
    more = round((bits - low) * d)
    if not 1 <= low <= 5 - bool(more) or abs(low + more / d - bits) > 1e-6:
        raise InputError(
            "value bits",
            got=bits,
            expected="1 to 5, a whole number of bits per vector",
            fix="choose such a width",
        )
    inner: Codec = _tiers((low + 1,) * more + (low,) * (d - more), leaf)
    if not more and leaf == "trellis":
        inner = Trellis(low, std=d**-0.5)
    return rotated("hadamard", d, Normalized(inner, gain=gain), rng=rng)


def _tiers(widths: tuple[int, ...], leaf: Leaf) -> Tiers:
    """Leaves for unit vectors, one per run of equal widths. Trellis paths go along the tokens:
    blocks are short."""
    d, runs = len(widths), blocks(widths)

    def code(bits: int) -> Codec:
        if leaf == "trellis":
            return Trellis(bits, std=d**-0.5, axis="tokens")
        return Codebook.lloyd_max(d, bits)

    return Tiers(tuple(code(b) for b, _ in runs), tuple(count for _, count in runs))
