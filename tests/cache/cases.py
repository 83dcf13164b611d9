"""What the tests of the cache share: small sizes, data, and two ways to fill a cache."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle

import kvjax
from kvjax.codecs import Dense, Uniform
from kvjax.core.method import Method

H, G, D = 2, 2, 16  # KV heads, queries per KV head, head dim
T = 78  # tokens: several pages of 16, and a rest; 13 * 6 and 39 * 2

LAYOUTS = {
    "usual": kvjax.Layout(sink=4, recent=32, page=16),
    "no sink": kvjax.Layout(sink=0, recent=16, page=16),
    "no recent": kvjax.Layout(sink=3, recent=0, page=16),
    "pool": kvjax.Layout(sink=4, recent=16, page=16, pool=9),
    "encode two": kvjax.Layout(sink=1, recent=16, page=16, encode_batch=2),
}

# Compiling takes longer than running: optimize little, except where memory is measured.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def tokens(b: int, t: int = T, *, d: int = D, seed: int = 0) -> tuple[np.ndarray, ...]:
    """`q: [b, t, h, g, d]`, `k, v: [b, t, h, d]`, with a common part in the keys."""
    rng = np.random.default_rng(100 + seed)
    q = 1.5 * rng.normal(size=(b, t, H, G, d))
    k = rng.normal(size=(b, t, H, d)) + rng.normal(size=(H, d))
    v = rng.normal(size=(b, t, H, d))
    return tuple(a.astype(np.float32) for a in (q, k, v))


def exact(layout: kvjax.Layout) -> Method:
    return Method(Dense(jnp.float32), Dense(jnp.float32), layout)


def lossy(layout: kvjax.Layout) -> Method:
    """Coarse enough that a token read from the wrong place shows."""
    return Method(Uniform(2, axis="tokens"), Uniform(3), layout)


def lossy_pages() -> dict:
    """The same codecs in the oracle."""

    def coded(x, bits, axis):
        return np.stack([oracle.min_max(head, bits, axis=axis)[-1] for head in x])

    return {
        "key_page": lambda x: coded(x, 2, "tokens"),
        "value_page": lambda x: coded(x, 3, "channels"),
    }


def empty(method: Method, b: int, *, capacity: int = T, d: int = D, **options) -> kvjax.Cache:
    options = {"dtype": jnp.float32, **options}
    return kvjax.init(method, capacity=capacity, kv_heads=H, head_dim=d, batch=b, **options)


def stepwise(method, cache, q, k, v, active=None):
    """`append` and `attend` for each token: outputs `[b, t, h, g, d]` and the cache."""
    active = np.ones(k.shape[:2], bool) if active is None else active
    return _stepwise(method, cache, q, k, v, active)


@jit
def _stepwise(method, cache, *tokens):
    def step(cache, token):
        q, k, v, active = token
        cache = kvjax.append(method, cache, k, v, active=active)
        return cache, kvjax.attend(method, cache, q)

    cache, out = jax.lax.scan(step, cache, [jnp.moveaxis(a, 1, 0) for a in tokens])
    return jnp.moveaxis(out, 0, 1), cache


@functools.partial(jit, static_argnames="block")
def blockwise(method, cache, q, k, v, block):
    return kvjax.cache.prefill(method, cache, k, v, q=q, block=block)


extend = jit(kvjax.extend)


def windows(layout: kvjax.Layout) -> dict[str, int]:
    return {"sink": layout.sink, "recent": layout.recent, "page": layout.page}


def assert_same(a, b) -> None:
    """Bit for bit."""
    for (path, x), y in zip(jax.tree.leaves_with_path(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y, err_msg=jax.tree_util.keystr(path))


def held(cache: kvjax.Cache) -> kvjax.Cache:
    """The cache with zeros in the window slots that hold no token."""
    empty = (cache.window_positions < 0)[:, :, None, :, None]
    window = [jnp.where(empty, 0, a) for a in (cache.window_key, cache.window_value)]
    return dataclasses.replace(cache, window_key=window[0], window_value=window[1])


def sequence(cache: kvjax.Cache, row: int) -> list[np.ndarray]:
    """What belongs to one sequence of a contiguous cache."""
    return [np.asarray(a[:, row]) for a in jax.tree.leaves(cache)]
