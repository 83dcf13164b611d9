"""Time of device programs: long loops that wait at their end, in rounds where all take turns."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
Name = TypeVar("Name")

CACHE_BYTES = 4 * 60e6  # inputs that turn over more than this are not served by a GPU's L2 cache
SHORTEST = 15e-6  # seconds that one call takes at least, launches included: only to size loops
A_TRACE = 1e-30  # what a result adds to the next query: too little for a float32 to show


@dataclasses.dataclass(frozen=True)
class Program:
    """Something to measure.

    Attributes:
      run: does the work `times` times, waits for it, and gives the last output.
      bytes: read and written by one of them.
    """

    run: Callable[[], Any]
    times: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class Seconds:
    """Of one time: the median of all rounds and the quartiles."""

    median: float
    low: float
    high: float
    rounds: int


def race(programs: Mapping[Name, Program], *, rounds: int) -> dict[Name, Seconds]:
    """All programs once per round, forwards and backwards in turn, after a round to warm up: what
    is disturbed is disturbed alike."""
    spent: dict[Name, list[float]] = {name: [] for name in programs}
    for turn in range(rounds + 1):
        for name in list(programs)[:: 1 if turn % 2 else -1]:
            begin = time.perf_counter()
            programs[name].run()
            if turn:
                spent[name].append((time.perf_counter() - begin) / programs[name].times)
    quartiles = {name: np.percentile(s, [50, 25, 75]).tolist() for name, s in spent.items()}
    return {name: Seconds(m, low, high, rounds) for name, (m, low, high) in quartiles.items()}


def feed(q: Array, out: Array) -> Array:
    """The same query, which to a compiler depends on all that the last one found: calls of a loop
    can neither be moved out of it, nor cut down, nor run side by side."""
    trace = out if out.shape == q.shape else out.max(-1, keepdims=True)
    return q + (trace * A_TRACE).astype(q.dtype)


def copies_of(size: int) -> int:
    """How many copies of inputs of so many bytes a loop has to rotate over."""
    return max(1, -(-int(CACHE_BYTES) // max(size, 1)))


def turns(size: int, copies: int, *, seconds: float, bandwidth: float) -> int:
    """Calls, a multiple of the copies, that take about so many seconds or more."""
    wanted = seconds / max(size / bandwidth, SHORTEST)
    return copies * max(1, round(wanted / copies))


def program(
    step: Callable[[Array, Any, Any], Array], q: Array, arrays: Any, times: int, size: int
) -> Program:
    """`times` calls of `step(q, arrays, i)` in one compiled loop, i the number of the call; its
    run gives the output of the last."""

    def run(q, arrays):
        def body(i, carry):
            q, _ = carry
            out = step(q, arrays, i)
            return feed(q, out), out

        return _loop(times, body, q, lambda: step(q, arrays, 0))

    return _compiled(run, q, arrays, times, size)


def unrolled(
    step: Callable[..., Array], q: Array, copies: list[Any], times: int, size: int
) -> Program:
    """`times` calls of `step(q, *copies[i])`, all copies after one another in the loop's body: what
    cannot read a slice in place is not charged for cutting it out."""
    loops = times // len(copies)

    def run(q, copies):
        def body(_, carry):
            q, out = carry
            for arrays in copies:
                out = step(q, *arrays)
                q = feed(q, out)
            return q, out

        return _loop(loops, body, q, lambda: step(q, *copies[0]))

    return _compiled(run, q, copies, loops * len(copies), size)


def copy_program(size: int, *, seconds: float, bandwidth: float) -> Program:
    """A copy of `size` bytes in place, `x + 1`: every byte is read and written."""
    x = jnp.arange(size // 4, dtype=jnp.uint32)
    times = turns(2 * size, 1, seconds=seconds, bandwidth=bandwidth)
    run = lambda x, _: jax.lax.fori_loop(0, times, lambda _, x: x + 1, x)
    return _compiled(run, x, (), times, 2 * size)


def _loop(times: int, body: Callable, q: Array, out: Callable[[], Array]) -> Array:
    empty = jax.eval_shape(out)
    return jax.lax.fori_loop(0, times, body, (q, jnp.zeros(empty.shape, empty.dtype)))[1]


def _compiled(run: Callable, x: Array, arrays: Any, times: int, size: int) -> Program:
    ready = jax.jit(run).lower(x, arrays).compile()
    return Program(lambda: jax.block_until_ready(ready(x, arrays)), times, size)
