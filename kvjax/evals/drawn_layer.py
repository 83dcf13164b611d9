"""A layer to draw from: Gaussian queries, keys and values with the moments of a calibrated layer.

Histories of any length for which no text and no model is needed: a page is a function of its
number, so that it can be made when it is wanted, on whichever device, and made again.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.calibrate.moments import SKIP, Moments
from kvjax.core.errors import InputError
from kvjax.core.pytree import pytree
from kvjax.core.rng import fold
from kvjax.evals.query_moments import QueryMoments
from kvjax.models.config import ModelConfig, layer_runs
from kvjax.models.decoder import apply_rope, rope_frequencies

Array = jax.Array

SEEN = 2048  # positions over which keys after RoPE are averaged, as a window of a calibration has

# Of a `Moments`: what a block keeps as it is, by the axes of channels.
_MEANS = ("key_mean_pre", "value_mean")
_SQUARES = ("query_gram", "key_cov_pre", "value_cov", "output_gram", "value_proxy", "out_gram")


@pytree
class DrawnLayer:
    """Means and roots of covariances, `root root^T`, of h KV heads with d channels.

        k_t = R_t (key_mean + key_root z),   v_t = value_mean + value_root z',
        q_t = R_t (query_mean + query_root z'')

    with z, z', z'' standard normal and R_t the rotation of RoPE at position t. Tokens are
    independent of each other, and keys of values: a text is not like that, and has sinks.

    `key_root` is that of `Moments.key_cov_pre`, which is about the mean before RoPE, but after RoPE
    and averaged over the calibrated positions: what fast pairs had in one direction more than in
    the other is gone. Slow pairs hardly turned there, and turn at long contexts: then keys and
    queries are no longer what the calibration says of them after RoPE, as those of a model are not.

    Attributes:
      key_mean, key_root: `[h, d]` and `[h, d, d]`, before RoPE. value_mean, value_root: the same.
      query_mean, query_root: `[h, g, d]` and `[h, g, d, d]`, the attention scale in them.
      frequencies: `[d / 2]`, radians per position.
      numbers: `[h]` int32, which heads these are: random numbers are folded by them.
    """

    key_mean: Array
    key_root: Array
    value_mean: Array
    value_root: Array
    query_mean: Array
    query_root: Array
    frequencies: Array
    numbers: Array


def drawn_layer(moments: Moments, queries: QueryMoments, layer: int = 0) -> DrawnLayer:
    """The layer that was calibrated as that one.

    Example:
      >>> import numpy as np
      >>> _root(np.diag([4.0, 9.0]))
      array([[2., 0.],
             [0., 3.]])
    """
    single = lambda a: jnp.asarray(a[layer], jnp.float32)
    return DrawnLayer(
        key_mean=single(moments.key_mean_pre),
        key_root=jnp.asarray(_root(moments.key_cov_pre[layer]), jnp.float32),
        value_mean=single(moments.value_mean),
        value_root=jnp.asarray(_root(moments.value_cov[layer]), jnp.float32),
        query_mean=single(queries.mean),
        query_root=jnp.asarray(_root(queries.cov[layer]), jnp.float32),
        frequencies=single(moments.frequencies),
        numbers=jnp.arange(moments.shape[1], dtype=jnp.int32),
    )


def _root(cov: np.ndarray) -> np.ndarray:
    """The symmetric root of `[..., d, d]`; what rounding made negative is zero."""
    value, vector = np.linalg.eigh(cov)
    return (vector * np.sqrt(np.maximum(value, 0))[..., None, :]) @ vector.swapaxes(-1, -2)


def draw_tokens(
    layer: DrawnLayer, rng: Array, numbers: Array, positions: Array
) -> tuple[Array, Array]:
    """Keys after RoPE and values of n stretches of t tokens, `[h, n, t, d]` float32 each.

    Args:
      numbers: `[n]` int32, of the stretches: random numbers are folded by them.
      positions: `[n, t]` int32.
    """
    (n, t), (h, d) = positions.shape, layer.key_mean.shape
    each = jax.vmap(lambda number, head: fold(rng, "tokens", number, head), (None, 0))
    keys = jax.vmap(each, (0, None))(numbers, layer.numbers)  # [n, h]
    # In turn, not side by side: a quarter of the time to compile, and no slower.
    z = jax.lax.map(lambda key: jax.random.normal(key, (2, t, d)), keys.reshape(-1))
    z = z.reshape(n, h, 2, t, d)
    k, v = (
        mean[:, None, None] + jnp.einsum("nhtd,hed->hnte", z[:, :, i], root)
        for i, (mean, root) in enumerate(
            ((layer.key_mean, layer.key_root), (layer.value_mean, layer.value_root))
        )
    )
    angles = positions[..., None].astype(jnp.float32) * layer.frequencies  # [n, t, d/2]
    return apply_rope(k, jnp.cos(angles), jnp.sin(angles)), v


def draw_queries(layer: DrawnLayer, rng: Array, count: int, position: int) -> Array:
    """Scaled queries `[h, count, d]` float32 at a position, of all query heads in turn: `q k` is a
    logit."""
    g, d = layer.query_mean.shape[1:]
    keys = jax.vmap(lambda head: fold(rng, "queries", head))(layer.numbers)
    z = jax.vmap(lambda key: jax.random.normal(key, (count, d)))(keys)  # [h, count, d]
    of = jnp.arange(count) % g
    q = layer.query_mean[:, of] + jnp.einsum("hrd,hred->hre", z, layer.query_root[:, of])
    angles = position * layer.frequencies
    return apply_rope(q, jnp.cos(angles), jnp.sin(angles))


def shaped_like(
    moments: Moments, queries: QueryMoments, target: ModelConfig, layer: int
) -> tuple[Moments, QueryMoments]:
    """Moments of one layer of the shape of `target`, from what was calibrated on another model.

    Where heads and channels are those of the calibrated model it is that layer. Otherwise each head
    of `target` is made of `d_target / d` heads as blocks, taken in order from `layer` on: channels
    of a block keep their moments, those of two blocks are uncorrelated. Pair i of the n-th of b
    blocks becomes pair `b i + n`, so that fast channels stay fast; RoPE is that of `target`, and
    queries are divided by the root of b, as the attention scale of more channels does. Moments of
    keys after RoPE are then averages over positions 4 to 2047. Query heads stay those of the
    calibrated model, in its number.

    Nothing of this is a measurement of `target`: the shape is, the numbers are of the other model.

    Raises:
      InputError: channels that are not a multiple, or too few heads from that layer on.
    """
    layers, heads, d = moments.shape
    wide, blocks = target.head_dim, target.head_dim // d
    if wide % d or (layers - layer) * heads < target.kv_heads * blocks or layer < 0:
        raise InputError(
            f"moments for {target.name}",
            got=f"{heads} heads of {d} channels in {layers} layers, from layer {layer} on",
            expected=f"{target.kv_heads} x {wide / d:g} heads",
            fix="start at an earlier layer, or calibrate another model",
        )
    frequencies = rope_frequencies(layer_runs(target)[0], wide).astype(np.float64)
    same = (heads, d) == (target.kv_heads, wide)
    if same and np.allclose(frequencies, moments.frequencies[layer], rtol=1e-5):
        kept = {f.name: getattr(moments, f.name) for f in dataclasses.fields(moments)}
        found = {
            name: a[layer : layer + 1]
            for name, a in kept.items()
            if a is not None and name not in ("tokens", "bucket_edges")
        }
        one = Moments(moments.tokens, **found, bucket_edges=moments.bucket_edges)
        own = slice(layer, layer + 1)
        return one, QueryMoments(queries.mean[own], queries.cov[own])
    made: dict[str, np.ndarray] = {}
    places = np.stack([_places(n, blocks, d) for n in range(blocks)])  # [blocks, d]

    def joined(of_all: np.ndarray, channels: int) -> np.ndarray:
        """`[l, h, ..., d]`, or with two axes of channels -> `[target.kv_heads, ..., wide]`."""
        own = of_all[layer:].reshape(-1, *of_all.shape[2:])[: target.kv_heads * blocks]
        own = own.reshape(target.kv_heads, blocks, *own.shape[1:])
        out = np.zeros((target.kv_heads, *own.shape[2 : own.ndim - channels], *[wide] * channels))
        for n, at in enumerate(places):
            out[(..., *np.ix_(*[at] * channels))] = own[:, n]
        return out

    for name in (*_MEANS, *_SQUARES):
        made[name] = joined(getattr(moments, name), 1 if name in _MEANS else 2)
    made["query_gram"] /= blocks
    asked = QueryMoments(
        joined(queries.mean, 1)[None] / blocks**0.5, joined(queries.cov, 2)[None] / blocks
    )
    mean, cov = _after_rope(made["key_mean_pre"], made["key_cov_pre"], frequencies)
    made |= {"key_mean": mean, "key_cov": cov, "frequencies": frequencies}
    return Moments(moments.tokens, **{name: a[None] for name, a in made.items()}), asked


def _places(block: int, blocks: int, d: int) -> np.ndarray:
    """Where the d channels of a block go: `[d]`; pairs are channels (i, i + d / 2).

    Example:
      >>> _places(1, 2, 4)
      array([1, 3, 5, 7])
    """
    pair = blocks * np.arange(d // 2) + block
    return np.concatenate([pair, pair + blocks * d // 2])


def _after_rope(
    mean: np.ndarray, cov: np.ndarray, frequencies: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Mean `[h, d]` and covariance `[h, d, d]` over positions of keys with these before RoPE."""
    d = mean.shape[-1]
    angles = np.arange(SKIP, SEEN)[:, None] * frequencies
    cos, sin = np.cos(angles), np.sin(angles)
    turned = np.zeros((len(angles), d, d))  # R_t
    low, high = np.arange(d // 2), np.arange(d // 2, d)
    turned[:, low, low] = turned[:, high, high] = cos
    turned[:, high, low], turned[:, low, high] = sin, -sin
    average = turned.mean(0)
    second = cov + mean[:, :, None] * mean[:, None, :]
    moment = np.zeros_like(cov)
    for rotation in np.array_split(turned, 32):
        for h, one in enumerate(second):
            moment[h] += (rotation @ one @ rotation.swapaxes(-1, -2)).sum(0)
    centre = mean @ average.T
    return centre, moment / len(turned) - centre[:, :, None] * centre[:, None, :]
