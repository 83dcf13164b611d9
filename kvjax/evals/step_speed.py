"""Whole decode steps of a model with random weights: tokens per second by cache, on one device.

A part of `python -m pallas_kernels.bench --device gpu`: all 32 layers of the shape of Llama 3.1 8B
in bf16, through `kvjax.generate`, appending and encoding included. Weights and history are random:
what a step costs does not depend on text. Two questions:

  step/...    one sequence, 8K to 128K tokens of context: all caches in the same rounds
  batch/...   the largest batch whose caches fit a fixed budget at 32K, each cache alone in memory
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

import kvjax
from kvjax.attention import packed_kernel
from kvjax.cache import Cache, cache_bytes
from kvjax.core.method import Method
from kvjax.core.rng import fold
from kvjax.evals.attend_error import attend_error
from kvjax.evals.random_cache import random_cache
from kvjax.evals.random_model import random_params
from kvjax.generate.loop import State, advance
from kvjax.generate.plan import Plan, init_caches, make_plan
from kvjax.models.config import ModelConfig, known_configs
from kvjax.models.decoder import Params
from pallas_kernels.bench.setting import Room, Setting, attempt
from pallas_kernels.bench.timing import Program, race

Row = dict[str, Any]
Array = jax.Array

BASE = "bf16"
METHODS = (BASE, "int4", "turboquant-3", "turboquant-2")
CONTEXTS = (8192, 32768, 131072)
BATCH_CONTEXT = 32768
BUDGET = 60e9  # bytes of caches, beside the weights
ROUNDS = 3
MOST_ROWS = 256  # sequences of a batch
CHECKED, TOLERANCE = 1024, 2e-2  # tokens and largest error of the check before


@dataclasses.dataclass(frozen=True)
class Scale:
    """What is measured: everything that a tiny run has smaller."""

    config: ModelConfig
    methods: tuple[str, ...]
    contexts: tuple[int, ...]
    batch_context: int
    budget: float
    dtype: Any


def _scale(tiny: bool) -> Scale:
    config = known_configs()["llama-3.1-8b"]
    if not tiny:  # no end of text, and room for the steps after 128K
        config = dataclasses.replace(config, eos_ids=(), max_positions=2**18)
        return Scale(config, METHODS, CONTEXTS, BATCH_CONTEXT, BUDGET, jnp.bfloat16)
    sizes: dict[str, Any] = {
        "layers": 2,
        "d_model": 32,
        "d_ff": 64,
        "q_heads": 2,
        "kv_heads": 1,
        "head_dim": 16,
    }
    sizes |= {"vocab_size": 50, "eos_ids": (), "windows": (), "rope_scaling": None}
    config = dataclasses.replace(config, **sizes)
    return Scale(config, (BASE, "int4"), (150,), 150, 3e5, jnp.float32)


def _name(kind: str, tokens: int, method: str) -> str:
    return f"{kind}/t{tokens}/{method}"


def units(tiny: bool) -> list[str]:
    """Ids of all rows."""
    scale = _scale(tiny)
    steps = [_name("step", t, m) for t in scale.contexts for m in scale.methods]
    batches = scale.methods[-1:] if tiny else scale.methods
    return steps + [_name("batch", scale.batch_context, m) for m in batches]


def measure(wanted: Sequence[str], setting: Setting) -> Iterator[list[Row]]:
    """By context, then batch by batch."""
    scale = _scale(setting.tiny)
    weights = 2 * scale.config.weight_count()
    reason = Room().take(weights)
    if reason:
        yield [{"id": name, "skipped": f"weights: {reason}"} for name in wanted]
        return
    params = random_params(scale.config, jax.random.key(0), scale.dtype)
    for tokens in scale.contexts:
        names = [m for m in scale.methods if _name("step", tokens, m) in wanted]
        if names:
            both = [BASE, *(m for m in names if m != BASE)]
            yield _context(scale, params, tokens, both, setting)
    rows: dict[str, Row] = {}
    for name in scale.methods:
        if _name("batch", scale.batch_context, name) in wanted:
            rows[name] = _largest_batch(scale, params, name, setting)
            base = rows.get(BASE, {}).get("tokens/s")
            if base and "tokens/s" in rows[name]:
                rows[name]["x_bf16"] = rows[name]["tokens/s"] / base
            yield [rows[name]]


def _context(scale: Scale, params: Params, tokens: int, names, setting: Setting) -> list[Row]:
    room = Room()
    setups = [Setup.make(scale, name, 1, tokens, setting) for name in names]
    rows = {s.name: {"id": _name("step", tokens, s.name)} for s in setups}
    return _race(scale, params, setups, rows, room, setting)


def _largest_batch(scale: Scale, params: Params, name: str, setting: Setting) -> Row:
    """The largest batch within the budget, and how many tokens it makes per second."""
    tokens = scale.batch_context
    one, two = (Setup.make(scale, name, b, tokens, setting).bytes for b in (1, 2))
    batch = min(MOST_ROWS, int((scale.budget - one) // (two - one)) + 1)
    row: Row = {"id": _name("batch", tokens, name), "batch": batch}
    if batch < 1:
        return row | {"skipped": f"one sequence takes {one / 1e9:.1f} GB"}
    setup = Setup.make(scale, name, batch, tokens, setting)
    return _race(scale, params, [setup], {name: row}, Room(), setting)[0]


def _race(scale: Scale, params: Params, setups, rows, room: Room, setting: Setting) -> list[Row]:
    """Steps of several caches in the same rounds."""
    turns: dict[str, _Turn] = {}
    for setup in setups:
        row = rows[setup.name]
        row |= {"GB": setup.bytes / 1e9, "page": setup.steps, "attention": setup.attention()}
        reason = attempt(setup.wrong) or room.take(setup.bytes)
        made = reason or attempt(_Turn, setup, params)
        if isinstance(made, str):
            row["skipped"] = made
        else:
            turns[setup.name] = made
    programs = {
        n: Program(turn.run, turn.setup.steps, turn.setup.bytes) for n, turn in turns.items()
    }
    times = race(programs, rounds=_rounds(setting)) if programs else {}
    for name, time in times.items():
        if not turns[name].state.finite.all():
            rows[name]["skipped"] = "WRONG NUMBERS: keys or values that are not finite"
            continue
        batch = turns[name].setup.batch
        rows[name] |= {"ms": time.median * 1e3, "tokens/s": batch / time.median}
        if BASE in times and len(times) > 1:
            rows[name]["x_bf16"] = times[BASE].median / time.median
    return list(rows.values())


def _rounds(setting: Setting) -> int:
    return min(setting.rounds, ROUNDS)


@dataclasses.dataclass(frozen=True)
class Setup:
    """One cache of a model.

    Attributes:
      like: the shapes of the empty caches. length: tokens in them when the first turn begins.
      steps: of one turn, as many as a page has tokens: each turn encodes one page.
    """

    name: str
    plan: Plan
    method: Method
    batch: int
    length: int
    steps: int
    like: tuple[Cache, ...]

    @classmethod
    def make(cls, scale: Scale, name: str, batch: int, tokens: int, setting: Setting) -> Setup:
        """The setup of a method by its name."""
        method = kvjax.methods.get(name, head_dim=scale.config.head_dim)
        # Equal lengths: all sequences fill their pages at the same step.
        layout = dataclasses.replace(method.layout, encode_batch=batch)
        method = method.with_layout(layout)
        if jax.default_backend() != "cpu":
            method = method.transpose_values()
        plan = make_plan(scale.config, method)
        capacity = tokens + (_rounds(setting) + 1) * layout.page
        like = jax.eval_shape(
            functools.partial(init_caches, plan, batch=batch, capacity=capacity, dtype=scale.dtype)
        )
        return cls(name, plan, method, batch, tokens, layout.page, like)

    @property
    def bytes(self) -> int:
        """Of all caches."""
        return sum(map(cache_bytes, self.like))

    def attention(self) -> str:
        """What reads the codes."""
        group = self.plan.config.q_per_kv
        no = packed_kernel.why_not(self.method, group=group)
        kernel = packed_kernel.backend(self.method, group=group)
        return kernel or ("page scan" + (f": {no}" if no else ""))

    def wrong(self) -> str | None:
        """Why this cache is not measured, or None."""
        config = self.plan.config
        heads = (config.kv_heads, config.q_per_kv, config.head_dim)
        error = attend_error(self.method, heads, min(self.length, CHECKED))
        return None if error <= TOLERANCE else f"WRONG NUMBERS: error {error:.2g}"

    def fill(self) -> State:
        """A generation that has read so many tokens."""
        rng = jax.random.key(1)
        caches = (
            random_cache(self.method, cache, self.length, rng=fold(rng, i))
            for i, cache in enumerate(self.like)
        )
        return State(
            tuple(caches),
            token=jnp.arange(self.batch, dtype=jnp.int32),
            done=jnp.zeros(self.batch, bool),
            finite=jnp.ones((self.plan.config.layers, 2), bool),
            rng=rng,
            steps=jnp.int32(1),
        )


class _Turn:
    """Steps of one cache, each turn going on from where the last one ended."""

    def __init__(self, setup: Setup, params: Params):
        self.setup, self.params, self.state = setup, params, setup.fill()
        steps = _steps.lower(setup.plan, params, self.state, steps=setup.steps)
        self.ready = steps.compile()

    def run(self) -> None:
        """One turn."""
        self.state = jax.block_until_ready(self.ready(self.setup.plan, self.params, self.state))


@functools.partial(jax.jit, static_argnames="steps", donate_argnames="state")
def _steps(plan: Plan, params: Params, state: State, *, steps: int) -> State:
    return jax.lax.fori_loop(0, steps, lambda _, state: advance(plan, params, state), state)
