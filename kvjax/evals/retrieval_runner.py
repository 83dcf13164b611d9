"""How likely a model finds an answer, teacher-forced through a cache: no generation is needed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.cache import Cache
from kvjax.core.errors import InputError
from kvjax.core.method import Method
from kvjax.generate.loop import prefill
from kvjax.generate.plan import (
    Plan,
    block_size,
    check_finite,
    forward_block,
    init_caches,
    make_plan,
)
from kvjax.models.decoder import Params, logits
from kvjax.models.load import Model

Array = jax.Array

# (context, question, answer), as token ids -> per answer token: its log-probability after all that
# comes before it, and whether it was the most likely one. What is done to the cache between the
# context and the question is the runner's business.
Runner = Callable[[Sequence[int], Sequence[int], Sequence[int]], tuple[np.ndarray, np.ndarray]]


def full_cache_runner(
    model: Model, method: Method | Sequence[Method], *, block: int = 256
) -> Runner:
    """A `Runner` whose cache keeps all tokens, in the codes of a method.

    Context and question are prefilled block by block, then the answer is teacher-forced through the
    same cache: what decoding token by token would see. Compiled once per length, rounded up to
    blocks, and once per length of answers, rounded up alike.

    Args:
      method: one for all layers, or one per layer.
      block: tokens per prefill block at most.
    Raises:
      InputError: methods that do not fit the model. The runner: no tokens in the prompt or the
        answer, more tokens than the model has positions, NaN in a layer's keys or values.

    Example:
      >>> model = kvjax.models.load("gemma-3-270m")  # doctest: +SKIP
      >>> method = get_for_model("turboquant-2", model.config)  # doctest: +SKIP
      >>> rows = run(  # doctest: +SKIP
      ...     ["passkey"], [1024], [0.0, 0.5, 1.0], 4, full_cache_runner(model, method),
      ...     tokenizer=model.tokenizer, method="turboquant-2")
    """
    plan = make_plan(model.config, method)

    def answer_log_probs(context, question, answer):
        prompt = [*context, *question]
        _check_some(prompt, answer)
        total = len(prompt) + len(answer)
        step = block_size(plan, total, block)
        width = -(-total // step) * step
        positions = plan.config.max_positions
        caches = init_caches(plan, batch=1, capacity=max(total, min(width, positions)))
        _, caches, finite = prefill(
            plan,
            model.params,
            caches,
            _padded(prompt[:-1], width)[None],
            np.array([len(prompt) - 1], np.int32),
            block=step,
        )
        check_finite(finite)
        return answer_scores(plan, model.params, caches, prompt[-1:], answer, block=step)

    return answer_log_probs


def answer_scores(
    plan: Plan,
    params: Params,
    caches: tuple[Cache, ...],
    question: Sequence[int],
    answer: Sequence[int],
    *,
    block: int,
) -> tuple[np.ndarray, np.ndarray]:
    """What a `Runner` returns, from caches that have read the context and room for what follows.

    Args:
      question: what comes before the answer and is not yet in the caches, one token at least.
      block: tokens fed at once, at most; a page at most where a sliding window demands it.
    Raises:
      InputError: no question or no answer, NaN in a layer's keys or values.
    """
    _check_some(question, answer)
    tokens = [*question, *answer[:-1]]
    block = min(block, max(16, 1 << (len(tokens) - 1).bit_length()))
    width = -(-len(tokens) // block) * block
    targets = _padded([*question[1:], *answer], width)
    log_probs, greedy, finite = _forced(
        plan, params, caches, _padded(tokens, width), targets, len(tokens), block=block
    )
    check_finite(finite)
    own = slice(len(question) - 1, len(tokens))
    return np.asarray(log_probs)[own], np.asarray(greedy)[own]


def _check_some(question: Sequence[int], answer: Sequence[int]) -> None:
    if not len(question) or not len(answer):
        raise InputError(
            "sample",
            got=f"{len(question)} tokens before an answer of {len(answer)}",
            expected="at least one of each",
            fix="check the tokenizer",
        )


def _padded(ids: Sequence[int], width: int) -> np.ndarray:
    return np.pad(np.asarray(ids, np.int32), (0, width - len(ids)))


@functools.partial(jax.jit, static_argnames="block")
def _forced(
    plan: Plan,
    params: Params,
    caches: tuple[Cache, ...],
    tokens: Array,
    targets: Array,
    count: Array | int,
    *,
    block: int,
) -> tuple[Array, Array, Array]:
    """Feeds `tokens: [t]`, of which `count` are real, and scores `targets: [t]`, what follows each.

    Returns:
      log-probabilities `[t]`, whether each target ranks first `[t]`, `finite [layers, 2]`.
    """

    def step(carry, inputs):
        caches, finite = carry
        tokens, targets, start = inputs
        real = jnp.clip(count - start, 0, block)[None]
        hidden, caches, ok = forward_block(plan, params, caches, tokens[None], real)
        scores = logits(params, plan.config, hidden[0])  # [block, V]
        return (caches, finite & ok), teacher_forced_scores(scores, targets)

    split = lambda a: a.reshape(-1, block)
    starts = jnp.arange(0, tokens.shape[0], block)
    finite = jnp.ones((plan.config.layers, 2), bool)
    carry, (log_probs, greedy) = jax.lax.scan(
        step, (caches, finite), (split(tokens), split(targets), starts)
    )
    return log_probs.reshape(-1), greedy.reshape(-1), carry[1]


def teacher_forced_scores(scores: Array, answer: Array) -> tuple[Array, Array]:
    """What a `Runner` returns, from logits or log-probabilities.

    Args:
      scores: `[n, V]`, the model's at the position before each answer token. answer: `[n]` ids.
    Returns:
      log-probabilities `[n]` in nats, and whether each token ranks first `[n]`; of equal scores
      the lowest id does.
    """
    log_probs = jax.nn.log_softmax(scores.astype(jnp.float32))
    picked = jnp.take_along_axis(log_probs, answer[:, None], 1)[:, 0]
    return picked, scores.argmax(-1) == answer
