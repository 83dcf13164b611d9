"""Decode speed of several methods, interleaved in one run: what is disturbed is disturbed alike."""

from __future__ import annotations

import time

import jax
import numpy as np

from kvjax.generate.loop import State, step
from kvjax.generate.plan import Plan
from kvjax.models.decoder import Params


def race(
    contenders: dict[str, tuple[Plan, State]], params: Params, *, rounds: int, steps: int
) -> dict[str, float]:
    """Median seconds per decode step of each contender.

    Args:
      contenders: by name, a plan and a state whose caches hold the context; the caches have room
        for `(rounds + 1) * steps` more tokens. The states are used up.
      rounds: how often everyone has a turn of `steps` steps.
    """
    states = {name: state for name, (_, state) in contenders.items()}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        for name, (plan, _) in contenders.items():
            for _ in range(steps):
                begin = time.perf_counter()
                states[name] = jax.block_until_ready(step(plan, params, states[name]))
                if turn:  # the first turn compiles and warms up
                    seconds[name].append(time.perf_counter() - begin)
    return {name: float(np.median(times)) for name, times in seconds.items()}
