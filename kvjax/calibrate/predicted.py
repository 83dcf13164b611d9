"""What logit error a codec of keys should have, from second moments alone; and the least there is.

For keys that are normal with the measured moments, errors follow from formulas: `codec_error` has
one for each kind of codec on the ladder from TurboQuant to the bound (`kvjax.calibrate.rungs`).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Protocol

import jax.numpy as jnp
import numpy as np

from kvjax.calibrate.klt import TRELLIS_ERROR
from kvjax.codecs import (
    Centered,
    Codebook,
    Dropped,
    Linear,
    Normalized,
    RotaryMean,
    Tiers,
    Trellis,
    distortion,
    lloyd_max,
)
from kvjax.codecs.normalized import Gain
from kvjax.core.codec import Codec
from kvjax.core.errors import InputError
from kvjax.core.method import Method


class KeyMoments(Protocol):
    """The part of `Moments` that logit errors depend on; l layers, h KV heads, d channels."""

    @property
    def query_gram(self) -> np.ndarray: ...  # [l, h, d, d]
    @property
    def key_mean(self) -> np.ndarray: ...  # [l, h, d]
    @property
    def key_cov(self) -> np.ndarray: ...  # [l, h, d, d]
    @property
    def key_cov_pre(self) -> np.ndarray: ...  # [l, h, d, d]


def signal(moments: KeyMoments) -> np.ndarray:
    """`[l, h]`: the variance of logits, `E (q . (k - mean))^2`."""
    return _cost(moments.query_gram, moments.key_cov)


def bound_db(moments: KeyMoments, bits: float) -> np.ndarray:
    """`[l, h]`: the least logit error at `bits` per coordinate, in dB of the logit variance.

    No normal keys with these moments can be coded better after RoPE, and no others are harder.
    Their mean is free, before RoPE or after it: of the two, the one that leaves less. A codec that
    undoes RoPE (`Rotary`) has other moments, and another bound.

    Raises:
      InputError: bits that are not positive.
    """
    covs = moments.key_cov, moments.key_cov_pre
    least = np.minimum(*(least_error(moments.query_gram, cov, bits) for cov in covs))
    return _db(least / signal(moments))


def least_error(metric: np.ndarray, cov: np.ndarray, bits: float) -> np.ndarray:
    """Reverse water-filling, exactly: the rate-distortion function of a normal vector.

        D = sum_i min(theta, lambda_i),   mean_i max(0, log2(lambda_i / theta) / 2) = bits

    with lambda the eigenvalues of metric times covariance.

    Args:
      metric, cov: `[..., d, d]`. bits: per coordinate.
    Returns:
      `[...]`, the error `E e^T metric e`.

    Example:
      >>> round(float(least_error(np.eye(4), np.diag([16.0, 4.0, 1.0, 0.01]), 0.75)), 6)
      3.01
    """
    if not bits > 0:
        raise InputError("bits", got=bits, expected="a positive rate", fix="choose 2, say")
    value, vector = np.linalg.eigh(metric)
    half = (vector * np.sqrt(np.maximum(value, 0))[..., None, :]) @ vector.swapaxes(-1, -2)
    weight = np.maximum(np.linalg.eigvalsh(half @ cov @ half), 1e-300)  # [..., d]
    log = np.log2(weight) / 2
    low, high = log.min(-1) - bits, log.max(-1)
    for _ in range(100):
        level = (low + high) / 2
        enough = np.maximum(log - level[..., None], 0).mean(-1) > bits
        low, high = np.where(enough, level, low), np.where(enough, high, level)
    return np.minimum(4.0 ** high[..., None], weight).sum(-1)


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What a codec of keys is given, in its own coordinates; h KV heads.

    Attributes:
      metric, cov: `[h, d, d]`, what errors cost and how inputs vary. mean: `[h, d]`.
    """

    metric: np.ndarray
    cov: np.ndarray
    mean: np.ndarray

    @property
    def second(self) -> np.ndarray:
        """`[h, d, d]`: the second moment about zero."""
        return self.cov + self.mean[:, :, None] * self.mean[:, None]


def predicted_db(methods: Sequence[Method], moments: KeyMoments) -> np.ndarray | None:
    """`[l, h]`: logit error over logit variance of methods as they are built, in dB.

    For normal keys with these moments, errors common to all tokens left out. None where no formula
    here applies to the codec of the keys.

    Args:
      methods: one per layer. moments: of the tokens to predict for; those of calibration, or of
        the very tokens that are measured, which tells what is owed to the text.

    Example:
      >>> import kvjax, types
      >>> eye, zero = np.eye(64)[None, None], np.zeros((1, 1, 64))
      >>> white = types.SimpleNamespace(
      ...     query_gram=eye, key_mean=zero, key_cov=eye, key_cov_pre=eye
      ... )
      >>> predicted_db([kvjax.methods.get("turboquant-2", head_dim=64)], white).round(1)
      array([[-9.4]])
    """
    layers = []
    for layer, method in enumerate(methods):
        codec, cov = method.key, moments.key_cov[layer]
        mean = moments.key_mean[layer]
        if isinstance(codec, RotaryMean):
            codec, cov, mean = codec.inner, moments.key_cov_pre[layer], 0 * mean
        error = codec_error(codec, Inputs(moments.query_gram[layer], cov, mean))
        if error is None:
            return None
        layers.append(error)
    return _db(np.array(layers) / signal(moments))


def codec_error(codec: Codec, x: Inputs) -> np.ndarray | None:
    """`[h]`: `E e^T metric e` of normal inputs, centred over tokens; None for other codecs."""
    match codec:
        case Centered():
            mean = x.mean - np.asarray(codec.mean, np.float64).reshape(-1, x.mean.shape[-1])
            return codec_error(codec.inner, dataclasses.replace(x, mean=mean))
        case Linear():
            return codec_error(codec.inner, _moved(codec, x))
        case Normalized(inner=Codebook() | Trellis(axis="channels"), search=1):
            return _one_width_error(codec, x)
        case Normalized(inner=Tiers(), search=1):
            return _allocated_error(codec, x)
        case Tiers(codecs=(Normalized(inner=Tiers(), search=1) as coded, Dropped())):
            return _allocated_error(coded, x)
    return None


def _moved(codec: Linear, x: Inputs) -> Inputs:
    """The inputs of the inner codec."""
    eye = jnp.eye(x.mean.shape[-1])
    rows = lambda a: np.asarray(a, np.float64).reshape(-1, *eye.shape)  # [h or 1, d, d]
    forward, inverse = rows(codec.transform.forward(eye)), rows(codec.transform.inverse(eye))
    return Inputs(
        inverse @ x.metric @ inverse.swapaxes(-1, -2),
        forward.swapaxes(-1, -2) @ x.cov @ forward,
        (x.mean[:, None] @ forward)[:, 0],
    )


def _one_width_error(codec: Normalized, x: Inputs) -> np.ndarray | None:
    """A length per token and one width c for coordinates that a rotation has made alike.

        x_hat = s ((1 - c) x + w),   w normal to x, of energy c (1 - c) |x|^2 in all directions

    With a plain gain s = 1 and the error is `c^2 tr(A C) + c (1 - c) W`; an unbiased one has
    s = 1 / (1 - c) and the error `c / (1 - c) W`, where

        W = (tr A tr M - tr(A M)) / (d - 1),   C the covariance, M the second moment

    Plain gains leave the length off by a little, other for each token. Codes of one token tell
    little of another's only if the two point elsewhere. Where keys keep their mean they do not, and
    the part of both that tokens share is free: `_shared`.
    """
    d = x.mean.shape[-1]
    found = _scalar_errors(codec.inner, d)
    if found is None:
        return None
    c, scale = found[0], _scale(codec.gain, found[0])
    trace = lambda a: np.trace(a, axis1=-2, axis2=-1)
    along = _cost(x.metric, x.second)
    white = (trace(x.metric) * trace(x.second) - along) / (d - 1)
    noise, length = c * (1 - c), 0.0
    if isinstance(codec.inner, Codebook):
        noise, length = (noise * left for left in _unshared(codec.inner.bits, x))
        noise = noise - length / d  # that much of the energy lies along the token
    error = (1 - scale * (1 - c)) ** 2 * _cost(x.metric, x.cov) + scale**2 * noise * white
    return error if codec.gain == "unbiased" else error + length * along / d


def _allocated_error(codec: Normalized, x: Inputs) -> np.ndarray | None:
    """A length per token and widths of their own for coordinates that do not correlate.

    Coordinate i comes back as `s ((1 - c_i) z_i + w_i)`; those past the last width are dropped.
    The unbiased gain s of a metric makes each token's error normal to the token, so that of the
    noise in i the share of i in `sum metric z^2` goes away: nearly all of it where one coordinate
    is all that counts.
    """
    d, errors = x.mean.shape[-1], _scalar_errors(codec.inner, x.mean.shape[-1])
    if errors is None:
        return None
    kept = len(errors)
    weight = np.ones((1, kept)) if codec.metric is None else np.asarray(codec.metric, np.float64)
    energy = np.diagonal(x.second, axis1=-2, axis2=-1)  # [h, d]
    share = _shares(weight.reshape(-1, kept) * energy[:, :kept])  # [h, kept]
    bias = (share * errors).sum(-1, keepdims=True)
    scale = _scale(codec.gain, bias)
    left = np.ones((len(energy), d))  # what of each coordinate is not in the reconstruction
    left[:, :kept] = 1 - scale * (1 - errors)
    noise = scale**2 * errors * (1 - errors) * energy[:, :kept].mean(-1, keepdims=True)
    if codec.gain != "none":
        noise = noise * (1 - share)
    cost = np.diagonal(x.metric, axis1=-2, axis2=-1)[:, :kept]
    return _cost(x.metric, left[:, :, None] * x.cov * left[:, None]) + (cost * noise).sum(-1)


def _scalar_errors(codec: Codec, d: int) -> np.ndarray | None:
    """Errors of coordinates of variance 1: `[1]`, or `[kept]` for tiers; None if not known."""
    match codec:
        case Trellis():
            return np.array([TRELLIS_ERROR[codec.bits]])
        case Codebook() if np.allclose(codec.levels, lloyd_max(d, codec.bits), rtol=1e-5):
            return np.array([distortion(d, codec.bits)])
        case Tiers():
            kept = sum(codec.sizes)
            parts = [_scalar_errors(inner, kept) for inner in codec.codecs]
            known = [part for part in parts if part is not None]
            if len(known) == len(parts):
                return np.repeat(np.concatenate(known), codec.sizes)
    return None


def _scale(gain: Gain, c):
    """What the gain does to reconstructions that are too short by c."""
    return {"none": 1.0, "least_squares": 1.0, "norm": (1 - c) ** -0.5, "unbiased": 1 / (1 - c)}[
        gain
    ]


def _shares(weight: np.ndarray) -> np.ndarray:
    """`E[w_i z_i^2 / sum_j w_j z_j^2]` of standard normal z; `[..., d]`, along d they add to 1.

    The integral over s of `w_i / (1 + 2 w_i s) prod_j (1 + 2 w_j s)^(-1/2)`.
    """
    weight = weight / weight.sum(-1, keepdims=True)
    grid = np.linspace(-18, 18, 600)  # log s
    s = np.exp(grid)[:, None]
    factors = 1 + 2 * weight[..., None, :] * s  # [..., 600, d]
    density = np.exp(-0.5 * np.log(factors).sum(-1, keepdims=True)) * s
    shares = (weight[..., None, :] / factors * density).sum(-2)
    return shares / shares.sum(-1, keepdims=True)


def _unshared(bits: int, x: Inputs) -> tuple[np.ndarray, np.ndarray]:
    """`[h]` each: which part of the energy of w a token does not share with others, on average over
    pairs of tokens; and the variance of lengths over that energy, so far as not shared.

    After a random rotation a coordinate of both tokens is a pair of normal values that correlate by
    the cosine between the tokens. What nearest levels make of it is odd and steep: nothing is
    shared at cosine 0, and all at 1. Cosines are those of 256 normal vectors.
    """
    d = x.mean.shape[-1]
    value, vector = np.linalg.eigh(x.cov)
    root = np.sqrt(np.maximum(value, 0))[:, None] * vector
    tokens = np.random.default_rng(0).normal(size=(256, d)) @ root.swapaxes(-1, -2)
    tokens = tokens + x.mean[:, None]  # [h, 256, d]
    size = np.linalg.norm(tokens, axis=-1)
    products = size[:, :, None] * size[:, None]
    cosine = np.clip(tokens @ tokens.swapaxes(-1, -2) / np.maximum(products, 1e-300), -1, 1)
    products = products * (1 - np.eye(256))  # of two tokens, not of one with itself
    roots, noise, length = _shared_tables(bits)
    at = lambda table: np.interp(np.sqrt(1 - abs(cosine)), roots, table)
    mean = lambda shared: (products * shared).sum((1, 2)) / 255 / (size**2).sum(-1)
    whole = noise[0]
    return 1 - mean(np.sign(cosine) * at(noise)) / whole, (length[0] - mean(at(length))) / whole


@functools.cache
def _shared_tables(bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Covariances of two tokens at correlation r of their coordinates z, over `sqrt(1 - r)`: of
    Lloyd-Max's Q(z) less its linear part, and of `z Q(z)` less its part in z^2, which the length
    fixes."""
    levels = np.array(lloyd_max(None, bits))
    edges, steps = (levels[1:] + levels[:-1]) / 2, np.diff(levels)
    x = np.linspace(-7, 7, 561)
    normal = lambda t: np.exp(-(t**2) / 2)
    density = normal(x) / normal(x).sum()
    below = np.vectorize(lambda t: 0.5 * (1 + math.erf(t / math.sqrt(2))))
    q = levels[np.searchsorted(edges, x)]
    linear, square = (density * q * x).sum(), (density * q * x * (x**2 - 1)).sum() / 2
    roots = np.linspace(0, 1, 65)
    noise, length = [], []
    for root in roots:
        r = 1 - root**2
        at = math.sqrt(r) * x[:, None] - edges  # of the part in common, to each edge
        over = below(at / root) if root else (at > 0).astype(float)
        steep = normal(at / root) / math.sqrt(2 * math.pi) if root else 0 * at
        mean = levels[0] + (steps * over).sum(-1)  # of Q, given the part in common
        product = math.sqrt(r) * x * mean + root * (steps * steep).sum(-1)
        noise.append((density * mean**2).sum() - linear**2 * r)
        length.append((density * product**2).sum() - linear**2 - 2 * square**2 * r**2)
    return roots, np.array(noise), np.array(length) - length[-1]


def _cost(metric: np.ndarray, cov: np.ndarray) -> np.ndarray:
    """tr(metric cov)."""
    return np.einsum("...ij,...ji->...", metric, cov)


def _db(ratio: np.ndarray) -> np.ndarray:
    return 10 * np.log10(np.maximum(ratio, 1e-300))
