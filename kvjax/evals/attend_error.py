"""Whether attention over a cache is right, before anything is said of its speed."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

import kvjax
from kvjax.cache import Cache
from kvjax.core.method import Method
from kvjax.evals.random_cache import random_cache

Heads = tuple[int, int, int]  # KV heads, queries of each, channels


def filled(method: Method, tokens: int, heads: Heads) -> Cache:
    """A cache of one layer and one sequence, full of random tokens."""
    h, _, d = heads
    empty = lambda: kvjax.init(method, capacity=tokens, kv_heads=h, head_dim=d)
    return random_cache(method, jax.eval_shape(empty), tokens, rng=jax.random.key(0))


def attend_error(method: Method, heads: Heads, tokens: int) -> float:
    """Error of `kvjax.attend` with what the method says reads its codes, against softmax attention
    in float64 over the very same codes; in units of the largest output."""
    h, g, d = heads
    cache = filled(method, tokens, heads)
    q = 2 * jax.random.normal(jax.random.key(4), (1, h, g, d))
    got = np.asarray(jax.jit(lambda cache, q: kvjax.attend(method, cache, q))(cache, q))
    pages = int(cache.packed[0, 0])
    keys, values = (
        np.asarray(codec.decode(jax.tree.map(lambda a: a[0, 0, :, :pages], code)), np.float64)
        for codec, code in ((method.key, cache.key_pages), (method.value, cache.value_pages))
    )
    at = np.asarray(cache.window_positions[0, 0])
    layout = method.layout
    exact = (at >= 0) & ((at < layout.sink) | (at >= layout.sink + layout.page * pages))
    wide = lambda a: np.asarray(jax.lax.bitcast_convert_type(a[0, 0], jnp.bfloat16), np.float64)
    join = lambda packed, window: np.concatenate(
        [packed.reshape(h, -1, d), wide(window)[:, exact]], 1
    )
    keys, values = join(keys, cache.window_key), join(values, cache.window_value)
    assert keys.shape[1] == tokens
    logits = np.einsum("hgd,htd->hgt", np.asarray(q[0], np.float64) * d**-0.5, keys)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    right = np.einsum("hgt,htd->hgd", p / p.sum(-1, keepdims=True), values)
    return float(np.abs(got[0] - right).max() / np.abs(right).max())
