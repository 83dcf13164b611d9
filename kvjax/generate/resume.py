"""Long prompts and generations that are saved as they go, and go on where they stopped."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.cache import Cache
from kvjax.checkpoint import Saver, mark, peek, restore
from kvjax.core.errors import InputError
from kvjax.generate.evict import Keep
from kvjax.generate.inputs import check_sampling
from kvjax.generate.loop import State, _ends, _sample, pad_prompts, prefill, start, step
from kvjax.generate.plan import Plan, block_size, init_caches
from kvjax.generate.resume_state import Prompts, facts_of, keep_facts, prefill_like, state_like
from kvjax.models.decoder import Params
from kvjax.parallel.processes import fetch

Array = jax.Array
Report = Callable[[str], None]


def prefill_saving(
    plan: Plan,
    params: Params,
    prompts: Prompts,
    saver: Saver,
    *,
    every: int,
    max_new: int,
    block: int = 256,
    weights: str | None = None,
    report: Report = lambda line: None,
) -> tuple[Array, tuple[Cache, ...], Array]:
    """`prefill`, saved after every so many tokens; run again, it goes on from the last of these.

    Args:
      prompts: token ids per sequence; lengths may differ.
      saver: of a folder that holds nothing else.
      every: tokens between two saves, rounded up to whole blocks.
      max_new: tokens that the caches are to have room for after the prompts.
      weights: the model's `fingerprint`, which `plan` and `params` must not belie; None takes it of
        `params`. With heads repeated for a mesh, or in several processes, it must be given.
      report: is told what was resumed, in one line.
    Returns:
      hidden `[b, D]` of each last token, caches, `finite [layers, 2]`: bit for bit the same however
      often the run was ended between.
    Raises:
      InputError: a folder that holds the state of another prompt, model, method or size; one that
        is damaged or full.

    Example:
      >>> with Saver("state") as saver:  # doctest: +SKIP
      ...     hidden, caches, finite = prefill_saving(
      ...         plan, params, [ids], saver, every=4096, max_new=64, report=print
      ...     )
      resumed: 4,096 of 16,384 tokens read, from state/000001
    """
    facts = facts_of(plan, params, prompts, weights) | {"max_new": max_new, "block": block}
    run = _Run(plan, params, prompts, saver, _positive(every), max_new, block, facts, report)
    return _prefill(run, *_found(saver))


def generate_saving(
    plan: Plan,
    params: Params,
    prompts: Prompts,
    saver: Saver,
    *,
    max_new: int,
    every: int,
    **options: Any,
) -> tuple[np.ndarray, State]:
    """`generate`, saved as it goes; see `steps_saving`.

    Returns:
      Tokens `[b, max_new]`, and the last state.
    """
    made, state = [], None
    for new, state in steps_saving(  # noqa: B007
        plan, params, prompts, saver, max_new=max_new, every=every, **options
    ):
        made.append(new)
    assert state is not None
    return np.concatenate(made, 1), state


def steps_saving(
    plan: Plan,
    params: Params,
    prompts: Prompts,
    saver: Saver,
    *,
    max_new: int,
    every: int,
    rng: Array | None = None,
    temperature: float = 0.0,
    block: int = 256,
    keep: Keep | None = None,
    weights: str | None = None,
    report: Report = lambda line: None,
) -> Iterator[tuple[np.ndarray, State]]:
    """A generation token by token, saved every so many tokens of the prompt and of its own.

    Run again with the same arguments it goes on from the last save, and first gives all tokens that
    were made before it. Where a policy evicts, a prompt is saved once it has been read.

    Args:
      every: tokens between two saves; within prompts rounded up to whole blocks.
      rng, temperature, block, keep: as of `start`.
      weights, report: as of `prefill_saving`.
    Yields:
      New tokens `[b, n]`, n = 1 but for the first, and the state after them, which the next step
      uses up; `max_new` tokens in all.
    Raises:
      InputError: as `start` and `prefill_saving`; a folder that holds another generation.
    """
    check_sampling(max_new, temperature, rng, block)
    rng = jax.random.key(0) if rng is None else rng.copy()  # steps use theirs up
    facts = facts_of(plan, params, prompts, weights) | {"max_new": max_new, "block": block}
    facts |= {"temperature": temperature, "rng": mark(rng), "keep": keep_facts(keep)}
    run = _Run(plan, params, prompts, saver, _positive(every), max_new, block, facts, report)
    at, about = _found(saver)
    # Where a policy evicts nothing is saved before: what else is there is not ours, and refused.
    if about is not None and (keep is not None or about.get("stage") == "decode"):
        made = np.zeros((len(prompts), about.get("made", 0)), np.int32)
        like = state_like(plan, prompts, rng, keep, max_new), made
        state, made = _restore(run, at, like, "decode")
    else:
        sampling: dict[str, Any] = {"max_new": max_new, "rng": rng, "temperature": temperature}
        if keep is None:
            hidden, caches, finite = _prefill(run, at, about)
            first = _sample(plan, params, hidden, rng, 0, temperature=temperature)
            state = State(caches, first, _ends(plan, first), finite, rng, jnp.int32(1))
        else:
            state = start(plan, params, prompts, block=block, keep=keep, **sampling)
        made = fetch(state.token)[:, None]
        _save(run, (state, made), stage="decode", read=run.longest, made=1)
    eviction = None if keep is None or keep.pack else keep.eviction
    yield made, state
    while made.shape[1] < max_new:
        state = step(plan, params, state, temperature=temperature, eviction=eviction)
        new = fetch(state.token)[:, None]
        made = np.concatenate([made, new], 1)
        if made.shape[1] % every == 0:
            _save(run, (state, made), stage="decode", read=run.longest, made=made.shape[1])
        yield new, state


class _Run(NamedTuple):
    """What stays the same from the first token to the last.

    Attributes:
      facts: what a saved state must have been made with.
    """

    plan: Plan
    params: Params
    prompts: Prompts
    saver: Saver
    every: int
    max_new: int
    block: int
    facts: dict[str, Any]
    report: Report

    @property
    def longest(self) -> int:
        return max(map(len, self.prompts))


def _prefill(run: _Run, at: Path, about: dict[str, Any] | None):
    """The prompts, from where a saved state has read them."""
    plan, params = run.plan, run.params
    block = block_size(plan, run.longest, run.block)
    tokens, lengths = pad_prompts(run.prompts, block)
    piece = -(-run.every // block) * block
    if about is None:
        caches = init_caches(plan, batch=len(run.prompts), capacity=run.longest + run.max_new)
        last, finite, read = None, True, 0
    else:
        sizes = {"batch": len(run.prompts), "capacity": run.longest + run.max_new}
        like = prefill_like(plan, params, **sizes)
        (caches, last, finite), read = _restore(run, at, like, "prefill"), about["read"]
    while read < run.longest:
        end = min(read + piece, tokens.shape[1])
        here, caches, ok = prefill(
            plan, params, caches, tokens[:, read:end], lengths - read, block=block
        )
        ended = ((lengths > read) & (lengths <= end))[:, None]
        last = here if last is None else jnp.where(ended, here, last)
        finite, read = ok & finite, end
        _save(run, (caches, last, finite), stage="prefill", read=min(read, run.longest), made=0)
    return last, caches, finite


def _found(saver: Saver) -> tuple[Path, dict[str, Any] | None]:
    """The folder that counts and what is saved in it, if anything is."""
    saver.wait()
    return peek(saver.folder) or (saver.folder, None)


def _save(run: _Run, state: Any, **progress: Any) -> None:
    run.saver.save(state, about=run.facts | progress | {"longest": run.longest})


def _restore(run: _Run, at: Path, like: Any, stage: str) -> Any:
    """The state in the folder, once it is of this run; says what it is."""
    heads = run.plan.config.kv_heads // run.plan.copies
    found = restore(
        run.saver.folder,
        like,
        about=run.facts | {"stage": stage},
        kv_heads=heads,
        any_size=lambda name: ".kept." in name,  # pools have the size that the history gave them
    )
    assert found is not None
    state, about = found
    line = f"{about['read']:,} of {about['longest']:,} tokens read"
    made = f", {about['made']:,} of {run.max_new:,} made" if about["made"] else ""
    run.report(f"resumed: {line}{made}, from {at}")
    return state


def _positive(every: int) -> int:
    if every < 1:
        raise InputError("every", got=every, expected="1 token or more", fix="save less often")
    return every
