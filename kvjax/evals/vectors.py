"""Vectors to compress, and the queries that will meet them: synthetic ones, and a model's own."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from kvjax.core.codec import Array
from kvjax.core.errors import InputError, known
from kvjax.core.pytree import pytree, static

QUERIES = 64  # per page


@pytree
class Vectors:
    """Pages of vectors, with queries for each page.

    Attributes:
      x: `[n, p, d]`, n pages of p tokens.
      q: `[n, m, d]`.
    """

    x: Array
    q: Array
    name: str = static()


def synthetic(name: str, pages: int, page: int, d: int, *, seed: int) -> Vectors:
    """Random vectors of one of the kinds in `KINDS`, with random unit queries.

    The generator is NumPy's: it can share no key with a method's rotation.

    Example:
      >>> synthetic("sphere", 2, 16, 64, seed=0).x.shape
      (2, 16, 64)
    """
    if name not in KINDS:
        raise InputError(
            "vectors", got=repr(name), expected=known(KINDS), fix="use one of these names"
        )
    random = np.random.default_rng([seed, d, *name.encode()])
    x = KINDS[name](random, (pages, page, d))
    return Vectors(_float32(x), _float32(_sphere(random, (pages, QUERIES, d))), name)


def of_model(model, text: str, *, pages: int, page: int) -> tuple[Vectors, Vectors]:
    """Keys (after RoPE) and values of a model on some text, from heads spread over all layers.

    Each page is the last `page` tokens of a window of four pages, seen by one head. Keys come with
    the queries of their own head at positions in that page; values with random unit ones, for they
    meet softmax weights, not queries.

    Returns:
      (keys, values), named after the model.
    Raises:
      InputError: a text that is too short.
    """
    from kvjax.evals.reference import reference_pass
    from kvjax.evals.text import model_windows

    window = 4 * page
    tokens = model_windows(model, text, context=window, windows=1)[0]
    seen = reference_pass(model.params, model.config, jnp.asarray(tokens, jnp.int32))
    heads = lambda runs: np.concatenate([np.asarray(a).reshape(-1, *a.shape[2:]) for a in runs])
    key, value = heads(seen.key), heads(seen.value)  # [l * h, t, d]
    late = np.asarray(seen.probes) >= window - page  # those that see the page, or most of it
    query = heads([a.transpose(0, 2, 1, 3, 4)[:, :, late] for a in seen.query])  # [l * h, n, g, d]
    query = query.reshape(len(query), -1, query.shape[-1])
    chosen = np.linspace(0, len(key) - 1, min(pages, len(key))).astype(int)
    some = np.linspace(0, query.shape[1] - 1, QUERIES).astype(int)
    last = slice(window - page, window)
    name = model.config.name
    random = np.random.default_rng(len(name))
    blind = _sphere(random, (len(chosen), QUERIES, key.shape[-1]))
    return (
        Vectors(_float32(key[chosen, last]), _float32(query[chosen][:, some]), f"{name} keys"),
        Vectors(_float32(value[chosen, last]), _float32(blind), f"{name} values"),
    )


def _sphere(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    x = random.normal(size=shape)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def _heavy(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return random.standard_t(3, size=shape)


def _outliers(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    scale = np.ones(shape[-1])
    scale[random.permutation(shape[-1])[: max(1, shape[-1] // 32)]] = 20
    return random.normal(size=shape) * scale


# What the coordinates are: uniform on the unit sphere; Student's t with 3 degrees of freedom;
# normal, with one channel in 32 twenty times as large.
KINDS: dict[str, Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]] = {
    "sphere": _sphere,
    "heavy": _heavy,
    "outliers": _outliers,
}


def _float32(x: np.ndarray) -> Array:
    return jnp.asarray(x, jnp.float32)
