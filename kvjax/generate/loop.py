"""Whole generations under one jit: blockwise prefill, then a step per token."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.cache import Cache
from kvjax.cache.pack_kept import check_no_pool
from kvjax.cache.working_set import WorkingSet, with_block
from kvjax.core.errors import InputError
from kvjax.core.pytree import pytree
from kvjax.core.rng import fold
from kvjax.generate.evict import Keep, drop, full_layers, pack_all, take_history, tokens_read
from kvjax.generate.inputs import check_sampling, pad_rows, token_counts
from kvjax.generate.plan import Plan, block_size, forward_block, init_caches
from kvjax.models.decoder import Params, logits
from kvjax.policies.eviction import Eviction

Array = jax.Array


@pytree
class State:
    """A generation between two tokens.

    Attributes:
      caches: one per group of layers; a working set where a policy evicts step by step.
      token: `[b]` int32, the token to feed next.
      done: `[b]` bool, sequences that have ended.
      finite: bool `[layers, 2]`, whether all keys and values so far were finite.
      rng: key for sampling; step n uses `fold(rng, n)`.
      steps: int32, tokens sampled so far.
    """

    caches: tuple[Any, ...]
    token: Array
    done: Array
    finite: Array
    rng: Array
    steps: Array


def pad_prompts(prompts: Sequence[Sequence[int]], block: int) -> tuple[np.ndarray, np.ndarray]:
    """Ragged prompts as int32 `[b, T]`, T a multiple of `block`, and their lengths `[b]`."""
    lengths = token_counts(prompts)
    return pad_rows(prompts, -(-int(lengths.max()) // block) * block), lengths


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
    keep: Keep | None = None,
    caches: tuple[Cache, ...] | None = None,
) -> State:
    """Prefills prompts (their lengths may differ) and samples each first token.

    Args:
      caches: what has been read so far; the prompts go on from there, and the caches are used up.
        One that outgrows its pages reads as NaN: see `Cache.most_tokens`.
      keep: keeps a budget of each prompt only; then the block of its eviction counts, not `block`.
    Raises:
      InputError: an empty prompt, tokens that the model does not have, prompt plus `max_new` beyond
        its positions; numbers that make no sense, a temperature without a key.
    """
    check_sampling(max_new, temperature, rng, block)
    new = token_counts(prompts, vocab=params.embed.shape[0])
    longest = int((new if caches is None else new + tokens_read(caches, len(prompts))).max())
    if longest + max_new > plan.config.max_positions:
        raise InputError(
            "prompt",
            got=f"{longest} tokens and {max_new} new ones",
            expected=f"at most {plan.config.max_positions} together, the model's positions",
            fix="shorten the prompt or ask for fewer tokens",
        )
    ready: tuple[Any, ...]
    if keep is None:
        block = block_size(plan, int(new.max()), block)
        tokens, counts = pad_prompts(prompts, block)
        if caches is None:
            caches = init_caches(plan, batch=len(prompts), capacity=longest + max_new)
        hidden, ready, finite = prefill(plan, params, caches, tokens, counts, block=block)
    else:
        if caches is not None:
            raise InputError(
                "caches",
                got="caches to go on with, and what to keep of the prompts",
                expected="one of them",
                fix="go on with take_history(..., caches=...) while a history is being read",
            )
        if keep.pack and full_layers(plan):
            check_no_pool(plan.methods[0].layout)  # before the history is read
        hidden, sets, finite = take_history(plan, params, prompts, keep.eviction, probe=keep.probe)
        if keep.pack:
            ready = pack_all(plan, keep.eviction, sets, room=max_new)
        else:
            ready = tuple(with_block(c, 1) if isinstance(c, WorkingSet) else c for c in sets)
    rng = jax.random.key(0) if rng is None else rng
    first = _sample(plan, params, hidden, rng, 0, temperature=temperature)
    return State(ready, first, _ends(plan, first), finite, rng, jnp.int32(1))


def advance(
    plan: Plan,
    params: Params,
    state: State,
    temperature: float = 0.0,
    eviction: Eviction | None = None,
) -> State:
    """One decode step: feeds `state.token` and samples the next. Pure; jit it, donate `state`.

    Sequences that have ended keep their token and their cache. Working sets need the `eviction`
    that they were made with.
    """
    count = (~state.done).astype(jnp.int32)
    hidden, caches, ok = forward_block(
        plan, params, state.caches, state.token[:, None], count, eviction=eviction
    )
    if eviction is not None:
        caches = drop(plan, eviction, caches)
    token = _sample(plan, params, hidden[:, 0], state.rng, state.steps, temperature)
    token = jnp.where(state.done, state.token, token)
    done = state.done | _ends(plan, token)
    return State(caches, token, done, state.finite & ok, state.rng, state.steps + 1)


step = jax.jit(advance, static_argnames="temperature", donate_argnames="state")


@functools.partial(jax.jit, static_argnames=("max_new", "temperature"), donate_argnames="state")
def _finish(plan, params, state, eviction, *, max_new, temperature):
    def one(state, _):
        state = advance(plan, params, state, temperature, eviction)
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
    keep: Keep | None = None,
    caches: tuple[Cache, ...] | None = None,
) -> tuple[Array, State]:
    """Generates `max_new` tokens for each prompt; all decode steps are one compiled program.

    Args:
      prompts: token ids per sequence; lengths may differ.
      rng: key for sampling, needed when `temperature` is not 0 (greedy).
      keep: what stays of each prompt, where not all of it does.
      caches: what has been read so far; see `start`.
    Returns:
      Tokens `[b, max_new]` (a sequence that ended repeats its end token), and the last state.

    Example:
      >>> plan = make_plan(model.config, method)  # doctest: +SKIP
      >>> tokens, state = generate(plan, model.params, [ids], max_new=64)  # doctest: +SKIP
    """
    options: dict[str, Any] = {"max_new": max_new, "temperature": temperature}
    state = start(plan, params, prompts, rng=rng, block=block, keep=keep, caches=caches, **options)
    eviction = None if keep is None or keep.pack else keep.eviction
    return _finish(plan, params, state, eviction, **options)
