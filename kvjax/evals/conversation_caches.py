"""How a conversation gets into caches for an evaluation, what these take, and who is asked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.cache import Cache, cache_bytes
from kvjax.cache.working_set import WorkingSet, with_block
from kvjax.core.errors import InputError
from kvjax.core.layout import Layout
from kvjax.episodes.index import EpisodeIndex, route
from kvjax.episodes.routing import by_question, evaluate_choice
from kvjax.evals.conversations import HOWS
from kvjax.generate.evict import drop, start_working
from kvjax.generate.loop import pad_prompts, prefill
from kvjax.generate.plan import (
    Plan,
    block_size,
    check_finite,
    forward_block,
    init_caches,
    make_plan,
)
from kvjax.methods import get
from kvjax.models.config import ModelConfig
from kvjax.models.decoder import Params
from kvjax.policies.eviction import Eviction


def exact_caches(
    plan: Plan, params: Params, history: Sequence[int], *, room: int, dtype=jnp.bfloat16
) -> tuple[Cache, ...]:
    """Caches that keep every token of a history, in the codes of the plan's methods.

    Args:
      dtype: of exact windows. With `exact_plan` and float32 nothing is rounded.
    """
    block = block_size(plan, len(history))
    tokens, counts = pad_prompts([history], block)
    caches = init_caches(plan, batch=1, capacity=len(history) + room, dtype=dtype)
    _, caches, finite = prefill(plan, params, caches, tokens, counts, block=block)
    check_finite(finite)
    return caches


def exact_plan(config: ModelConfig, tokens: int, *, page: int) -> Plan:
    """A plan whose recent window holds so many tokens, exact: none is ever packed."""
    layout = Layout(sink=0, recent=-(-tokens // page) * page, page=page)
    return make_plan(config, get("bf16", config.head_dim, layout=layout))


def read_whole(
    plan: Plan, params: Params, eviction: Eviction, history: Sequence[int]
) -> tuple[Any, ...]:
    """Working sets with all of a history, not yet evicted; its length is at most the block.

    `judge` then compresses it by one prompt or another, as methods do that see the whole context
    before they choose; the peak is all of it.

    Raises:
      InputError: a history beyond the block, NaN in a layer's keys or values.
    """
    if not 1 <= len(history) <= eviction.block:
        raise InputError(
            "history",
            got=f"{len(history)} tokens",
            expected=f"1 to {eviction.block}, the block",
            fix="read it block by block, or raise the block",
        )
    tokens = np.zeros((1, eviction.block), np.int32)
    tokens[0, : len(history)] = history
    sets = start_working(plan, eviction, batch=1)
    sets, finite = _whole(plan, params, eviction, sets, tokens, np.array([len(history)], np.int32))
    check_finite(finite)
    return sets


def judge(
    plan: Plan,
    params: Params,
    eviction: Eviction,
    sets: tuple[Any, ...],
    prompt: Sequence[int],
    *,
    longest: int,
) -> tuple[Any, ...]:
    """What a prompt (padded to `longest`) leaves of `read_whole`, which stays as it is."""
    tokens = np.zeros((1, longest), np.int32)
    tokens[0, : len(prompt)] = prompt
    return _judged(plan, params, eviction, sets, tokens, np.array([len(prompt)], np.int32))


@jax.jit
def _whole(plan, params, eviction, sets, tokens, count):
    _, sets, finite = forward_block(plan, params, sets, tokens, count, eviction=eviction)
    return sets, finite


@jax.jit
def _judged(plan, params, eviction, sets, tokens, count):
    given = {"eviction": eviction, "probe": True}
    _, sets, _ = forward_block(plan, params, sets, tokens, count, **given)
    left = drop(plan, eviction, sets)
    return tuple(with_block(c, 1) if isinstance(c, WorkingSet) else c for c in left)


def routes(
    index: EpisodeIndex, queries: np.ndarray, evidence: Sequence[Sequence[int]]
) -> dict[str, np.ndarray]:
    """The episode of each question, int `[q]`, by every way to route.

    "oracle" knows the evidence: it takes the episode with the most of its segments.
    """
    found = {how: np.asarray(route(index, queries, how))[:, 0] for how in HOWS}
    labels = np.asarray(index.labels)
    held = [np.bincount(labels[list(e)], minlength=index.episodes).argmax() for e in evidence]
    return found | {"oracle": np.array(held)}


def evidence_inside(
    index: EpisodeIndex, chosen: np.ndarray, evidence: Sequence[Sequence[int]]
) -> dict[str, float]:
    """Means over questions of `episodes.routing.Routing`, for the episodes `chosen: [q]`."""
    return by_question([evaluate_choice(index, chosen[:, None], evidence)])


def state_bytes(caches: tuple[Cache, ...]) -> tuple[int, int]:
    """Bytes of the cache that decodes (one episode's), and of all episodes' together.

    Episodes have equal shares of all but the pages counted per layer (`Kept.used`), which are
    there once.
    """
    total, once = (
        sum(map(cache_bytes, caches)),
        tree_bytes([c.kept.used for c in caches if c.kept is not None]),
    )
    return (total - once) // caches[0].length.shape[1] + once, total


def full_bytes(plan: Plan, tokens: int) -> int:
    """Bytes of caches that keep so many tokens of one sequence."""
    return sum(
        map(cache_bytes, jax.eval_shape(lambda: init_caches(plan, batch=1, capacity=tokens)))
    )


def tree_bytes(tree: Any) -> int:
    """Bytes of all leaves."""
    return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(tree))
