"""How far a compressed cache takes a model from itself: KL, perplexity, logit and output error."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.cache import Cache
from kvjax.core.method import Method
from kvjax.core.pytree import pytree
from kvjax.evals.reference import Reference
from kvjax.generate.plan import Plan, forward_block
from kvjax.models.decoder import Params, logits

Array = jax.Array


@pytree
class Scores:
    """Per position of a window; the last one has no next token and is left out.

    Attributes:
      kl: KL(full cache || compressed cache) of the next token, in nats.
      nll, full_nll: negative log-likelihood of the text, in nats.
      same: whether both caches rank the same token first.
    """

    kl: Array
    nll: Array
    full_nll: Array
    same: Array


@functools.partial(jax.jit, static_argnames="block", donate_argnames="caches")
def teacher_forced(
    plan: Plan,
    params: Params,
    caches: tuple[Cache, ...],
    tokens: Array,
    reference_hidden: Array,
    *,
    block: int,
) -> tuple[Scores, tuple[Cache, ...], Array]:
    """Feeds a window through the real packed caches, and compares every prediction.

    Blocks see what single steps would see (`extend`), so these are the scores of decoding token by
    token.

    Args:
      tokens: `[t]` int32, t a multiple of `block`; reference_hidden: `[t, D]`.
    """
    config = plan.config
    split = lambda a: a.reshape(-1, block, *a.shape[1:])
    following = jnp.roll(tokens, -1)

    def step(carry, inputs):
        caches, finite = carry
        tokens, following, reference = inputs
        hidden, caches, ok = forward_block(plan, params, caches, tokens[None])
        full = jax.nn.log_softmax(logits(params, config, reference))  # [t, V]
        ours = jax.nn.log_softmax(logits(params, config, hidden[0]))
        pick = lambda lp: -jnp.take_along_axis(lp, following[:, None], 1)[:, 0]
        kl = (jnp.exp(full) * (full - ours)).sum(-1)
        scores = Scores(kl, pick(ours), pick(full), full.argmax(-1) == ours.argmax(-1))
        return (caches, finite & ok), scores

    finite = jnp.ones((config.layers, 2), bool)
    inputs = split(tokens), split(following), split(reference_hidden)
    (caches, finite), scores = jax.lax.scan(step, (caches, finite), inputs)
    return jax.tree.map(lambda a: a.reshape(-1)[:-1], scores), caches, finite


def summarize(scores: list[Scores]) -> Iterator[tuple[str, float]]:
    """The numbers of a table row; standard errors are of the mean over all positions."""
    joined = jax.tree.map(lambda *a: np.concatenate([np.asarray(x) for x in a]), *scores)
    n = joined.kl.size
    yield "ppl", math.exp(joined.nll.mean())
    yield "full_ppl", math.exp(joined.full_nll.mean())
    yield "kl", float(joined.kl.mean())
    yield "kl_se", float(joined.kl.std(ddof=1) / math.sqrt(n))
    yield "top1", float(joined.same.mean())


def attention_fidelity(plan: Plan, reference: Reference) -> tuple[float, float]:
    """Open-loop errors on the exact keys and values, every token packed, windows left out.

    Returns:
      logit_db: median over layers and query heads of the logit error relative to the logit
        variance, in dB; both centred over the tokens that a query sees, since softmax does not
        see what is common to them.
      attention_error: relative error of the attention outputs, root mean square over all.
    """
    ratios, wrong, right = [], 0.0, 0.0
    of_layer = [(i, n) for i, run in enumerate(reference.key) for n in range(run.shape[0])]
    for method, stacked, group in zip(plan.methods, plan.stacked, plan.groups, strict=True):
        for slot, layer in enumerate(group.layers):
            own = jax.tree.map(lambda a, n=slot: a[n], method) if stacked else method
            i, n = of_layer[layer]
            k, v, q = reference.key[i][n], reference.value[i][n], reference.query[i][n]
            ratio, error, size = _layer_errors(own, k, v, q, reference.probes, group.window)
            ratios.append(np.asarray(ratio).ravel())
            wrong, right = wrong + float(error), right + float(size)
    return float(10 * np.log10(np.median(np.concatenate(ratios)))), math.sqrt(wrong / right)


@functools.partial(jax.jit, static_argnums=5)
def _layer_errors(method: Method, k, v, q, probes, window):
    """k, v `[h, t, d]`, q `[n, h, g, d]` -> error to variance `[h, g]`, and two energies."""
    q = q.transpose(1, 2, 0, 3)  # [h, g, n, d]
    t = jnp.arange(k.shape[1])
    seen = (t <= probes[:, None]) & ((probes[:, None] - t < window) if window else True)  # [n, t]
    exact, logits = _attention(q, k, v, seen)
    packed, approximate = _attention(
        q, _round_trip(method.key, method, k), _round_trip(method.value, method, v), seen
    )
    ratio = _spread(approximate - logits, seen) / _spread(logits, seen)
    return ratio, ((packed - exact) ** 2).sum(), (exact**2).sum()


def _round_trip(codec, method: Method, x: Array) -> Array:
    """Encodes and decodes all tokens, in pages; the last one is filled up with its last token."""
    h, t, d = x.shape
    page = method.layout.page
    padded = jnp.pad(x, ((0, 0), (0, -t % page), (0, 0)), mode="edge")
    pages = padded.reshape(1, h, -1, page, d)
    positions = jnp.arange(padded.shape[1]).reshape(1, 1, -1, page)
    return codec.decode(codec.encode(pages, positions)).reshape(h, -1, d)[:, :t]


def _attention(q, k, v, seen):
    logits = jnp.einsum("hgnd,htd->hgnt", q, k)
    p = jax.nn.softmax(jnp.where(seen, logits, -jnp.inf), -1)
    return jnp.einsum("hgnt,htd->hgnd", p, v), logits


def _spread(x: Array, seen: Array) -> Array:
    """Mean variance over the tokens seen: `[h, g, n, t] -> [h, g]`."""
    count = seen.sum(-1)
    mean = jnp.where(seen, x, 0).sum(-1, keepdims=True) / count[:, None]
    return (jnp.where(seen, (x - mean) ** 2, 0).sum(-1) / count).mean(-1)
