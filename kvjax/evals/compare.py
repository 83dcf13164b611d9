"""Methods side by side on a real model: bits, bytes, quality and speed, in one run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.cache import cache_bytes, history_bits_per_value
from kvjax.calibrate.moments import Moments
from kvjax.calibrate.names import get_for_model
from kvjax.core.errors import InputError
from kvjax.core.layout import Layout
from kvjax.core.method import Method
from kvjax.evals.fidelity import Scores, attention_fidelity, summarize, teacher_forced
from kvjax.evals.reference import Reference, reference_pass
from kvjax.evals.speed import race
from kvjax.evals.text import model_windows
from kvjax.generate.loop import State, generate
from kvjax.generate.plan import Plan, check_finite, init_caches, make_plan
from kvjax.models.load import Model

Progress = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Settings:
    """What `compare` does.

    Attributes:
      methods: names for `kvjax.methods.get`.
      context: tokens per window. windows: how many, spread over the text.
      layout: the cache layout of all methods.
      seed: for rotations and sketches.
      rounds, steps: decode steps timed per method, interleaved; 0 rounds leave speed out.
      sample_method: continues three stretches of the text beside the full cache; None leaves it.
      calibration: moments for the names in `kvjax.calibrate.names.CALIBRATED`.
    """

    methods: Sequence[str]
    context: int = 2048
    windows: int = 1
    layout: Layout = dataclasses.field(default_factory=Layout)
    seed: int = 0
    rounds: int = 4
    steps: int = 5
    sample_method: str | None = None
    calibration: Moments | None = None


def compare(
    model: Model, text: str, settings: Settings, progress: Progress = lambda message: None
) -> dict[str, Any]:
    """Rows of numbers for every method, as they stand in `metrics.json`.

    Raises:
      InputError: a method, context, text or model that does not fit; NaN in a layer's K or V.
    """
    config = model.config
    plans = {name: make_plan(config, _method(name, model, settings)) for name in settings.methods}
    block = scoring_block(plans, settings)
    room = _room(config.max_positions, settings)
    windows = model_windows(model, text, context=settings.context, windows=settings.windows)
    references = []
    for i, tokens in enumerate(windows):
        progress(f"full cache, window {i + 1} of {len(windows)}")
        references.append(reference_pass(model.params, config, tokens))
        check_finite(references[-1].finite)

    rows: list[dict[str, Any]] = []
    racers: dict[str, tuple[Plan, State]] = {}

    def measure(name: str) -> tuple[dict[str, float], Any]:
        progress(f"{name}: quality")
        capacity = settings.context + room
        row, _, caches = quality(plans[name], model.params, windows, references, block, capacity)
        return row, caches

    # Compiling keeps one core busy: on a CPU, two methods at a time. Speed is measured later.
    with ThreadPoolExecutor(2 if jax.default_backend() == "cpu" else 1) as pool:
        results = dict(zip(plans, pool.map(measure, plans), strict=True))
    for name, plan in plans.items():
        row, caches = results.pop(name)
        rows.append({"method": name, **sizes(plan, settings.context), **row})
        if room:
            last = jnp.asarray(windows[-1][-1:], jnp.int32)
            racers[name] = _racer(plan, caches, last)
    full_ppl = rows[0].pop("full_ppl")
    for row in rows[1:]:
        row.pop("full_ppl")
    progress("decode speed, all methods in turn")
    _add_speed(rows, racers, model, settings)
    samples = []
    if settings.sample_method is not None:
        progress("samples")
        samples = _samples(model, windows[0], settings.sample_method, settings)
    layout = settings.layout
    return {
        "context": settings.context,
        "windows": len(windows),
        "layout": {"sink": layout.sink, "recent": layout.recent, "page": layout.page},
        "full": {"ppl": full_ppl},
        "rows": rows,
        "samples": samples,
    }


def _method(name: str, model: Model, settings: Settings) -> Method | tuple[Method, ...]:
    moments, layout = settings.calibration, settings.layout
    return get_for_model(
        name, model.config, moments, layout=layout, seed=settings.seed, params=model.params
    )


def scoring_block(plans: dict[str, Plan], settings: Settings) -> int:
    """Tokens per teacher-forced block: the largest that divides the context and suits all."""
    most = 256
    for plan in plans.values():
        if any(group.window is not None for group in plan.groups):
            most = min(most, settings.layout.page)
    best = max(b for b in range(1, most + 1) if settings.context % b == 0)
    if best < 16:
        raise InputError(
            "context",
            got=f"{settings.context} tokens",
            expected="a multiple of 16",
            fix=f"use {max(16, settings.context - settings.context % 16)}",
        )
    return best


def _room(positions: int, settings: Settings) -> int:
    """Tokens that the timed steps add after the context; 0 leaves speed out."""
    wanted = (settings.rounds + 1) * settings.steps if settings.rounds else 0
    return wanted if settings.context + wanted <= positions else 0


def quality(
    plan: Plan,
    params,
    windows: np.ndarray,
    references: Sequence[Reference],
    block: int,
    capacity: int,
) -> tuple[dict[str, float], list[Scores], Any]:
    """A row's numbers over all windows, their scores one by one, and the caches after the last."""
    scores: list[Scores] = []
    for tokens, reference in zip(windows, references, strict=True):
        caches = init_caches(plan, batch=1, capacity=capacity)
        one, caches, finite = teacher_forced(
            plan, params, caches, jnp.asarray(tokens), reference.hidden, block=block
        )
        check_finite(finite)
        scores.append(jax.device_get(one))
    logit_db, attention_error = attention_fidelity(plan, references[0])
    row = dict(summarize(scores))
    return row | {"logit_db": logit_db, "attention_error": attention_error}, scores, caches


def sizes(plan: Plan, context: int) -> dict[str, float | int]:
    """Bits and bytes of the caches at this context, from the shapes that `init` allocates."""
    caches = jax.eval_shape(lambda: init_caches(plan, batch=1, capacity=context))
    numbers = lambda c: c.window_key.shape[-1] + c.window_value.shape[-1]  # 0 where they are keys'
    values = sum(c.window_key.shape[0] * c.window_key.shape[2] * numbers(c) for c in caches)
    values *= context
    total = sum(cache_bytes(cache) for cache in caches)
    bits = [history_bits_per_value(m, c) for m, c in zip(plan.methods, caches, strict=True)]
    layers = [len(group.layers) for group in plan.groups]
    return {
        "bits_per_value": float(np.average(bits, weights=layers)),
        "bits_per_value_total": total * 8 / values,
        "cache_bytes": total,
        "bf16_bytes": 2 * values,
    }


def _racer(plan: Plan, caches, token) -> tuple[Plan, State]:
    """A plan and a state to time decode steps from; an end token would stop the work, so there
    is none."""
    plan = dataclasses.replace(plan, config=dataclasses.replace(plan.config, eos_ids=()))
    finite = jnp.ones((plan.config.layers, 2), bool)
    done = jnp.zeros((1,), bool)
    return plan, State(caches, token, done, finite, jax.random.key(0), jnp.int32(0))


def _add_speed(rows: list[dict], racers: dict, model: Model, settings: Settings) -> None:
    seconds = (
        race(racers, model.params, rounds=settings.rounds, steps=settings.steps) if racers else {}
    )
    for row in rows:
        own, base = seconds.get(row["method"]), seconds.get("bf16")
        row["decode_tokens_per_s"] = 1 / own if own else None
        row["decode_vs_bf16"] = base / own if own and base else None


def _samples(
    model: Model, tokens: np.ndarray, sampled: str, settings: Settings
) -> list[dict[str, str]]:
    """Three stretches of the text, long enough to be packed, continued by both caches."""
    length = min(384, len(tokens) // 4)
    starts = [i * (len(tokens) - length) // 2 for i in range(3)]
    prompts = [tokens[s : s + length].tolist() for s in starts]
    outputs = {}
    for shown, name in (("full cache", "bf16"), (sampled, sampled)):
        plan = make_plan(model.config, _method(name, model, settings))
        outputs[shown] = np.asarray(generate(plan, model.params, prompts, max_new=24)[0])
    assert model.tokenizer is not None  # the windows were cut with it
    decode = model.tokenizer.decode
    show = lambda ids: " ".join(decode(ids).split())
    return [
        {"prompt": show(prompt[-24:]), "method": name, "text": show(rows[i])}
        for i, prompt in enumerate(prompts)
        for name, rows in outputs.items()
    ]
