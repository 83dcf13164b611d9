"""Whole generations under one jit: blockwise prefill, then a step per token."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.cache import Cache
from kvjax.core.errors import InputError
from kvjax.core.pytree import pytree
from kvjax.core.rng import fold
from kvjax.generate.plan import Plan, block_size, forward_block, init_caches
from kvjax.models.decoder import Params, logits

Array = jax.Array


@pytree
class State:
    """A generation between two tokens.

    Attributes:
      caches: one per run of layers.
      token: `[b]` int32, the token to feed next.
      done: `[b]` bool, sequences that have ended.
      finite: bool `[layers, 2]`, whether all keys and values so far were finite.
      rng: key for sampling; step n uses `fold(rng, n)`.
      steps: int32, tokens sampled so far.
    """

    caches: tuple[Cache, ...]
    token: Array
    done: Array
    finite: Array
    rng: Array
    steps: Array


def pad_prompts(prompts: Sequence[Sequence[int]], block: int) -> tuple[np.ndarray, np.ndarray]:
    """Ragged prompts as int32 `[b, T]`, T a multiple of `block`, and their lengths `[b]`."""
    lengths = np.array([len(p) for p in prompts], np.int32)
    if lengths.size == 0 or lengths.min() < 1:
        raise InputError("prompt", got="no tokens", expected="at least one", fix="give some text")
    width = -(-int(lengths.max()) // block) * block
    tokens = np.zeros((len(prompts), width), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    return tokens, lengths


@functools.partial(jax.jit, static_argnames="block", donate_argnames="caches")
def prefill(
    plan: Plan,
    params: Params,
    caches: tuple[Cache, ...],
    tokens: Array,
    lengths: Array,
    *,
    block: int,
) -> tuple[Array, tuple[Cache, ...], Array]:
    """Feeds prompts block by block; the peak is the caches and one block.

    Args:
      tokens: `[b, T]`, T a multiple of `block`; lengths: `[b]`, real tokens of each.
    Returns:
      hidden `[b, D]` of each last token, caches, `finite [layers, 2]`.
    """
    b, width = tokens.shape
    blocks = tokens.reshape(b, width // block, block).swapaxes(0, 1)

    def step(carry, inputs):
        caches, last, finite = carry
        tokens, start = inputs
        count = jnp.clip(lengths - start, 0, block)
        hidden, caches, ok = forward_block(plan, params, caches, tokens, count)
        at = jnp.clip(lengths - 1 - start, 0, block - 1)
        here = jnp.take_along_axis(hidden, at[:, None, None], 1)[:, 0]  # [b, D]
        ends = (lengths > start) & (lengths <= start + block)
        return (caches, jnp.where(ends[:, None], here, last), finite & ok), None

    last = jnp.zeros((b, plan.config.d_model), params.embed.dtype)
    finite = jnp.ones((plan.config.layers, 2), bool)
    starts = jnp.arange(0, width, block, dtype=jnp.int32)
    (caches, last, finite), _ = jax.lax.scan(step, (caches, last, finite), (blocks, starts))
    return last, caches, finite


def choose(scores: Array, rng: Array, temperature: float) -> Array:
    """The next token `[b]` from `scores: [b, V]`: the best, or a sample at `temperature` > 0."""
    if temperature == 0:
        return scores.argmax(-1).astype(jnp.int32)
    return jax.random.categorical(rng, scores / temperature, axis=-1).astype(jnp.int32)


@functools.partial(jax.jit, static_argnames="temperature")
def _sample(plan, params, hidden, rng, step, temperature):
    return choose(logits(params, plan.config, hidden), fold(rng, "sample", step), temperature)


def _ends(plan: Plan, token: Array) -> Array:
    return jnp.isin(token, jnp.asarray(plan.config.eos_ids or (-1,), jnp.int32))


def start(
    plan: Plan,
    params: Params,
    prompts: Sequence[Sequence[int]],
    *,
    max_new: int,
    rng: Array | None = None,
    temperature: float = 0.0,
    block: int = 256,
) -> State:
    """Prefills prompts (their lengths may differ) and samples each first token.

    Raises:
      InputError: an empty prompt, or prompt plus `max_new` beyond the model's positions.
    """
    block = block_size(plan, max(map(len, prompts), default=1) or 1, block)
    tokens, lengths = pad_prompts(prompts, block)
    capacity = int(lengths.max()) + max_new
    if capacity > plan.config.max_positions:
        raise InputError(
            "prompt",
            got=f"{lengths.max()} tokens and {max_new} new ones",
            expected=f"at most {plan.config.max_positions} together, the model's positions",
            fix="shorten the prompt or ask for fewer tokens",
        )
    caches = init_caches(plan, batch=len(prompts), capacity=capacity)
    hidden, caches, finite = prefill(plan, params, caches, tokens, lengths, block=block)
    rng = jax.random.key(0) if rng is None else rng
    first = _sample(plan, params, hidden, rng, 0, temperature=temperature)
    return State(caches, first, _ends(plan, first), finite, rng, jnp.int32(1))


def advance(plan: Plan, params: Params, state: State, temperature: float = 0.0) -> State:
    """One decode step: feeds `state.token` and samples the next. Pure; jit it, donate `state`.

    Sequences that have ended keep their token and their cache.
    """
    count = (~state.done).astype(jnp.int32)
    hidden, caches, ok = forward_block(plan, params, state.caches, state.token[:, None], count)
    token = _sample(plan, params, hidden[:, 0], state.rng, state.steps, temperature)
    token = jnp.where(state.done, state.token, token)
    done = state.done | _ends(plan, token)
    return State(caches, token, done, state.finite & ok, state.rng, state.steps + 1)


step = jax.jit(advance, static_argnames="temperature", donate_argnames="state")


@functools.partial(jax.jit, static_argnames=("max_new", "temperature"), donate_argnames="state")
def _finish(plan, params, state, *, max_new, temperature):
    def one(state, _):
        state = advance(plan, params, state, temperature)
        return state, state.token

    first = state.token
    state, rest = jax.lax.scan(one, state, None, length=max_new - 1)
    return jnp.concatenate([first[:, None], rest.T], 1), state


def generate(
    plan: Plan,
    params: Params,
    prompts: Sequence[Sequence[int]],
    *,
    max_new: int,
    rng: Array | None = None,
    temperature: float = 0.0,
    block: int = 256,
) -> tuple[Array, State]:
    """Generates `max_new` tokens for each prompt; all decode steps are one compiled program.

    Args:
      prompts: token ids per sequence; lengths may differ.
      rng: key for sampling, needed when `temperature` is not 0 (greedy).
    Returns:
      Tokens `[b, max_new]` (a sequence that ended repeats its end token), and the last state.

    Example:
      >>> plan = make_plan(model.config, method)  # doctest: +SKIP
      >>> tokens, state = generate(plan, model.params, [ids], max_new=64)  # doctest: +SKIP
    """
    state = start(
        plan, params, prompts, max_new=max_new, rng=rng, temperature=temperature, block=block
    )
    return _finish(plan, params, state, max_new=max_new, temperature=temperature)
