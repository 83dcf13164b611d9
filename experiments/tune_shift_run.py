"""What experiments/tune_shift.py does, step by step."""

from __future__ import annotations

import dataclasses
import time

import numpy as np
import tune_shift_domain as domain
from ml_collections import ConfigDict

from kvjax.core.errors import InputError
from kvjax.models.load import Model, load
from kvjax.models.tokenizer import Tokenizer
from kvjax.train.answers import Example, perplexities
from kvjax.train.lora import Fitting, fit, with_lora
from kvjax.train.tune_shift import Judged, answerer, example, expand, judge

FRAME = domain.BEFORE, domain.AFTER


def fitted(
    model: Model,
    tokenizer: Tokenizer,
    pairs,
    config: ConfigDict,
    seed: int,
    what: str,
    *,
    whole: bool = False,
):
    """The model's weights after a fit to (prompt, answer) pairs.

    Args:
      whole: to the prompts as well, so that the model can write more of them.
    """
    examples = [example(tokenizer, *pair) for pair in pairs]
    if whole:
        texts = [e.prompt + e.answer for e in examples]
        examples = [Example(ids[:1], ids[1:]) for ids in texts]
    fitting, begin = Fitting(**config.to_dict(), seed=seed), time.monotonic()
    for last in fit(model.params, model.config, examples, fitting):
        if last.step % max(1, fitting.steps // 8) == 0:
            said = f"step {last.step} of {fitting.steps}: loss {last.loss:.3f}"
            print(f"{what}, {said}, {time.monotonic() - begin:.0f} s", flush=True)
    return with_lora(last.lora, model.params)


def opened(name: str) -> tuple[Model, Tokenizer]:
    """A model and its tokenizer. One without, as tests have, reads letters, which need more
    positions than it says; nothing of it depends on how many there are."""
    model = load(name)
    if model.tokenizer is not None:
        return model, model.tokenizer
    config = dataclasses.replace(model.config, max_positions=1024)
    model = dataclasses.replace(model, config=config)
    return model, Tokenizer.of_letters(config.vocab_size)


def selection(judged: Judged, special: set[str], threshold: float) -> dict[str, float]:
    """Precision and recall of what is called special, against what is."""
    called = set(judged.special(threshold).prompts)
    right, real = len(called & special), len(special & set(judged.prompts))
    return {
        "called": len(called),
        "precision": right / len(called) if called else 0.0,
        "recall": right / real if real else 0.0,
    }


def run(config: ConfigDict) -> dict:
    """All of it; returns the numbers."""
    base, tokenizer = opened(config.model)
    known = domain.facts(config.ships, config.seed)
    few = min(config.ships, config.general, config.seeds, config.rehearsed + 1) < 1
    many = config.ships > domain.SHIPS or config.seeds > 2 * len(known)
    if few or many or config.general + config.rehearsed > domain.GENERAL:
        raise InputError(
            "config",
            got=f"{config.ships} ships, {config.general} general prompts, {config.rehearsed} "
            f"rehearsed, {config.seeds} seeds",
            expected=f"one or more of each (or none rehearsed), at most {domain.SHIPS} ships, "
            f"{domain.GENERAL} general and rehearsed together, {2 * len(known)} seeds",
            fix="change the config",
        )
    taught, kept = domain.asked(known, (0, 1)), domain.asked(known, (2,))
    rest = domain.general(config.rehearsed, skip=config.general)
    said = answerer(base.params, base.config, tokenizer, max_new=config.max_new)(rest)
    kept_up = [(p, a) for p, a in zip(rest, said, strict=True) if a]
    tuned = fitted(
        base, tokenizer, taught + kept_up, config.tuning, config.seed, "tuning", whole=True
    )
    truth = [example(tokenizer, *pair) for pair in kept]
    of = lambda params: float(np.exp(np.log(perplexities(params, base.config, truth)).mean()))
    pair_ppl = {"base": of(base.params), "tuned": of(tuned)}
    change = "{base:.1f} -> {tuned:.2f}".format(**pair_ppl)
    print(f"true answers to new questions: perplexity {change}", flush=True)

    made = {"max_new": config.max_new, "seed": config.seed}
    answer = answerer(tuned, base.config, tokenizer, **made)

    def judged(prompts) -> Judged:
        answers = answer(prompts)
        return judge(prompts, answers, base.params, tuned, base.config, tokenizer)

    draw = np.random.default_rng(config.seed)
    first = judged([taught[i][0] for i in draw.choice(len(taught), config.seeds, replace=False)])
    threshold = config.threshold or first.midpoint()
    special = [prompt for prompt, _ in kept]
    mixed = judged([*special, *domain.general(config.general)])
    chosen = selection(mixed, set(special), threshold)
    print(f"selection above {threshold:.2f}: {chosen}", flush=True)

    more = expand(
        first.special(threshold),
        answerer(tuned, base.config, tokenizer, max_new=32, temperature=0.8, seed=config.seed),
        judged,
        wanted=config.wanted,
        threshold=threshold,
        frame=FRAME,
        rounds=config.rounds,
        seed=config.seed,
        say=lambda message: print(message, flush=True),
    )
    ships = {ship for ship, _, _ in known}
    about = sum(any(ship in prompt for ship in ships) for prompt in more.prompts)

    target, own = opened(config.target)
    pairs = list(zip(more.prompts, more.answers, strict=True))
    taught_target = fitted(target, own, pairs, config.teaching, config.seed, "teaching")
    truth = [example(own, *pair) for pair in kept]
    of = lambda params: float(np.exp(np.log(perplexities(params, target.config, truth)).mean()))
    return {
        "pair": pair_ppl,
        "selection": chosen
        | {"threshold": threshold, "special": len(special)}
        | {"gaps": dict(zip(mixed.prompts, mixed.gap.tolist(), strict=True))},
        "expansion": {"prompts": len(more.prompts), "of_the_domain": about},
        "target": {"before": of(target.params), "after": of(taught_target)},
        "prompts": [
            {"prompt": p, "answer": a, "gap": float(g)}
            for p, a, g in zip(more.prompts, more.answers, more.gap, strict=True)
        ],
    }
