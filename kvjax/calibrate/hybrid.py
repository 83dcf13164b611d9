"""Attention-aware keys: the coordinates that queries look at get the bits."""

from __future__ import annotations

import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.calibrate.klt import LLOYD_MAX_ERROR, TRELLIS_ERROR, allocate, blocks, metric_klt, mix
from kvjax.calibrate.moments import Moments
from kvjax.codecs import (
    Centered,
    Codebook,
    Dropped,
    Linear,
    Matrix,
    Normalized,
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
Mean = Literal["rotary", "after_rope"]
Metric = Literal["queries", "predictions"]


def klt(
    bits: float,
    moments: Moments,
    *,
    rng: jax.Array,
    leaf: Leaf = "trellis",
    mean: Mean = "rotary",
    metric: Metric = "queries",
    mixed: bool = True,
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
        mean of the keys.
      metric: errors of keys cost what they do to logits ("queries": the Gram of the queries), or
        what they do to the model's predictions ("predictions": Fisher information, from
        `measure_sensitivity`).
      mixed: see `mix`.
      key_gain, value_gain: see `Normalized`; that of keys counts errors as the queries do.

    Differs from what is published: see docs/results-log.md for where each part comes from. Values
    are not allocated: dropped directions bias every output, and cost nine times what they save.
    """
    layers, _, d = moments.shape
    value_bits = bits if value_bits is None else value_bits
    cov = moments.key_cov_pre if mean == "rotary" else moments.key_cov
    transform = metric_klt(_cost(moments, metric), cov)
    errors = TRELLIS_ERROR if leaf == "trellis" else LLOYD_MAX_ERROR
    widths = allocate(transform.weight, bits, errors=errors)
    if mixed:
        transform = mix(transform, widths, rng=fold(rng, "key"))
    value = _value(value_bits, d, leaf, value_gain, fold(rng, "value"))
    per_head = lambda a: jnp.asarray(a, jnp.float32)[:, None]  # [h, 1, ...]
    methods = []
    for layer in range(layers):
        weight = per_head(transform.weight[layer][:, None])  # [h, 1, 1, d]
        inner = _coded(widths, weight, leaf, key_gain)
        key: Codec = Linear(
            Matrix(per_head(transform.forward[layer]), per_head(transform.inverse[layer])), inner
        )
        if mean == "rotary":
            frequencies = jnp.asarray(moments.frequencies[layer], jnp.float32)
            key = RotaryMean(per_head(moments.key_mean_pre[layer][:, None]), frequencies, key)
        else:
            key = Centered(per_head(moments.key_mean[layer][:, None]), key)
        methods.append(Method(key, value, name=f"klt-{bits:g}"))
    return tuple(methods)


def _cost(moments: Moments, metric: Metric) -> np.ndarray:
    if metric == "queries":
        return moments.query_gram
    if moments.key_fisher is None:
        raise InputError(
            "calibration",
            got="no sensitivities",
            expected="what errors of keys do to predictions",
            fix="calibrate with --gradients",
        )
    return moments.key_fisher


def _coded(widths: tuple[int, ...], weight: jax.Array, leaf: Leaf, gain: Gain) -> Codec:
    """A length per token over the coded coordinates, and their widths; the rest is dropped."""
    kept = int(np.count_nonzero(widths))
    coded = Normalized(_tiers(widths[:kept], leaf), gain=gain, metric=weight[..., :kept])
    if kept == len(widths):
        return coded
    return Tiers((coded, Dropped()), (kept, len(widths) - kept))


def _value(bits: float, d: int, leaf: Leaf, gain: Gain, rng: jax.Array) -> Codec:
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
