"""The model over whole texts as its packed cache will see them, with gradients."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from kvjax.codecs import straight_through
from kvjax.core.codec import Codec
from kvjax.core.errors import InputError
from kvjax.core.layout import Layout
from kvjax.core.method import Method
from kvjax.generate.plan import Plan
from kvjax.models.causal import masked_softmax
from kvjax.models.config import layer_runs
from kvjax.models.decoder import Params, decode_layers

Array = jax.Array


def quantized_hidden(plan: Plan, params: Params, tokens: Array) -> Array:
    """Hidden states `[b, t, D]` after the final norm, attention through codes of keys and values.

    Every query sees what it would see in a decode step: sink and recent tokens exact, all others
    decoded, in the pages in which the cache packs them. Rounding counts as the identity, so
    gradients reach the weights and what `straight_through` says of a codec.

    Args:
      plan: methods whose layers differ in arrays only. tokens: int32 `[b, t]`.
    Raises:
      InputError: layers of one run with methods of different structure; a plan on a mesh.

    Example:
      >>> hidden = quantized_hidden(plan, model.params, tokens)  # doctest: +SKIP
    """
    config = plan.config
    runs = layer_runs(config)
    if len(plan.groups) != len(runs) or plan.rules is not None:
        raise InputError(
            "plan",
            got=f"{len(plan.groups)} groups of layers in {len(runs)} runs"
            + (", on a mesh" if plan.rules is not None else ""),
            expected="methods of one structure in each run, on one device",
            fix="train with one recipe for all layers",
        )
    if any(plan.stacked) and config.owners != tuple(range(config.layers)):
        raise InputError(
            "plan",
            got="calibrated methods, for layers of which some borrow",
            expected="one method for all, or layers with caches of their own",
            fix="train without layer_map, or with a method that is not calibrated",
        )
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)

    def attend(run, layer, cache, q, k, v, extra):
        method = extra if plan.stacked[run] else plan.methods[run]
        return attention(method, q, k, v, runs[run].window), cache

    xs = [m if stacked else None for m, stacked in zip(plan.methods, plan.stacked, strict=True)]
    caches: tuple[Any, ...] = (None,) * len(runs)
    hidden, _, _ = decode_layers(params, config, tokens, positions, attend, caches, xs=xs)
    return hidden


@functools.partial(jax.checkpoint, static_argnums=4)
def attention(method: Method, q: Array, k: Array, v: Array, window: int | None) -> Array:
    """What t decode steps over a packed cache give: `[b, t, h, g, d]`.

    Args:
      q: `[b, t, h, g, d]`, scaled. k, v: `[b, t, h, d]`, keys after RoPE.
      window: tokens that a query sees back from itself, or None.
    """
    t, layout = k.shape[1], method.layout
    q, k, v = (a.astype(jnp.float32) for a in (q, k, v))
    k_hat, v_hat = (_decoded(codec, layout, a) for codec, a in ((method.key, k), (method.value, v)))
    at = jnp.arange(t)
    distance = at[:, None] - at  # [query, token]
    seen = (distance >= 0) & (distance < window if window else True)
    boundary = layout.sink + layout.page * layout.packed_pages(at + 1)  # of each query
    packed = (at >= layout.sink) & (at < boundary[:, None])
    look = lambda keys: jnp.einsum("bshgd,bthd->bhgst", q, keys)
    p = masked_softmax(jnp.where(packed, look(k_hat), look(k)), seen)
    take = lambda p, values: jnp.einsum("bhgst,bthd->bshgd", p, values)
    return take(p * packed, v_hat) + take(p * ~packed, v)


def _decoded(codec: Codec, layout: Layout, x: Array) -> Array:
    """`x: [b, t, h, d]` with every page that gets packed as its codes decode it."""
    b, t, h, d = x.shape
    n = int(layout.packed_pages(t))
    if not n:
        return x
    end = layout.sink + n * layout.page
    pages = x[:, layout.sink : end].reshape(b, n, layout.page, h, d).transpose(0, 3, 1, 2, 4)
    at = jnp.arange(layout.sink, end, dtype=jnp.int32).reshape(1, 1, n, layout.page)
    pages = straight_through(codec, pages, jnp.broadcast_to(at, pages.shape[:-1]))
    inside = pages.transpose(0, 2, 3, 1, 4).reshape(b, n * layout.page, h, d)
    return jnp.concatenate([x[:, : layout.sink], inside, x[:, end:]], 1)
