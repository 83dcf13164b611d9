"""How much each layer's keys depend on what block-wise reading hides: what layer budgets follow."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from kvjax.core.errors import InputError
from kvjax.episodes.budgets import key_similarity
from kvjax.models.causal import empty_records, masked_softmax, recording
from kvjax.models.config import ModelConfig, layer_runs
from kvjax.models.decoder import Params, decode_layers

Array = jax.Array
_ROWS = 256  # queries at a time


def layer_similarity(
    params: Params,
    config: ModelConfig,
    tokens: Array | np.ndarray,
    *,
    block: int,
    sink: int = 128,
    before: float = 0.5,
    window: int = 1,
) -> np.ndarray:
    """Cosine of every layer's keys, read whole and read block by block; give it to `layer_budgets`.

    Read block by block, a token sees the first `sink` tokens, its own block so far, and the last
    part of the block before. Layers whose keys change most want the largest budgets.

    Args:
      tokens: int32 `[t]`, some thousand tokens of any text: one sample is enough (paper, fig. 9).
      block: tokens per block.
      before: share of the previous block that is seen.
      window: tokens whose keys are compared as one vector: 1 in the paper, 100 in its code.

    Returns:
      float64 `[l]`, one for each layer of the model, those with a sliding window too.

    Source: EpiCache (arXiv 2509.17396), section 3.2. Its code has blocks of 4096, sinks of 128,
    half of the previous block, windows of 100.

    Raises:
      InputError: no more tokens than a block (nothing would be hidden), or numbers that make no
        sense.
    """
    tokens = jnp.asarray(tokens, jnp.int32)
    if tokens.ndim != 1 or tokens.shape[0] <= block or block < 1 or sink < 0:
        raise InputError(
            "tokens",
            got=f"shape {tokens.shape}, block {block}, sink {sink}",
            expected="one sequence of more tokens than a block",
            fix="give more text, or a smaller block",
        )
    if not 0 <= before <= 1:
        raise InputError("before", got=before, expected="0 to 1", fix="the paper's is 0.5")
    reach = round(before * block)
    read = functools.partial(keys_by_block, params, config, tokens, block=block)
    whole, hidden = read(sink=len(tokens), reach=0), read(sink=sink, reach=reach)
    return np.asarray(key_similarity(whole[:, 0], hidden[:, 0], window), np.float64)


@functools.partial(jax.jit, static_argnames="config")
def keys_by_block(params, config, tokens, *, block: int, sink: int, reach: int) -> Array:
    """Keys after RoPE `[l, 1, h, t, d]` where tokens see what block-wise reading leaves them; one
    program for all blocks, sinks (of all tokens: everything is seen) and reaches."""
    runs, t = layer_runs(config), tokens.shape[0]
    positions = jnp.arange(t)
    pad = -t % _ROWS

    def look(run, layer, cache, q, k, v, extra):
        del layer, extra
        width = runs[run].window

        def rows(part):
            q, at = part  # [1, s, h, g, d], [s]
            seen = visible(at, positions, block, sink, reach)
            if width is not None:
                seen &= at[:, None] - positions < width
            scores = jnp.einsum("bshgd,bthd->bhgst", q, k, preferred_element_type=jnp.float32)
            weights = masked_softmax(scores, seen)
            return jnp.einsum("bhgst,bthd->bshgd", weights.astype(v.dtype), v)

        padded = jnp.pad(q, [(0, 0), (0, pad), (0, 0), (0, 0), (0, 0)])
        parts = jnp.moveaxis(padded.reshape(1, -1, _ROWS, *q.shape[2:]), 1, 0)
        at = jnp.pad(positions, (0, pad)).reshape(-1, _ROWS)
        out = lax.map(rows, (parts, at))
        return jnp.moveaxis(out, 0, 1).reshape(1, t + pad, *q.shape[2:])[:, :t], cache

    records = empty_records(config, runs, 1, t, params.embed.dtype)
    caches = tuple((None, record) for record in records)
    _, caches, _ = decode_layers(
        params, config, tokens[None], positions[None], recording(look), caches
    )
    return jnp.concatenate([record.key for _, record in caches])


def visible(
    rows: Array, columns: Array, block: int | Array, sink: int | Array, reach: int | Array
) -> Array:
    """Which columns each row sees, bool `[s, t]`.

    Example:
      >>> import jax.numpy as jnp
      >>> visible(jnp.array([5]), jnp.arange(6), block=4, sink=1, reach=1)[0].astype(int)
      Array([1, 0, 0, 1, 1, 1], dtype=int32)
    """
    start = rows[:, None] // block * block  # of the row's own block
    return (columns <= rows[:, None]) & ((columns < sink) | (columns >= start - reach))
