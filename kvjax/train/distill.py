"""Training a model for the cache that will serve it, with the full cache as the teacher."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kvjax.core.errors import InputError
from kvjax.core.pytree import pytree
from kvjax.core.rng import fold
from kvjax.generate.plan import Plan
from kvjax.models.causal import causal_attend
from kvjax.models.config import ModelConfig, layer_runs
from kvjax.models.decoder import Params, decode_layers, logits
from kvjax.train.adapter import Adapter, adapt, adapt_plan, init_adapter
from kvjax.train.quantized import quantized_hidden

Array = jax.Array

PREDICTIONS = 128  # at a time, so that their logits take [128, V]


@dataclasses.dataclass(frozen=True)
class Training:
    """How to train.

    Args:
      steps: of Adam, one window each. rate: of Adam at its highest; it rises over the first tenth
        and falls to 0 as a cosine.
      rank: of the changes of W_K and W_V. books: learn levels and means of the codecs too.
      book_rate: times `rate`, for these.
      anchor: weight of a second loss, KL of the changed model with its full cache: what keeps it
        usable without the codec. 0 leaves it out, and a third of the time.
      seed: for the order of windows and the start.
    """

    steps: int = 100
    rate: float = 2e-3
    rank: int = 16
    books: bool = False
    book_rate: float = 0.1
    anchor: float = 0.0
    seed: int = 0

    def __post_init__(self):
        for name in ("steps", "rate", "rank", "book_rate", "anchor", "seed"):
            value, zero = getattr(self, name), name in ("anchor", "seed")
            if not (0 < value < np.inf or (zero and value == 0)):  # NaN neither
                raise InputError(
                    name,
                    got=value,
                    expected="0 or more" if zero else "above 0",
                    fix="choose such a number",
                )


@pytree
class Progress:
    """A training between two steps: all that is needed to go on with it.

    Attributes:
      adapter: what is learned. moments: of Adam. step: int32, steps done.
      losses: `[steps]` float32, NaN where not done yet.
    """

    adapter: Adapter
    moments: Any
    step: Array
    losses: Array


def train(
    plan: Plan,
    params: Params,
    windows: Sequence[np.ndarray],
    training: Training,
    *,
    progress: Progress | None = None,
) -> Iterator[Progress]:
    """Lowers the KL of the quantized model to the model itself, a window per step.

        loss = mean_t KL( p(. | full cache) || p'(. | packed cache) )
                 + anchor * mean_t KL( p(. | full cache) || p'(. | full cache) )

    with p the model as it is and p' the one that learns; `quantized_hidden` has what a packed cache
    shows.

    Args:
      windows: int32 `[t]` each, all of one length, a multiple of 128.
      progress: where to go on; None starts anew.
    Yields:
      The progress after every step; the last one has all steps done. The yielded arrays are not
      used up.
    Raises:
      InputError: no windows, windows of other lengths, or too short for a page; a loss that is not
        finite.

    Source: LLM-QAT, arXiv 2305.17888, has caches in training; ours: pages, windows and codecs of
    the deployment, and W_K and W_V alone.

    Example:
      >>> *_, last = train(plan, model.params, windows, Training(steps=50))  # doctest: +SKIP
      >>> params = adapt(last.adapter, model.params)  # doctest: +SKIP
    """
    check_training_windows(plan, windows)
    if progress is None:
        progress = start_training(plan, params, training)
    for number in range(int(progress.step), training.steps):
        epoch, at = divmod(number, len(windows))
        order = np.random.default_rng((training.seed, epoch)).permutation(len(windows))
        tokens = jnp.asarray(windows[order[at]], jnp.int32)
        progress = _step(plan, params, progress, tokens, training)
        loss = float(progress.losses[number])
        if not np.isfinite(loss):
            raise InputError(
                f"step {number}",
                got=f"a loss of {loss}",
                expected="a finite one",
                fix="lower the rate",
            )
        yield progress


def start_training(plan: Plan, params: Params, training: Training) -> Progress:
    """The progress before the first step."""
    rng = fold(jax.random.key(training.seed), "adapter")
    adapter = init_adapter(plan, params, rank=training.rank, rng=rng, books=training.books)
    losses = jnp.full((training.steps,), jnp.nan)
    return Progress(adapter, _optimizer(training).init(_parts(adapter)), jnp.int32(0), losses)


def check_training_windows(plan: Plan, windows: Sequence[np.ndarray]) -> None:
    """Raises `InputError` for windows that teach nothing or do not fit each other."""
    layout = plan.methods[0].layout
    least = layout.sink + layout.recent + layout.page + 1
    lengths = sorted({len(w) for w in windows})
    if len(lengths) != 1 or lengths[0] % PREDICTIONS or lengths[0] < least:
        raise InputError(
            "windows",
            got=f"{len(windows)} of {lengths} tokens" if lengths else "none: a text that is short",
            expected=f"some of one length, a multiple of {PREDICTIONS} from {least} on, so that "
            "a page gets packed",
            fix="use more text, or another context",
        )


def distillation_loss(
    plan: Plan, params: Params, adapter: Adapter, tokens: Array, anchor: float = 0.0
) -> Array:
    """Mean KL over the positions of `tokens: [t]`; see `train`."""
    config = plan.config
    teacher = jax.lax.stop_gradient(full_hidden(params, config, tokens))
    student = adapt(adapter, params)
    hidden = quantized_hidden(adapt_plan(adapter, plan), student, tokens[None])[0]
    loss = mean_kl(params, config, teacher, hidden)
    if anchor:
        loss += anchor * mean_kl(params, config, teacher, full_hidden(student, config, tokens))
    return loss


def full_hidden(params: Params, config: ModelConfig, tokens: Array) -> Array:
    """Hidden states `[t, D]` of the model with exact attention."""
    runs = layer_runs(config)
    positions = jnp.arange(tokens.shape[0])[None]
    attend = jax.checkpoint(causal_attend(runs, positions), static_argnums=0)
    caches: tuple[Any, ...] = (None,) * len(runs)
    return decode_layers(params, config, tokens[None], positions, attend, caches)[0][0]


def mean_kl(params: Params, config: ModelConfig, teacher: Array, student: Array) -> Array:
    """Mean KL of predictions from hidden states `[t, D]` of a teacher and of a student."""

    @jax.checkpoint
    def some(pair):
        full, ours = (jax.nn.log_softmax(logits(params, config, h)) for h in pair)
        return (jnp.exp(full) * (full - ours)).sum()

    blocks = tuple(a.reshape(-1, PREDICTIONS, a.shape[-1]) for a in (teacher, student))
    return jax.lax.map(some, blocks).sum() / teacher.shape[0]


@functools.partial(jax.jit, static_argnames="config")
def mean_nll(params: Params, config: ModelConfig, tokens: Array) -> Array:
    """Mean negative log-likelihood of `tokens: [t]` with the full cache, in nats per token."""
    return nll_of(params, config, full_hidden(params, config, tokens), tokens)


def nll_of(params: Params, config: ModelConfig, hidden: Array, tokens: Array) -> Array:
    """Mean negative log-likelihood of `tokens: [t]` from hidden states `[t, D]`, in nats."""

    def some(pair):
        hidden, following = pair
        scores = jax.nn.log_softmax(logits(params, config, hidden))
        return -jnp.take_along_axis(scores, following[:, None], 1)[:, 0]

    following = jnp.roll(tokens, -1).reshape(-1, PREDICTIONS)
    blocks = hidden.reshape(-1, PREDICTIONS, hidden.shape[-1])
    return jax.lax.map(some, (blocks, following)).reshape(-1)[:-1].mean()


def _optimizer(training: Training) -> optax.GradientTransformation:
    warm = max(1, training.steps // 10)
    rate = optax.warmup_cosine_decay_schedule(
        training.rate / (warm + 1), training.rate, warm, training.steps + 1
    )
    slower = optax.chain(optax.adam(rate), optax.scale(training.book_rate))
    adam: Callable[[], Any] = lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))
    return optax.multi_transform({"weights": adam(), "books": slower}, _labels)


def _parts(adapter: Adapter) -> dict[str, Any]:
    return {"weights": (adapter.key, adapter.value), "books": adapter.books}


def _whole(parts: dict[str, Any]) -> Adapter:
    key, value = parts["weights"]
    return Adapter(key, value, parts["books"])


def _labels(parts: dict[str, Any]) -> dict[str, Any]:
    return {name: jax.tree.map(lambda _, n=name: n, part) for name, part in parts.items()}


@functools.partial(jax.jit, static_argnames="training")
def _step(plan, params, progress: Progress, tokens, training: Training) -> Progress:
    def loss(parts):
        return distillation_loss(plan, params, _whole(parts), tokens, training.anchor)

    parts = _parts(progress.adapter)
    value, gradients = jax.value_and_grad(loss)(parts)
    updates, moments = _optimizer(training).update(gradients, progress.moments, parts)
    after: Any = optax.apply_updates(parts, updates)
    losses = progress.losses.at[progress.step].set(value)
    return Progress(_whole(after), moments, progress.step + 1, losses)
