"""The needle part of experiments/long_context.py: one method, one layer, one context."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from long_context_layer import Layer, peak_memory, reset_peak

from kvjax.cache import cache_bytes, history_bits_per_value
from kvjax.core.errors import InputError
from kvjax.core.method import Method
from kvjax.core.rng import fold
from kvjax.evals.drawn_cache import empty_cache, filling, history_length, read_cache
from kvjax.evals.drawn_layer import draw_queries
from kvjax.evals.needles import (
    Direction,
    Finds,
    Margin,
    apart,
    mean_and_error,
    needle_finds,
    needle_pages,
    plain_finds,
)
from kvjax.parallel import ShardingRules

Row = dict[str, Any]

CLOSE = 5e-3  # nats, between the log-sum of codes as they were made and as they are read


def needle_row(
    method: Method,
    layer: Layer,
    *,
    context: int,
    queries: int,
    depths: tuple[float, ...],
    margins: Sequence[Margin],
    rules: ShardingRules,
    seed: int,
    direction: Direction,
) -> tuple[Row, Row]:
    """Numbers of a line, and what another run has otherwise.

    Raises:
      InputError: a cache that reads otherwise than its codes say.
    """
    rng = fold(jax.random.key(seed), "long context")
    rows = max(1, queries // layer.config.kv_heads)
    length = history_length(method.layout, context)
    q = draw_queries(layer.drawn, rng, rows, length)
    pages = needle_pages(depths, context, method.layout)
    cache = empty_cache(method, layer.drawn, context, rules)
    bits, total = history_bits_per_value(method, cache), cache_bytes(cache)
    given = {"rng": rng, "context": context, "apart": pages, "rules": rules}
    fill = filling(method, cache, layer.drawn, q, **given)
    block = fill.memory_analysis().temp_size_in_bytes
    del cache  # and made again, now that compiling takes no memory any more
    reset_peak()
    before, start = peak_memory(), time.perf_counter()
    cache = empty_cache(method, layer.drawn, context, rules)
    cache, tally = jax.block_until_ready(fill(method, cache, layer.drawn, q, rng, pages))
    run: Row = {"fill_seconds": round(time.perf_counter() - start, 2)}
    if before is not None:
        run["fill_peak_bytes"] = (peak_memory() or before) - before
    read = read_cache(method, cache, q, apart=pages, rules=rules)
    tally, read = jax.device_get((tally, read))
    off = float(np.abs(read.lse - tally.read_lse).max())
    if not off < CLOSE:
        raise InputError(
            f"method {method.name}",
            got=f"log-sums that differ by {off:.2g} between codes and cache",
            expected=f"less than {CLOSE:g}",
            fix="report it: the cache is not what was encoded",
        )
    part = apart(method, layer.drawn, q, rng, pages)
    whole, error = jax.device_get(plain_finds(tally, read, part))
    nats = np.array([margin.at(context) for margin in margins], np.float32)
    finds = jax.device_get(
        needle_finds(
            method, layer.drawn, q, tally, read, part, rng=rng, margins=nats, direction=direction
        )
    )
    values = 2 * layer.config.kv_heads * layer.config.head_dim * length
    return {
        "bits_per_value": bits,
        "bits_per_value_total": 8 * total / values,
        "cache_bytes": total,
        "bf16_bytes": 2 * values,
        "block_bytes": block,
        "queries": int(q.shape[0] * q.shape[1]),
        "log_sum": float(whole.exact.lse.mean()),
        "largest_share": float(np.exp(whole.top - whole.exact.lse).mean()),
        **_pair("kl", whole.kl),
        **_pair("error", error),
        "needles": [
            {
                "nats": margin.nats,
                "base": margin.base,
                "margin": float(nats[i]),
                **_found(finds, i, depths),
            }
            for i, margin in enumerate(margins)
        ],
    }, run | {"read_off": off}


def _found(finds: Finds, i: int, depths: Sequence[float]) -> Row:
    """Means of one margin, over depths and queries."""
    of = {name: getattr(finds, name)[i] for name in ("share", "read_share", "top", "error", "kl")}
    row: Row = {}
    for name, a in of.items():
        row |= _pair(name, a, (0,))
    return {
        **row,
        "length": float(finds.length[i].mean()),
        "top_by_depth": {
            f"{depth:g}": float(np.mean(at)) for depth, at in zip(depths, of["top"], strict=True)
        },
    }


def _pair(name: str, a: np.ndarray, axes: tuple[int, ...] = ()) -> Row:
    mean, error = mean_and_error(a, axes)
    return {name: mean, f"{name}_se": error if np.isfinite(error) else None}
