"""The speed part of experiments/long_context.py: decode steps of one layer, in the same rounds."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import kvjax
from kvjax.cache import Cache, cache_bytes, history_bits_per_value
from kvjax.core.method import Method
from kvjax.core.rng import fold
from kvjax.evals.drawn_cache import history_length
from kvjax.evals.random_cache import random_cache
from kvjax.models.config import ModelConfig

Row = dict[str, Any]

TURN = 65536  # tokens that the steps of one turn read in all, or one step if that is more


def step_times(
    methods: Mapping[str, Method], shape: ModelConfig, context: int, *, rounds: int, seed: int
) -> tuple[Row, Row]:
    """Sizes by method; and milliseconds of a step of one layer, the token appended and attended to,
    by method: medians over rounds in which all take turns, of the clock ("ms", with quartiles) and
    of the cores' time that the process got ("cpu_ms"), which others on the machine disturb less.
    Tokens are random.
    """
    steps = max(1, TURN // context)
    turns = {
        name: _Turns(method, shape, context, steps, rounds, seed)
        for name, method in methods.items()
    }
    spent: dict[str, list[tuple[float, float]]] = {name: [] for name in turns}
    for count in range(rounds + 1):
        for name in list(turns)[:: 1 if count % 2 else -1]:
            clock, cores = time.perf_counter(), time.process_time()
            turns[name].run()
            if count:  # the first round warms up
                both = time.perf_counter() - clock, time.process_time() - cores
                spent[name].append(both)
    found = {}
    for name, seconds in spent.items():
        if not turns[name].finite():
            raise RuntimeError(f"{name}: attention over {context} tokens is not finite")
        ms = 1e3 * np.array(seconds).T / steps
        median, low, high = np.percentile(ms[0], [50, 25, 75]).tolist()
        cpu = float(np.median(ms[1]))
        found[name] = {"ms": median, "ms_low": low, "ms_high": high, "cpu_ms": cpu}
    return {name: turn.sizes for name, turn in turns.items()}, found


class _Turns:
    """Steps over one cache, each turn going on from where the last one ended."""

    def __init__(
        self, method: Method, shape: ModelConfig, context: int, steps: int, rounds: int, seed: int
    ):
        length = history_length(method.layout, context)
        h, g, d = shape.kv_heads, shape.q_per_kv, shape.head_dim
        capacity = length + steps * (rounds + 1)
        make = lambda: kvjax.init(method, capacity=capacity, kv_heads=h, head_dim=d)
        rng = fold(jax.random.key(seed), "speed")
        self.method, self.steps = method, steps
        self.cache = random_cache(method, jax.eval_shape(make), length, rng=rng)
        exact = jax.eval_shape(lambda: kvjax.init(method, capacity=length, kv_heads=h, head_dim=d))
        self.sizes = {
            "cache_bytes": cache_bytes(exact),
            "bits_per_value": history_bits_per_value(method, exact),
        }
        self.q = jax.random.normal(fold(rng, "query"), (1, h, g, d))
        self.kv = jax.random.normal(fold(rng, "token"), (1, h, d))
        step = jax.jit(_step, donate_argnames="cache")
        self.ready = step.lower(method, self.cache, self.q, self.kv).compile()
        self.out: jax.Array | None = None

    def run(self) -> None:
        """One turn."""
        for _ in range(self.steps):
            self.cache, self.out = self.ready(self.method, self.cache, self.q, self.kv)
        jax.block_until_ready(self.out)

    def finite(self) -> bool:
        """Whether the last output is a number."""
        assert self.out is not None
        return bool(jnp.isfinite(self.out).all())


def _step(method: Method, cache: Cache, q: jax.Array, kv: jax.Array):
    cache = kvjax.append(method, cache, kv, kv)
    return cache, kvjax.attend(method, cache, q)


@dataclasses.dataclass(frozen=True)
class Slope:
    """Time of a step as a line over contexts.

    Attributes:
      ns: nanoseconds per token of context. base: milliseconds at none.
      worst: the largest deviation of a measurement from the line, relative.
    """

    ns: float
    base: float
    worst: float


def fit_slope(contexts: Sequence[int], ms: Sequence[float]) -> Slope:
    """The line of least squares of relative errors.

    Example:
      >>> fit_slope([1000, 2000, 4000], [2.0, 3.0, 5.0])
      Slope(ns=1000.0, base=1.0, worst=0.0)
    """
    x, y = np.asarray(contexts, float), np.asarray(ms, float)
    lines = np.stack([x / y, 1 / y], 1)
    slope, base = np.linalg.lstsq(lines, np.ones(len(x)), rcond=None)[0].tolist()
    worst = float(np.abs((slope * x + base) / y - 1).max())
    return Slope(round(1e6 * slope, 3), round(base, 6), round(worst, 6))
