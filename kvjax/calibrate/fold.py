"""Rotations of values moved into the weights, where they cost nothing per step."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.codecs import Linear, Transform
from kvjax.core.errors import InputError
from kvjax.core.method import Method
from kvjax.models.config import ModelConfig
from kvjax.models.decoder import Layers, Params


def fold_values(params: Params, config: ModelConfig, transforms: Sequence[Transform]) -> Params:
    """The same model with values `v' = A v` in place of v.

        W_V <- W_V A^T,   b_V <- b_V A^T,   W_O <- A^-T W_O     per KV head and its g query heads

    The weights are `[in, out]`: values are rows `v = x W_V`, and outputs `A o` meet `A^-T W_O`.
    Matrices are multiplied in float64 on the host, a layer at a time, and rounded once to the dtype
    of the weights. The model is the same one up to that: of SmolLM2-135M and Gemma 3 270M logits
    move by at most 7e-6 of the largest in float32. In bf16 they move by 0.2 to 0.4 % (rms), half of
    what rounding the float32 weights to bf16 has moved them by before.

    Args:
      params: weights, stacked by any runs of layers.
      config: the model.
      transforms: one per layer; `[d, d]`, or `[h, 1, d, d]` for one per KV head.
    Returns:
      Weights that share all but `wv`, `wo` and `bv` with `params`.
    Raises:
      InputError: not one transform per layer, one of other heads or another head_dim, or one that
        has no inverse.

    Source: QuaRot (arXiv 2404.00456) and OSCAR (arXiv 2605.17757) fold orthogonal ones.

    Example:
      >>> from kvjax.models.load import load
      >>> model = load("smollm2-135m")  # doctest: +SKIP
      >>> transforms = [method.value.transform for method in methods]  # doctest: +SKIP
      >>> params = fold_values(model.params, model.config, transforms)  # doctest: +SKIP
      >>> plan = make_plan(model.config, unrotated_values(methods))  # doctest: +SKIP
    """
    if len(transforms) != config.layers:
        raise InputError(
            "transforms",
            got=f"{len(transforms)} of them",
            expected=f"one for each of the {config.layers} layers of {config.name}",
            fix="give every layer one: [transform] * layers for the same in all",
        )
    pairs = [_matrices(transform, i, config) for i, transform in enumerate(transforms)]
    pairs = [pairs[owner] for owner in config.owners]  # who borrows values undoes their transform
    runs, start = [], 0
    for layers in params.runs:
        stop = start + layers.wv.shape[0]
        runs.append(_fold_run(layers, pairs[start:stop], config))
        start = stop
    return dataclasses.replace(params, runs=tuple(runs))


def unrotated_values(methods: Sequence[Method]) -> tuple[Method, ...]:
    """The methods, one per layer, for weights into which `fold_values` has put their transforms.

    Over folded weights they give what `methods` give over the original ones, up to rounding. Exact
    windows then hold `A v`, and codes are made of what they hold: where rounding differs, some
    codes do. For OSCAR on SmolLM2-135M the two differ by a KL of 1e-5 with float32 windows and of
    0.009 with bf16 ones, which round v in the one case and `A v` in the other.

    Raises:
      InputError: a value codec that is not a `Linear`; one within another codec stays where it is.

    Example:
      >>> import jax
      >>> from kvjax.methods import hadamard_int
      >>> method, = unrotated_values([hadamard_int(4, 64, rng=jax.random.key(0))])
      >>> type(method.key).__name__, type(method.value).__name__
      ('Linear', 'Uniform')
    """
    stripped = []
    for layer, method in enumerate(methods):
        if not isinstance(method.value, Linear):
            raise InputError(
                f"value codec of layer {layer}",
                got=type(method.value).__name__,
                expected="Linear(transform, inner)",
                fix="fold only methods whose values are coded after a transform, such as OSCAR's",
            )
        stripped.append(dataclasses.replace(method, value=method.value.inner))
    return tuple(stripped)


def _matrices(transform: Transform, layer: int, config: ModelConfig) -> tuple[np.ndarray, ...]:
    """`A^T` and `A^-T` of one layer, `[h, d, d]` float64."""
    h, d = config.kv_heads, config.head_dim
    transform.check(d)
    turned = np.asarray(transform.forward(jnp.eye(d)), np.float64)  # rows A e_i: A^T
    if turned.shape not in ((d, d), (h, 1, d, d)):
        raise InputError(
            f"transform of layer {layer}",
            got=f"a map of shape {turned.shape}",
            expected=f"{(d, d)}, or {(h, 1, d, d)} for one per KV head",
            fix="build the method for this model",
        )
    turned = np.broadcast_to(turned.reshape(-1, d, d), (h, d, d))
    condition = np.linalg.cond(turned).max() if np.isfinite(turned).all() else np.inf
    if not condition < 1e6:
        raise InputError(
            f"transform of layer {layer}",
            got=f"a map of condition {condition:.2g}",
            expected="an invertible one",
            fix="calibrate again, or leave this layer's transform in the codec",
        )
    return turned, np.linalg.inv(turned)


def _fold_run(
    layers: Layers, pairs: Sequence[tuple[np.ndarray, ...]], config: ModelConfig
) -> Layers:
    """The layers of one run, each with its pair of matrices."""
    h, g, d = config.kv_heads, config.q_per_kv, config.head_dim

    def columns(w: np.ndarray, pair) -> np.ndarray:  # [..., h*d]
        heads = w.reshape(-1, h, d).swapaxes(0, 1)  # [h, D, d]
        return (heads @ pair[0]).swapaxes(0, 1)

    def rows(w: np.ndarray, pair) -> np.ndarray:  # [h*g*d, D]
        return pair[1][:, None] @ w.reshape(h, g, d, -1)

    def folded(leaf: jax.Array, fold) -> jax.Array:
        host = np.asarray(leaf)
        out = np.empty_like(host)
        for i, pair in enumerate(pairs):
            out[i] = fold(host[i].astype(np.float64), pair).reshape(host.shape[1:])
        return jax.device_put(out, leaf.sharding)

    return dataclasses.replace(
        layers,
        wv=folded(layers.wv, columns),
        wo=folded(layers.wo, rows),
        bv=None if layers.bv is None else folded(layers.bv, columns),
    )
