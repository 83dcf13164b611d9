"""The contract of every eviction policy: what it sees of a layer, and the scores it gives."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from kvjax.attention.probe_kernel import backend, column_scores
from kvjax.core.codec import Array
from kvjax.core.method import Attention
from kvjax.core.pytree import pytree, static

EMPTY = -1e30  # score of a slot that holds no token: below any real one, and finite


@pytree
class Seen:
    """What a policy sees of one layer: candidates, and the queries that judge them.

    Queries are those of the block that was just appended, or of a probe (a prompt that is fed to
    judge the cache, and forgotten). All of it is exact; codes are made after the choice.

    Attributes:
      key, value: `[b, h, s, d]` float32, keys after RoPE.
      positions: `[b, h, s]` int32, logical position of each candidate, -1 where the slot is empty.
      query: `[b, h, g, t, d]` float32, after RoPE and times the attention scale: logits are q . k.
      query_positions: `[b, t]` int32, -1 for padding. Those of a probe come after all candidates.
      mass: `[b, h, s]` float32, what the policy has noted of each token; it moves with the token.
      memory: what else the policy has noted of the layer; leaves lead with b.
      frequencies: `[d / 2]` float32, radians per position of each rotated pair (i, i + d / 2).
      attention: what `columns` runs as: "auto" is a fused kernel on a GPU and XLA elsewhere; the
        others insist, as those of a `Method` do.
    """

    key: Array
    value: Array
    positions: Array
    query: Array
    query_positions: Array
    mass: Array
    memory: Any
    frequencies: Array
    attention: Attention = static(default="auto")

    @property
    def real(self) -> Array:
        """`[b, h, s]` bool: slots that hold a token."""
        return self.positions >= 0


@pytree
class Policy:
    """Scores tokens; those with the highest scores stay. Sink, recent tokens, budgets and storage
    are none of its business: see `Eviction`.

    A new policy is `score`, and `observe` where it keeps count over the blocks (and then `notes`).
    `score` is for every slot, empty ones too (these are dropped by the caller); larger is better;
    finite.

    Attributes:
      needs: what `score` reads beyond keys, values and positions: "queries" (of the block or of the
        probe), "probe" (a prompt of its own, fed after each block).
      window: newest tokens that the policy itself always keeps.
      shared: whether all heads of a layer keep the same tokens.
      notes: what it writes to `mass`: the "attention" that a token has gathered, its "verdict" on
        it, or nothing.
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    @property
    def window(self) -> int:
        return 0

    @property
    def shared(self) -> bool:
        return False

    @property
    def notes(self) -> Literal["attention", "verdict"] | None:
        return None

    def score(self, seen: Seen) -> Array:
        """`[b, h, s]` float32."""
        raise NotImplementedError

    def observe(self, seen: Seen) -> tuple[Array, Any]:
        """New `mass` and `memory`, before `score` is called for the block."""
        return seen.mass, seen.memory

    def start(self, b: int, h: int, g: int, d: int) -> Any:
        """The `memory` of a layer that has seen nothing."""
        del b, h, g, d
        return ()


@pytree
class Columns:
    """What queries pay to each candidate, `[b, h, s]` float32: no [t, s] matrix is ever whole.

    Attributes:
      total: sum of softmax weights over queries, mean over the query heads of a KV head.
      peak: largest softmax weight over queries and query heads.
      queries: how many queries could see the candidate.
    """

    total: Array
    peak: Array
    queries: Array


def columns(seen: Seen, *, last: int | None = None, chunk: int = 128) -> Columns:
    """Softmax of every query over the candidates that it can see, summed up by candidate.

    Args:
      last: only the newest so many (real) queries of each sequence.
      chunk: queries at a time; the kernel on a GPU takes all.

    Example:
      >>> import jax.numpy as jnp
      >>> one = jnp.ones((1, 1, 2, 4))
      >>> at = jnp.arange(2)[None, None]
      >>> seen = Seen(one, one, at, one[:, :, None], at[0], at * 0.0, (), jnp.ones(2))
      >>> columns(seen).total[0, 0]
      Array([1.5, 0.5], dtype=float32)
    """
    query, at = seen.query, seen.query_positions
    if last is not None:
        at, newest = jax.lax.top_k(at, min(last, at.shape[-1]))
        query = jnp.take_along_axis(query, newest[:, None, None, :, None], axis=3)
    how = backend(seen.attention, query, seen.key)
    if how is not None:
        return Columns(*column_scores(query, at, seen.key, seen.positions, backend=how))
    b, h, g, t, d = query.shape
    chunk = min(chunk, t)
    pad = -t % chunk
    query = jnp.pad(query, [(0, 0)] * 3 + [(0, pad), (0, 0)])
    at = jnp.pad(at, [(0, 0), (0, pad)], constant_values=-1)
    pieces = (
        jnp.moveaxis(query.reshape(b, h, g, -1, chunk, d), 3, 0),
        jnp.moveaxis(at.reshape(b, -1, chunk), 1, 0),
    )

    def one(carry, piece):
        weights, visible = attention(seen, *piece)
        total = carry.total + weights.mean(2).sum(2)
        peak = jnp.maximum(carry.peak, weights.max((2, 3)))
        queries = carry.queries + visible.sum(2)
        return Columns(total, peak, queries), None

    zero = jnp.zeros(seen.positions.shape, jnp.float32)
    return jax.lax.scan(one, Columns(zero, zero, zero), pieces)[0]


def attention(seen: Seen, query: Array, at: Array) -> tuple[Array, Array]:
    """Softmax weights of some queries over the candidates.

    Args:
      query: `[b, h, g, n, d]`. at: `[b, n]`, their positions, -1 for padding.
    Returns:
      Weights `[b, h, g, n, s]` (0 for padding), and which candidates each query sees,
      bool `[b, h, n, s]`.
    """
    logits = jnp.einsum("bhgnd,bhsd->bhgns", query, seen.key, preferred_element_type=jnp.float32)
    rows = at[:, None, :, None]
    visible = seen.real[:, :, None] & (seen.positions[:, :, None] <= rows) & (rows >= 0)
    logits = jnp.where(visible[:, :, None], logits, EMPTY)
    top = logits.max(-1, keepdims=True)
    weights = jnp.where(visible[:, :, None], jnp.exp(logits - top), 0.0)
    return weights / jnp.maximum(weights.sum(-1, keepdims=True), 1e-30), visible
