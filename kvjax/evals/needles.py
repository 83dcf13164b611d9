"""Needles: tokens that exact attention finds, and whether attention over codes finds them too.

A needle is one token of the history whose key is moved until its logit stands a stated margin above
the log-sum of all others:

    k' = k + (lse_rest + margin - q k) u,   q u = 1
    u = q / |q|^2       "query": the shortest way there
    u = C q / (q C q)   "likely": the likeliest, C the covariance of keys at that position

so that exact attention gives it the share `1 / (1 + exp(-margin))`. Its page is encoded anew, as it
would have been with that token in it. Every query has its own needles, one at a time: other tokens
stay as they are, so a single pass over the history serves all of them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.core.codec import Array
from kvjax.core.errors import InputError
from kvjax.core.layout import Layout
from kvjax.core.method import Method
from kvjax.core.partial import Partial
from kvjax.core.pytree import pytree
from kvjax.core.rng import fold
from kvjax.evals.drawn_cache import Tally, drawn_pages, encode_pages
from kvjax.evals.drawn_layer import DrawnLayer
from kvjax.models.decoder import apply_rope

Direction = Literal["query", "likely"]


@dataclasses.dataclass(frozen=True)
class Margin:
    """How far a needle's logit stands above the log-sum of the rest.

    Attributes:
      nats: the margin, at `base` tokens if it fades.
      base: None keeps the margin at all contexts: the needle's logit grows as the log-sum does,
        with the log of the context. A number of tokens keeps the needle's logit where that margin
        put it at `base` tokens: the margin falls by the log of the context.
    """

    nats: float
    base: int | None = None

    def at(self, context: int) -> float:
        """The margin at a context.

        Example:
          >>> Margin(2.0).at(2**20), round(Margin(2.0, base=2**13).at(2**20), 3)
          (2.0, -2.852)
        """
        return self.nats - (math.log(context / self.base) if self.base else 0.0)

    @property
    def name(self) -> str:
        """For tables."""
        return f"{self.nats:+g}" + (f" at {self.base}, fading" if self.base else "")


@pytree
class Finds:
    """Of needles: `[margins, depths, h, r]` each.

    Attributes:
      share, read_share: of exact attention and of that over codes, which the needle gets.
      top: whether the needle has the largest coded logit of all tokens.
      error: of the coded output, relative to the length of the exact one.
      kl: of coded from exact attention, over all tokens, in nats.
      length: of the needle's key, over the root mean square length of the keys of its page.
    """

    share: Array
    read_share: Array
    top: Array
    error: Array
    kl: Array
    length: Array


def needle_pages(depths: Sequence[float], context: int, layout: Layout) -> Array:
    """Pages at depths from 0, the oldest, to 1, the newest that is packed: `[n]` int32, rising.

    Raises:
      InputError: a depth beyond these, or two that share a page.

    Example:
      >>> needle_pages((0.0, 0.5, 1.0), 1024, Layout(page=64))
      Array([ 0,  8, 15], dtype=int32)
    """
    pages = [round(depth * (context // layout.page - 1)) for depth in depths]
    if not all(0 <= d <= 1 for d in depths) or sorted(set(pages)) != pages:
        raise InputError(
            "depths",
            got=f"{tuple(depths)} in {context} tokens",
            expected=f"rising numbers from 0 to 1 that fall on different pages of {layout.page}",
            fix="choose fewer, or a longer context",
        )
    return jnp.asarray(pages, jnp.int32)


@pytree
class Apart:
    """Pages that needles are put into, as they are without: t = n p tokens.

    Attributes:
      numbers: `[n]` int32, of the pages.
      k, v: `[h, t, d]` as drawn. read_v: `[h, t, d]` decoded.
      logits, read: `[h, r, t]`, exact and coded.
    """

    numbers: Array
    k: Array
    v: Array
    read_v: Array
    logits: Array
    read: Array


@jax.jit
def apart(method: Method, layer: DrawnLayer, q: Array, rng: Array, pages: Array) -> Apart:
    """The pages that `fill` and `read_cache` leave out, for queries `[h, r, d]`."""
    k, v = drawn_pages(layer, rng, pages, method.layout)  # [h, n, p, d]
    key, value = encode_pages(method, k, v, pages)
    read = method.key.logits(method.key.prepare(q[None, :, None]), key)[0]  # [h, n, r, p]
    flat = lambda a: a.reshape(a.shape[0], -1, a.shape[-1])
    k, v, read_v = flat(k), flat(v), flat(method.value.decode(value)[0])
    logits = jnp.einsum("hrd,htd->hrt", q, k)
    return Apart(pages, k, v, read_v, logits, read.swapaxes(1, 2).reshape(logits.shape))


@jax.jit
def plain_finds(tally: Tally, read: Partial, part: Apart) -> tuple[Tally, Array]:
    """The history as it was drawn, without a needle: the tally of all tokens, and the relative
    error of outputs, `[h, r]`.

    Args:
      tally, read: of `fill` and `read_cache`, both without the pages of `part`.
    """
    whole = tally.merge(Tally.of(part.logits, part.read, part.v, jnp.ones(part.v.shape[1], bool)))
    out = _joined(read, part.read, part.read_v)
    return whole, _error(out, whole.exact.out[..., :-1])


@functools.partial(jax.jit, static_argnames="direction")
def needle_finds(
    method: Method,
    layer: DrawnLayer,
    q: Array,
    tally: Tally,
    read: Partial,
    part: Apart,
    *,
    rng: Array,
    margins: Array,
    direction: Direction = "query",
) -> Finds:
    """What becomes of a needle on each page of `part`, at each margin, for each query.

    Args:
      q: `[h, r, d]`, scaled. tally, read: as of `plain_finds`.
      rng: for the token of a page that is the needle. margins: `[m]` nats, of `Margin.at`.
      direction: along which keys of needles are moved, see the top of this file.
    """
    h, r = q.shape[:2]
    n, p, m = part.numbers.shape[0], method.layout.page, margins.shape[0]
    places = jax.random.randint(fold(rng, "needles"), (n, h, r), 0, p)  # tokens of their pages

    def one(case):
        margin, page, place = case  # place [h, r]
        at = page * p + place
        own = jnp.arange(n * p) == at[..., None]  # [h, r, n * p]
        rest = tally.merge(Tally.of(part.logits, part.read, part.v, ~own))
        pick = lambda a: jnp.take_along_axis(a, at[..., None], 2)[..., 0]
        target = rest.exact.lse + margin
        step = target - pick(part.logits)
        number = jax.lax.dynamic_slice_in_dim(part.numbers, page, 1)
        along = _along(layer, q, method.layout.sink + p * number + place, direction)
        keys = jax.lax.dynamic_slice_in_dim(part.k, page * p, p, 1)  # [h, p, d]
        here = jnp.arange(p)[:, None] == place[..., None, None]  # [h, r, p, 1]
        moved = keys[:, None] + jnp.where(here, (step[..., None] * along)[:, :, None], 0.0)
        # Queries in the place of a batch: heads stay where codecs look for them.
        batch = lambda a: a.swapaxes(0, 1)[:, :, None]  # [h, r, ...] -> [r, h, 1, ...]
        code = _encode_each(method, batch(moved), number)
        coded = method.key.logits(method.key.prepare(batch(q)[..., None, :]), code)
        coded = coded[:, :, 0, 0].swapaxes(0, 1)  # [h, r, p]
        put = lambda a, new: jax.lax.dynamic_update_slice_in_dim(a, new, page * p, 2)
        read_all, exact_all = put(part.read, coded), jnp.where(own, target[..., None], part.logits)
        everything = jnp.ones(n * p, bool)
        whole = tally.merge(Tally.of(exact_all, read_all, part.v, everything))
        out = _joined(read, read_all, part.read_v)
        others = jnp.where(own, -jnp.inf, read_all).max(-1)
        needle = pick(read_all)
        key = jnp.take_along_axis(moved, place[..., None, None], 2)[:, :, 0]
        usual = jnp.sqrt((keys**2).sum(-1).mean(-1))  # [h]
        return Finds(
            share=jnp.exp(target - whole.exact.lse),
            read_share=jnp.exp(needle - whole.read_lse),
            top=needle > jnp.maximum(others, tally.read_top),
            error=_error(out, whole.exact.out[..., :-1]),
            kl=whole.kl,
            length=jnp.sqrt((key**2).sum(-1)) / usual[:, None],
        )

    cases = (
        jnp.repeat(margins, n),
        jnp.tile(jnp.arange(n), m),
        jnp.tile(places, (m, 1, 1)),
    )
    found = jax.lax.map(one, cases)
    return jax.tree.map(lambda a: a.reshape(m, n, h, r), found)


def _along(layer: DrawnLayer, q: Array, positions: Array, direction: Direction) -> Array:
    """The u of queries `[h, r, d]` and needles at positions `[h, r]`."""
    moved = q
    if direction == "likely":
        angles = positions[..., None].astype(jnp.float32) * layer.frequencies
        cos, sin = jnp.cos(angles), jnp.sin(angles)
        half = jnp.einsum("hed,hre->hrd", layer.key_root, apply_rope(q, cos, -sin))
        moved = apply_rope(jnp.einsum("hde,hre->hrd", layer.key_root, half), cos, sin)
    return moved / (moved * q).sum(-1, keepdims=True)


def _encode_each(method: Method, k: Array, page: Array):
    """Key codes of `[r, h, 1, p, d]`, all of one page."""
    layout = method.layout
    at = layout.sink + layout.page * page[:, None] + jnp.arange(layout.page)  # [1, p]
    wide = k.astype(jnp.bfloat16).astype(jnp.float32)
    return method.key.encode(wide, jnp.broadcast_to(at, (k.shape[0], 1, 1, layout.page)))


def _joined(read: Partial, logits: Array, values: Array) -> Array:
    """Outputs `[h, r, d]` over what was read and tokens beside it."""
    top = logits.max(-1)
    p = jnp.exp(logits - top[..., None])
    total = p.sum(-1)
    beside = Partial((p @ values) / total[..., None], top + jnp.log(total))
    return read.merge(beside).out


def _error(out: Array, right: Array) -> Array:
    return jnp.sqrt(((out - right) ** 2).sum(-1) / (right**2).sum(-1))


def mean_and_error(x: np.ndarray, axes: tuple[int, ...] = ()) -> tuple[float, float]:
    """Mean, and its standard error over queries (the last two axes), which are drawn apart; the
    `axes` before, of one query each, are averaged first.

    Example:
      >>> mean_and_error(np.array([[1.0, 3.0]]))
      (2.0, 1.0)
    """
    each = np.asarray(x, np.float64).mean(axes) if axes else np.asarray(x, np.float64)
    n = each.size
    return float(each.mean()), float(each.std(ddof=1) / math.sqrt(n)) if n > 1 else math.nan
