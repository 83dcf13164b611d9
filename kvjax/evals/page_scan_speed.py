"""Decode attention on a CPU: the page scan over packed codes against dense bf16 attention of XLA.

A part of `python -m pallas_kernels.bench --device cpu`: one query of 32 heads, 8 KV heads of 128
channels, one layer; `kvjax.attend` as a model calls it, windows and sink included.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

import kvjax
from kvjax.cache import Cache
from kvjax.core.method import Method
from kvjax.evals.attend_error import attend_error, filled
from pallas_kernels.bench.baselines import xla
from pallas_kernels.bench.setting import Setting
from pallas_kernels.bench.timing import Program, race

Row = dict[str, Any]

KV_HEADS, GROUP, HEAD_DIM = 8, 4, 128
DENSE = "dense-bf16"
METHODS = ("hadamard-int2", "turboquant-2", "kivi-2", "hadamard-int4", "turboquant-4", "bf16")
TOKENS = (32768, 131072)
# Time over that of dense bf16 that is asked for, by bits and tokens.
TARGETS: dict[tuple[int | None, int], float] = {
    (2, 32768): 0.6,
    (2, 131072): 0.8,
    (4, 32768): 0.9,
    (4, 131072): 0.9,
}
TOLERANCE = 5e-3  # of the largest output, against float64 over the decoded codes
CHECKED = 1024  # tokens of that check


def _shapes(tiny: bool) -> tuple[tuple[int, ...], tuple[str, ...], tuple[int, int, int]]:
    """Tokens, methods, and (KV heads, group, head_dim)."""
    if tiny:
        return (300,), ("hadamard-int2",), (1, 2, 32)
    return TOKENS, METHODS, (KV_HEADS, GROUP, HEAD_DIM)


def _name(tokens: int, name: str) -> str:
    return f"page-scan/t{tokens}/{name}"


def units(tiny: bool) -> list[str]:
    """Ids of all rows."""
    tokens, methods, _ = _shapes(tiny)
    return [_name(t, name) for t in tokens for name in (DENSE, *methods)]


def measure(wanted: Sequence[str], setting: Setting) -> Iterator[list[Row]]:
    """By context: the methods that are wanted and dense attention, in the same rounds."""
    contexts, names, heads = _shapes(setting.tiny)
    for tokens in contexts:
        mine = [name for name in names if _name(tokens, name) in wanted]
        if mine or _name(tokens, DENSE) in wanted:
            yield _context(tokens, mine, heads, setting)


def _context(tokens: int, names: list[str], heads, setting: Setting) -> list[Row]:
    h, g, d = heads
    rows: dict[str, Row] = {}
    q = jax.random.normal(jax.random.key(1), (1, h, g, d))
    programs = {DENSE: _dense(q, tokens)}
    for name in names:
        method = kvjax.methods.get(name, head_dim=d).with_attention("page_scan")
        error = attend_error(method, heads, min(tokens, CHECKED))
        rows[name] = {"id": _name(tokens, name), "error": error}
        if not error <= TOLERANCE:
            rows[name]["skipped"] = f"WRONG NUMBERS: error {error:.2g}, beyond {TOLERANCE:g}"
            continue
        cache = filled(method, tokens, heads)
        programs[name] = _packed(method, cache, q, tokens)
    times = race(programs, rounds=setting.rounds)
    rows = {DENSE: {"id": _name(tokens, DENSE)}, **rows}
    # The page scan over a bf16 cache is dense attention too, and can be the faster of the two.
    best = min(times[name].median for name in (DENSE, "bf16") if name in times)
    for name, time in times.items():
        ratio = time.median / times[DENSE].median
        target = TARGETS.get((_bits(name), tokens))
        rows[name] |= {
            "ms": time.median * 1e3,
            "ms_low": time.low * 1e3,
            "ms_high": time.high * 1e3,
            "MB": programs[name].bytes / 1e6,
            "of dense": ratio,
            "of best bf16": time.median / best,
            "target": target,
            "met": None if target is None else ("yes" if ratio <= target else "no"),
            "rounds": time.rounds,
        }
    return list(rows.values())


def _bits(name: str) -> int | None:
    return int(name[-1]) if name[-1] in "24" else None


def _packed(method: Method, cache: Cache, q: jax.Array, tokens: int) -> Program:
    ready = jax.jit(lambda cache, q: kvjax.attend(method, cache, q)).lower(cache, q).compile()
    size = sum(a.nbytes for a in cache.history())
    return Program(lambda: jax.block_until_ready(ready(cache, q)), 1, size)


def _dense(q: jax.Array, tokens: int) -> Program:
    _, h, _, d = q.shape
    draw = jax.jit(lambda rng: jax.random.normal(rng, (1, h, tokens, d), jnp.bfloat16))
    k, v = draw(jax.random.key(2)), draw(jax.random.key(3))
    q = q * d**-0.5
    ready = jax.jit(xla).lower(q, k, v).compile()
    return Program(lambda: jax.block_until_ready(ready(q, k, v)), 1, k.nbytes + v.nbytes)
