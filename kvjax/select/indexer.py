"""The lightning indexer: a small attention of its own that says what a layer should read."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.codecs.transforms import hadamard_transform
from kvjax.core.codec import Array
from kvjax.core.errors import InputError
from kvjax.core.pytree import pytree, static
from kvjax.core.rng import fold

NORM_EPS = 1e-6


@pytree
class Indexer:
    """Weights of the indexers of some layers; every leaf leads with the same axes, `[l]` or none.

        I[t, s] = sum_j w[t, j] ReLU(q[t, j] . k[s])
        q[t, j] = R_t (x_t W_q)_j      k[s] = R_s LayerNorm(x_s W_k)
        w[t] = x_t W_w / sqrt(H d)

    with x the normed input of the layer and R_t RoPE on the first 2 r of the d channels. One key
    per token and layer, shared by the H heads of the indexer: that is all it keeps.

    Attributes:
      wq: `[..., D, H * d]`. wk: `[..., D, d]`. ww: `[..., D, H]`.
      gain, bias: `[..., d]` float32, of the LayerNorm.
      frequencies: `[..., r]` float32, radians per position of the pairs (i, i + r).
      heads: H.
      hadamard: whether q and k go through an orthonormal Hadamard transform after RoPE: scores stay
        as they are, 8-bit keys lose less.

    Source: DeepSeek-V3.2 (DSA). Differs from it: q comes from x itself, for models without a query
    latent, and the ratio of rotated channels is free.
    """

    wq: Array
    wk: Array
    ww: Array
    gain: Array
    bias: Array
    frequencies: Array
    heads: int = static()
    hadamard: bool = static(default=True)

    @property
    def width(self) -> int:
        """d, channels of an index key."""
        return self.wk.shape[-1]


def init_indexer(
    d_model: int,
    *,
    layers: int,
    heads: int = 4,
    width: int = 32,
    rotated: int | None = None,
    theta: float = 1e4,
    hadamard: bool = True,
    rng: Array,
) -> Indexer:
    """An indexer that knows nothing yet.

    Args:
      d_model: D. layers: l. heads: H. width: d.
      rotated: channels that get RoPE, 2 r; None is half of them.
      theta: base of the frequencies.
    Raises:
      InputError: sizes under 1; an odd number of rotated channels, or more than there are.

    Example:
      >>> import jax
      >>> init_indexer(16, layers=2, heads=3, width=8, rng=jax.random.key(0)).wq.shape
      (2, 16, 24)
    """
    rotated = width // 4 * 2 if rotated is None else rotated
    for name, size in (("layers", layers), ("heads", heads), ("width", width)):
        if size < 1:
            raise InputError(name, got=size, expected="1 or more", fix="raise it")
    if rotated % 2 or not 0 <= rotated <= width:
        raise InputError(
            "rotated channels",
            got=rotated,
            expected=f"an even number from 0 to the width of {width}",
            fix="choose such a number",
        )
    draw = lambda name, out: (
        jax.random.normal(fold(rng, "indexer", name), (layers, d_model, out)) * d_model**-0.5
    )
    turns = theta ** (-np.arange(0, rotated, 2) / max(rotated, 1))
    return Indexer(
        wq=draw("query", heads * width),
        wk=draw("key", width),
        ww=draw("weight", heads),
        gain=jnp.ones((layers, width)),
        bias=jnp.zeros((layers, width)),
        frequencies=jnp.broadcast_to(jnp.asarray(turns, jnp.float32), (layers, rotated // 2)),
        heads=heads,
        hadamard=hadamard,
    )


def index_keys(indexer: Indexer, x: Array, positions: Array) -> Array:
    """Index keys `[..., t, d]` float32 of tokens.

    Args:
      indexer: of one layer. x: `[..., t, D]`, normed inputs of the layer. positions: `[..., t]`.
    """
    k = (x @ indexer.wk).astype(jnp.float32)
    k = k - k.mean(-1, keepdims=True)
    k = k * jax.lax.rsqrt((k * k).mean(-1, keepdims=True) + NORM_EPS)
    return _turned(indexer, k * indexer.gain + indexer.bias, positions)


def index_queries(indexer: Indexer, x: Array, positions: Array) -> tuple[Array, Array]:
    """Index queries `[..., t, H, d]` and weights of the heads `[..., t, H]`, float32."""
    q = (x @ indexer.wq).astype(jnp.float32)
    q = q.reshape(*x.shape[:-1], indexer.heads, indexer.width)
    w = (x @ indexer.ww).astype(jnp.float32) * (indexer.heads * indexer.width) ** -0.5
    return _turned(indexer, q, positions[..., None]), w


def index_scores(q: Array, w: Array, k: Array) -> Array:
    """`I: [..., t, s]`: queries `[..., t, H, d]`, weights `[..., t, H]`, keys `[..., s, d]`.

    Example:
      >>> import jax.numpy as jnp
      >>> q = jnp.array([[[1.0, 0.0], [0.0, 1.0]]])
      >>> index_scores(q, jnp.array([[1.0, 2.0]]), jnp.array([[3.0, -4.0], [-1.0, 5.0]]))
      Array([[ 3., 10.]], dtype=float32)
    """
    dots = jnp.einsum("...thd,...sd->...hts", q, k, preferred_element_type=jnp.float32)
    weights = jnp.moveaxis(w, -1, -2)[..., None]  # [..., H, t, 1]
    return (weights * jax.nn.relu(dots)).sum(-3)


def _turned(indexer: Indexer, x: Array, positions: Array) -> Array:
    """RoPE on the first pairs of `x: [..., d]`, then the Hadamard transform."""
    r = indexer.frequencies.shape[-1]
    angles = positions[..., None].astype(jnp.float32) * indexer.frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second, rest = jnp.split(x, (r, 2 * r), -1)
    x = jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], -1)
    return hadamard_transform(x) if indexer.hadamard else x
