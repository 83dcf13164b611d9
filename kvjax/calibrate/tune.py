"""Learned corrections of calibrated keys: gradients through the code, at an unchanged format."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kvjax.calibrate.hybrid import key_cost, key_covariance
from kvjax.calibrate.klt import LLOYD_MAX_ERROR, TRELLIS_ERROR, metric_klt
from kvjax.calibrate.moments import Moments
from kvjax.calibrate.tune_sample import Sample
from kvjax.calibrate.tuned_file import Tuned, key_parts
from kvjax.codecs import Codebook, Normalized, Tiers, Trellis
from kvjax.codecs.rotary_mean import turn
from kvjax.core.codec import Codec
from kvjax.core.errors import InputError
from kvjax.core.method import Method
from kvjax.core.pytree import pytree

Array = jax.Array

RATE = 0.02  # of Adam, in logarithms of scales and standard deviations; it falls to 0 as a cosine


@pytree
class Correction:
    """What is learned for the KV heads of a layer, all zeros where nothing is changed.

        y = mix diag(exp scale) Q(skew) forward (x - R_t (mean + inverse shift))
        x_hat = R_t (mean + inverse shift) + inverse Q^T diag(exp(gain - scale)) mix^T y_hat

    Attributes:
      shift: `[h, d]` of the mean, in standard deviations. skew: `[h, d, d]`, see `cayley`.
      scale, gain: `[h, d]`, logarithms: before the code, and after it.
    """

    shift: Array
    skew: Array
    scale: Array
    gain: Array

    @staticmethod
    def none(heads: int, d: int) -> Correction:
        one = jnp.zeros((heads, d))
        return Correction(one, jnp.zeros((heads, d, d)), one, one)


@pytree
class Layer:
    """The closed form of one layer: where tuning begins, and what errors cost.

    Attributes:
      forward, inverse: `[h, d, d]`, of the metric KLT before coordinates are mixed; mix: what mixes
        them. mean: `[h, d]`. cost: `[h, d, d]`. frequencies: `[d / 2]`.
      code: codes `[h, pages, page, kept]` of the mixed coordinates.
      finer: `[kept]`, errors of the leaves in use over those of the leaves in `code`.
    """

    forward: Array
    inverse: Array
    mix: Array
    mean: Array
    cost: Array
    frequencies: Array
    code: Normalized
    finer: Array


def tune_keys(
    methods: tuple[Method, ...],
    moments: Moments,
    sample: Sample,
    *,
    steps: int = 20,
    rate: float = RATE,
    progress: Callable[[str], None] = lambda message: None,
) -> tuple[Tuned, np.ndarray]:
    """Descends on the loss of `key_loss` for every layer by itself, from the closed form.

    Means, rotations, scales and gains change; widths, leaves and lengths do not, so codes have the
    same shapes and bytes. The trellis searches too slowly for this: Lloyd-Max leaves of the same
    widths take its place, their errors made as small as the trellis has them.

    Args:
      methods: `klt(bits, moments, metric="predictions")`, one per layer.
      sample: keys and weights, from `collect`.
    Returns:
      What `with_tuned` puts into the methods, and losses `[l, 2]`, before and after.
    Raises:
      InputError: methods of another kind, or a loss that is not finite, with its layer.

    Source: mean shifts and rotations learned for cached keys: OptR (arXiv 2608.02691); Cayley
    steps from a good start: SpinQuant (arXiv 2405.16406). Ours: the Fisher metric with weights of
    tokens as the loss, and a closed form as the start.

    Example:
      >>> sample = collect(params, config, windows, moments, rng=rng)  # doctest: +SKIP
      >>> tuned, losses = tune_keys(methods, moments, sample)  # doctest: +SKIP
      >>> with_tuned(methods, tuned)  # doctest: +SKIP
    """
    start = closed_form(methods, moments)
    made, losses = [], np.zeros((len(methods), 2))
    for i, layer in enumerate(start):
        progress(f"tuning, layer {i + 1} of {len(methods)}")
        keys, weights = jnp.asarray(sample.keys[i]), jnp.asarray(sample.weights[i])
        best, found = _descend(layer, keys, weights, steps, rate)
        losses[i] = np.asarray(found)
        if not np.isfinite(losses[i]).all():
            raise InputError(
                f"layer {i}",
                got=f"a loss of {losses[i, 1]} after tuning",
                expected="a finite one",
                fix="check the calibration, or tune with fewer steps",
            )
        made.append(jax.device_get(_matrices(layer, best)))
    return Tuned(*(np.stack(a).astype(np.float32) for a in zip(*made, strict=True))), losses


def closed_form(methods: tuple[Method, ...], moments: Moments) -> list[Layer]:
    """What `klt` made of the moments, taken apart for tuning."""
    cost = key_cost(moments, "predictions")
    plain = metric_klt(cost, key_covariance(moments, "rotary"))
    single = lambda a: jnp.asarray(a, jnp.float32)
    layers = []
    for i, method in enumerate(methods):
        key, linear = key_parts(method)
        mixed = np.asarray(linear.transform.matrix, np.float64)[:, 0]  # type: ignore[attr-defined]
        mix = mixed @ plain.inverse[i]
        if abs(mix @ mix.swapaxes(-1, -2) - np.eye(mix.shape[-1])).max() > 1e-2:
            raise InputError(
                f"method {method.name}",
                got=f"a transform that does not whiten keys of layer {i} in these moments",
                expected="klt(...) of the same moments",
                fix="make the method and the sample from one calibration",
            )
        code, finer = _quick(linear.inner)
        layers.append(
            Layer(
                forward=single(plain.forward[i]),
                inverse=single(plain.inverse[i]),
                mix=single(mix),
                mean=key.mean[:, 0, 0],
                cost=single(cost[i]),
                frequencies=key.frequencies,
                code=code,
                finer=finer,
            )
        )
    return layers


def _quick(inner: Codec) -> tuple[Normalized, Array]:
    """The coded coordinates with Lloyd-Max leaves, and what is left of their errors, `[kept]`."""
    coded = inner.codecs[0] if isinstance(inner, Tiers) else inner
    assert isinstance(coded, Normalized)
    assert isinstance(coded.inner, Tiers)
    leaves, finer = [], []
    for leaf, size in zip(coded.inner.codecs, coded.inner.sizes, strict=True):
        ratio = 1.0
        if isinstance(leaf, Trellis):
            ratio = (TRELLIS_ERROR[leaf.bits] / LLOYD_MAX_ERROR[leaf.bits]) ** 0.5
            leaf = Codebook.lloyd_max(sum(coded.inner.sizes), leaf.bits)
        leaves.append(leaf)
        finer += [ratio] * size
    return dataclasses.replace(coded, inner=Tiers(tuple(leaves), coded.inner.sizes)), jnp.array(
        finer
    )


def cayley(skew: Array) -> Array:
    """The rotation `(1 + A)^-1 (1 - A)` with `A = skew - skew^T`; `[..., d, d]`, zeros give one.

    Example:
      >>> import jax.numpy as jnp
      >>> cayley(jnp.zeros((2, 2)))
      Array([[1., 0.],
             [0., 1.]], dtype=float32)
    """
    a, one = skew - skew.swapaxes(-1, -2), jnp.eye(skew.shape[-1])
    return jnp.linalg.solve(one + a, one - a)


def key_loss(layer: Layer, correction: Correction, keys: Array, weights: Array) -> Array:
    """Fisher-weighted squared errors of coded keys, summed over heads, mean over tokens.

        mean_t w_t e_t^T S e_t,   w_t = 1 / r_t + IMPORTANCE i_t

    with r_t the squared length of the key's rest and i_t that of the gradient on it. A few early
    tokens that everything looks at have most of the gradient, and unusual keys: moments over all
    tokens hardly see them. The rest counts alike.

    Args:
      keys: `[n, h, t, d]` after RoPE, from position 0; weights: `[n, h, t]`, w_t.
    """
    forward, inverse, mean = _matrices(layer, correction)
    keys = keys.swapaxes(0, 1)  # [h, n, t, d]
    angles = jnp.arange(keys.shape[2])[:, None] * layer.frequencies
    rest = keys - turn(mean[:, None, None], angles)
    y = jnp.einsum("hde,hnte->hntd", forward, rest, precision="highest")
    kept = layer.finer.shape[0]
    y_hat = _noisy(layer, y[..., :kept])
    back = jnp.einsum("hdk,hntk->hntd", inverse[..., :kept], y_hat, precision="highest")
    error = back - rest
    cost = jnp.einsum("hntd,hde,hnte->hnt", error, layer.cost, error)
    return (cost * weights.swapaxes(0, 1)).mean((1, 2)).sum()


def _noisy(layer: Layer, y: Array) -> Array:
    """`y: [h, n, t, kept]` decoded, straight through: errors are held fixed but for their length,
    which follows that of the vector, as a code of directions has it."""
    fixed = jax.lax.stop_gradient(y)
    decoded = layer.code.decode(layer.code.encode(fixed))
    length = lambda a: jnp.sqrt(jnp.maximum((a**2).sum(-1, keepdims=True), 1e-20))
    return y + (decoded - fixed) * layer.finer / length(fixed) * length(y)


def _matrices(layer: Layer, correction: Correction) -> tuple[Array, Array, Array]:
    """Forward and inverse `[h, d, d]` and mean `[h, d]`, corrected."""
    product = functools.partial(jnp.matmul, precision="highest")
    rotation = cayley(correction.skew)
    forward = jnp.exp(correction.scale)[..., None] * product(rotation, layer.forward)
    after = jnp.exp(correction.gain - correction.scale)[..., None, :]
    inverse = product(layer.inverse, rotation.swapaxes(-1, -2)) * after
    mean = layer.mean + product(layer.inverse, correction.shift[..., None])[..., 0]
    turned = product(inverse, layer.mix.swapaxes(-1, -2))
    return product(layer.mix, forward), turned, mean


@functools.partial(jax.jit, static_argnums=3)
def _descend(layer: Layer, keys: Array, weights: Array, steps: int, rate: float):
    """The correction after `steps` of Adam, and losses `[2]` before and after."""
    loss = functools.partial(key_loss, layer)
    falling = lambda i: -rate * optax.cosine_decay_schedule(1.0, steps)(i)
    adam = optax.chain(optax.scale_by_adam(), optax.scale_by_schedule(falling))
    # A rotation adds up d small angles per coordinate: its steps are shorter.
    slower = lambda u: dataclasses.replace(u, skew=u.skew / keys.shape[-1] ** 0.5)

    def step(carry, _):
        correction, state = carry
        updates, state = adam.update(jax.grad(loss)(correction, keys, weights), state)
        return (optax.apply_updates(correction, slower(updates)), state), None

    start = Correction.none(*layer.mean.shape)
    (end, _), _ = jax.lax.scan(step, (start, adam.init(start)), None, length=steps)
    return end, jnp.stack([loss(start, keys, weights), loss(end, keys, weights)])
