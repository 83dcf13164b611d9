"""Random packed tensors, and the vectors that they stand for in float64."""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import planes
from pallas_kernels.packed import Block, Part


def block(rng, lead, page, size, bits, levels=False, transposed=False, offset=0.0):
    """A block and its `[..., page, size]` values."""
    if bits == 16:
        x = jnp.asarray(rng.normal(size=(*lead, page, size)), jnp.bfloat16)
        words = jax.lax.bitcast_convert_type(x, jnp.uint16)
        return Block((words,), None, 16, 0, size), np.asarray(x, np.float64)
    codes = rng.integers(0, 2**bits, (*lead, page, size))
    words = planes.pack(jnp.asarray(codes), bits, transposed=transposed)
    if not levels:
        return Block(words, None, bits, 0, size, offset, transposed), codes - offset
    half = np.sort(np.abs(rng.normal(size=2 ** (bits - 1)))).astype(np.float32)
    book = np.concatenate([-half[::-1], half])
    values = book.astype(np.float64)[codes]
    return Block(words, jnp.asarray(book), bits, 0, size, 0.0, transposed), values


def part(rng, lead, page, blocks, scale):
    """A part of the given (block, values) pairs with scales per "token", "channel" or "none"."""
    x = np.concatenate([values for _, values in blocks], -1)
    blocks = tuple(b for b, _ in blocks)
    half = lambda *shape: np.asarray(rng.normal(size=shape) * 0.3, np.float16)
    if scale == "none":
        return Part(blocks), x
    if scale == "token":
        s, z = np.abs(half(*lead, page)), half(*lead, page)
        out = x * s[..., None].astype(float) + z[..., None].astype(float)
        return Part(blocks, token_scale=jnp.asarray(s), token_zero=jnp.asarray(z)), out
    s, z = np.abs(half(*lead, x.shape[-1])), half(*lead, x.shape[-1])
    out = x * s[..., None, :].astype(float) + z[..., None, :].astype(float)
    return Part(blocks, channel_scale=jnp.asarray(s), channel_zero=jnp.asarray(z)), out


def attention(q, keys, values, seen):
    """Softmax attention `[b, h, g, d]` and its log-sum-exp, in float64; zeros where nothing is seen.

    Args:
      keys, values: `[b, h, t, d]`. seen: `[b, h, t]` bool.
    """
    logits = np.einsum("bhgd,bhtd->bhgt", np.asarray(q, np.float64), keys)
    logits = np.where(seen[:, :, None], logits, -np.inf)
    top = np.where(seen.any(-1)[:, :, None], logits.max(-1), 0.0)
    p = np.exp(logits - top[..., None])
    total = p.sum(-1)
    some = total > 0
    out = np.einsum("bhgt,bhtd->bhgd", p, values) / np.where(some, total, 1)[..., None]
    return out, np.where(some, top + np.log(np.where(some, total, 1)), -1e30)
