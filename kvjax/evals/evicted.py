"""What a model still knows after an eviction: answers, and how a text goes on."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.cache import Cache, cache_bytes
from kvjax.core.errors import InputError
from kvjax.core.method import Method
from kvjax.evals.fidelity import Scores, teacher_forced
from kvjax.evals.haystack import Encoder
from kvjax.evals.retrieval_runner import Runner, answer_scores
from kvjax.generate.evict import Keep, ProbePrompt, pack_all, take_history
from kvjax.generate.loop import pad_prompts, prefill
from kvjax.generate.plan import Plan, block_size, check_finite, init_caches, make_plan
from kvjax.methods import get
from kvjax.models.decoder import Params
from kvjax.models.load import Model
from kvjax.policies.probe import FIRST, LATER, repeat_prompt

Array = jax.Array


def evicted_runner(
    model: Model,
    method: Method | Sequence[Method],
    keep: Keep,
    *,
    with_question: bool = False,
) -> Runner:
    """A `Runner` whose cache keeps a budget of each context.

    The context is taken in block by block and evicted, what is left of it is encoded, then question
    and answer are teacher-forced through the packed cache. One compiled history serves contexts of
    any length; what follows is compiled once per pages and per length of question and answer,
    rounded up.

    Args:
      method: one for all layers, or one per layer.
      keep: policy, budget and probe; `pack` is not asked.
      with_question: policies see the question too, as the end of the history (how SnapKV is mostly
        evaluated). Otherwise a cache is made once, for any question.
    Raises:
      InputError: methods that do not fit the model. The runner: no tokens in the context, the
        question or the answer, a budget below the windows, NaN in a layer's keys or values.

    Example:
      >>> keep = Keep(Eviction(SnapKV(), budget=512))  # doctest: +SKIP
      >>> rows = run(  # doctest: +SKIP
      ...     ["passkey"], [4096], [0.0, 0.5, 1.0], 4, evicted_runner(model, method, keep),
      ...     tokenizer=model.tokenizer, method="snapkv 512")
    """
    plan = make_plan(model.config, method)
    page = plan.methods[0].layout.page

    def answer_log_probs(context, question, answer):
        history, asked = list(context), list(question)
        if with_question:
            history, asked = history + asked[:-1], asked[-1:]
        new = len(asked) + len(answer)
        # Whole pages of room: page slots, and with them compiled shapes, are those of any length.
        caches = history_caches(plan, model.params, history, keep, room=-(-new // page) * page)
        block = block_size(plan, new)
        return answer_scores(plan, model.params, caches, asked, answer, block=block)

    return answer_log_probs


def history_caches(
    plan: Plan, params: Params, history: Sequence[int], keep: Keep | None, *, room: int
) -> tuple[Cache, ...]:
    """Caches that have read a history, all of it or what a policy keeps, with room for more tokens.

    Args:
      keep: None keeps every token.
      room: tokens to come, at most.
    Raises:
      InputError: what `take_history` refuses, NaN in a layer's keys or values.
    """
    if keep is None:
        block = block_size(plan, len(history))
        tokens, counts = pad_prompts([history], block)
        caches = init_caches(plan, batch=1, capacity=len(history) + room)
        _, caches, finite = prefill(plan, params, caches, tokens, counts, block=block)
    else:
        reader = _reading(plan)
        _, sets, finite = take_history(reader, params, [history], keep.eviction, probe=keep.probe)
        caches = pack_all(plan, keep.eviction, sets, room=room)
    check_finite(finite)
    return caches


def _reading(plan: Plan) -> Plan:
    """The plan that a history is read with. Without sliding windows codes play no part until all is
    read, and one compiled program does for all methods."""
    if len(plan.groups) > 1 or plan.groups[0].window is not None:
        return plan
    method = get("bf16", plan.config.head_dim, layout=plan.methods[0].layout)
    return dataclasses.replace(plan, methods=(method,), stacked=(False,))


def continuation_fidelity(
    plan: Plan,
    params: Params,
    tokens: Sequence[int] | np.ndarray,
    reference_hidden: Array,
    keep: Keep | None,
    *,
    history: int,
) -> tuple[Scores, dict[str, float | int]]:
    """How a text goes on after its history was evicted, against the full exact model.

    The first `history` tokens are read and evicted, the n others teacher-forced through the packed
    caches. `fidelity.summarize` makes KL with its standard error, perplexities and top-1 agreement
    of the scores of one text or several.

    Args:
      tokens: `[history + n]`; n is a multiple of 16.
      reference_hidden: `[n, D]`, the exact model's at the positions from `history` on
        (`reference_pass`), after all tokens before them.
      keep: None keeps every token.
    Returns:
      Scores of n - 1 positions (the last token has no next one), and `cache_sizes` at the end.
    Raises:
      InputError: another number of tokens, or what `history_caches` refuses.
    """
    ids = np.asarray(tokens, np.int32)
    count = len(ids) - history
    if history < 1 or count < 16 or count % 16 or len(reference_hidden) != count:
        raise InputError(
            "continuation",
            got=f"{count} tokens after {history}, hidden states of {len(reference_hidden)}",
            expected="a multiple of 16 after one or more, and a hidden state for each",
            fix="cut the text otherwise",
        )
    caches = history_caches(plan, params, ids[:history].tolist(), keep, room=count)
    sizes = cache_sizes(plan, caches, len(ids))
    block = math.gcd(count, 128)
    rest = jnp.asarray(ids[history:])
    scores, _, finite = teacher_forced(plan, params, caches, rest, reference_hidden, block=block)
    check_finite(finite)
    return jax.device_get(scores), sizes


def cache_sizes(plan: Plan, caches: Sequence[Cache], length: int) -> dict[str, float | int]:
    """Bytes of caches of one sequence, and of bf16 caches of all `length` tokens.

    `cache_bytes` counts every leaf: codes, scales, positions, windows, page tables, room for tokens
    to come. `bf16_bytes` is the same for bf16 caches in the same layout, where layers with a
    sliding window keep only what it reaches; `ratio` is the first over the second. `growing_ratio`
    is that of the layers without a sliding window alone, which are all that a policy can shrink.
    """
    config, layout = plan.config, plan.methods[0].layout
    bf16 = make_plan(config, get("bf16", config.head_dim, layout=layout))
    full = jax.eval_shape(lambda: init_caches(bf16, batch=1, capacity=length))
    total = lambda some, growing: sum(
        cache_bytes(c) for c in some if not growing or c.window is None
    )
    growing = total(full, True)
    return {
        "cache_bytes": total(caches, False),
        "bf16_bytes": total(full, False),
        "ratio": total(caches, False) / total(full, False),
        "growing_ratio": total(caches, True) / growing if growing else 1.0,
    }


def repeat_probe(tokenizer: Encoder, block: int, *, answer: Sequence[int] = ()) -> ProbePrompt:
    """KVzip's probe for `take_history`: after each block, the request to repeat it.

    Args:
      block: tokens of a block, the eviction's. answer: as of `repeat_prompt`.
    """
    encode = lambda text: tokenizer.encode(text, bos=False)
    ask: Callable = lambda blocks, before: [
        repeat_prompt(encode, own, previous, answer=answer)
        for own, previous in zip(blocks, before, strict=True)
    ]
    longest = max(len(encode(FIRST)), len(encode(LATER)) + 8)
    return ProbePrompt(ask, longest=longest + len(answer) + block)
