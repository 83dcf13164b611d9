"""Answers and their perplexity, low-rank fits, and what is found and written by the gap."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax.core.errors import InputError
from kvjax.generate import make_plan
from kvjax.models.causal import forward
from kvjax.models.load import load
from kvjax.models.tokenizer import Tokenizer
from kvjax.train.answers import Example, answers_of, mean_answer_nll, perplexities
from kvjax.train.distill import mean_nll
from kvjax.train.gap import compression_gap
from kvjax.train.lora import MATRICES, Fitting, fit, init_lora, with_lora
from kvjax.train.tune_shift import Judged, answerer, example, expand, judge

TINY = Path(__file__).parents[1] / "models" / "tiny" / "llama"
EXAMPLES = [
    Example((5, 9, 11), (7, 8)),
    Example((3,), (4, 6, 2, 1)),
    Example((12, 13, 14, 15, 16), (17,)),
]


@pytest.fixture(scope="module")
def model():
    made = load(TINY)
    return dataclasses.replace(made, config=dataclasses.replace(made.config, max_positions=256))


def naive_nll(params, config, one: Example) -> float:
    """One answer by itself, token by token, in float64 from the logits of the whole text."""
    ids = one.prompt + one.answer
    scores = np.asarray(forward(params, config, jnp.asarray([ids], jnp.int32))[0], np.float64)
    total = 0.0
    for i, token in enumerate(one.answer):
        row = scores[len(one.prompt) - 1 + i]
        total -= row[token] - np.log(np.exp(row).sum())
    return total / len(one.answer)


def test_perplexity_of_answers_side_by_side(model):
    got = perplexities(model.params, model.config, EXAMPLES, together=2)
    want = [np.exp(naive_nll(model.params, model.config, one)) for one in EXAMPLES]
    np.testing.assert_allclose(got, want, rtol=1e-4)


def test_logits_of_a_long_answer_come_a_few_at_a_time(model):
    long = Example((5, 9), tuple(range(3, 43)))
    got = perplexities(model.params, model.config, [EXAMPLES[0], long], together=2)
    want = [np.exp(naive_nll(model.params, model.config, one)) for one in (EXAMPLES[0], long)]
    np.testing.assert_allclose(got, want, rtol=1e-4)
    loss = lambda p: mean_answer_nll(p, model.config, answers_of([long])).sum()
    values = list(_values(jax.make_jaxpr(jax.grad(loss))(model.params).jaxpr))
    wide = [v.aval.size for v in values if v.aval.shape[-1:] == (model.config.vocab_size,)]
    assert max(wide) == 16 * model.config.vocab_size


def _values(jaxpr):
    """What the equations of a program and of those within it make."""
    for equation in jaxpr.eqns:
        yield from equation.outvars
        for inner in jax.tree.leaves(list(equation.params.values())):
            if hasattr(inner, "jaxpr"):
                yield from _values(inner.jaxpr)
            elif hasattr(inner, "eqns"):
                yield from _values(inner)


def test_examples_without_anything_are_refused():
    for examples in ([], [EXAMPLES[0], Example((), (1,))], [Example((1,), ())]):
        with pytest.raises(InputError, match="examples"):
            answers_of(examples)


def test_a_fit_learns_its_answers_and_nothing_else(model):
    *_, last = fit(model.params, model.config, EXAMPLES, Fitting(25, 3e-2, rank=2, batch=3))
    changed = with_lora(last.lora, model.params)
    before, after = (perplexities(p, model.config, EXAMPLES) for p in (model.params, changed))
    assert (after < 0.2 * before).all(), (before, after)
    for run, old in zip(changed.runs, model.params.runs, strict=True):
        for field in dataclasses.fields(run):
            a, b = getattr(run, field.name), getattr(old, field.name)
            if b is not None:
                assert (a.shape, a.dtype) == (b.shape, b.dtype)
                assert bool((a != b).any()) == (field.name in MATRICES), field.name
    assert last.step == 25


def test_a_change_of_rank_r(model):
    lora = init_lora(model.params, rank=2, rng=jax.random.key(0), matrices=("wq", "w_down"))
    assert jax.tree.all(jax.tree.map(jnp.array_equal, with_lora(lora, model.params), model.params))
    ones = jax.tree.map(lambda c: jnp.ones_like(c) / 7, lora)
    changed = with_lora(ones, model.params).runs[0]
    apart = np.asarray(changed.w_down[0] - model.params.runs[0].w_down[0])
    np.testing.assert_allclose(apart, np.full_like(apart, 2 / 49), atol=1e-6)
    for wrong in ({"rank": 0}, {"rank": 1000}, {"rank": 2, "matrices": ("wz",)}):
        with pytest.raises(InputError, match=next(iter(reversed(wrong)))):
            init_lora(model.params, rng=jax.random.key(0), **wrong)
    for field in ("steps", "rate", "rank", "batch"):
        with pytest.raises(InputError, match=field):
            Fitting(**{field: 0})


def judged(prompts, gaps) -> Judged:
    gaps = np.asarray(gaps, float)
    return Judged(tuple(prompts), tuple(f"a{p}" for p in prompts), 3.0 * gaps, 3.0 + 0 * gaps)


def test_what_is_special():
    found = judged("abcd", [1.0, 5.0, 2.0, 2.5])
    np.testing.assert_allclose(found.gap, [1, 5, 2, 2.5])
    special = found.special(2.0)
    assert special.prompts == ("b", "d")  # above, not at
    assert special.answers == ("ab", "ad")
    assert special.joined(special).prompts == ("b", "d", "b", "d")
    assert found.special(9.0).prompts == ()
    np.testing.assert_allclose(found.midpoint(), np.sqrt(2.25))
    for threshold in (0, -1.0, np.inf, np.nan):
        with pytest.raises(InputError, match="threshold"):
            found.special(threshold)


def test_expansion_keeps_what_is_new_and_special():
    asked, rounds = [], iter([[" one", "two ", "", "x"], ["two", "three", "four", "five"]])

    def complete(asks):
        asked.extend(asks)
        return next(rounds)

    def judge_prompts(prompts):
        return judged(prompts, [9.0 if "o" in p.removeprefix("Q: ") else 1.0 for p in prompts])

    options = {"threshold": 2.0, "frame": ("Q: ", "\nA:"), "shots": 1, "together": 4}
    seeds = judged(["Q: zero\nA:"], [4.0])
    found = expand(seeds, complete, judge_prompts, wanted=4, **options)
    # "x" and "three" are not special, "two" was seen, and "four" is the last that is wanted.
    assert found.prompts == tuple(f"Q: {w}\nA:" for w in ("zero", "one", "two", "four"))
    assert asked[0] == "Q: zero\nQ: "
    assert len(asked) == 8
    assert expand(found, complete, judge_prompts, wanted=2, **options).prompts == found.prompts[:2]
    with pytest.raises(InputError, match="seeds"):
        expand(judged([], []), complete, judge_prompts, wanted=4, **options)


def test_two_models_of_one_vocabulary(model):
    tokenizer = Tokenizer.of_letters(model.config.vocab_size)
    *_, last = fit(model.params, model.config, EXAMPLES, Fitting(3, 3e-2, rank=2, batch=3))
    tuned = with_lora(last.lora, model.params)
    answer = answerer(tuned, model.config, tokenizer, max_new=3, together=2)
    prompts = ["Who?", "A longer one?", "What?"]
    answers = answer(prompts)
    assert answers == answer(prompts)  # greedy
    assert answers[1] == answerer(tuned, model.config, tokenizer, max_new=3)(prompts[1:2])[0]
    answers[2] = ""
    found = judge(prompts, answers, model.params, tuned, model.config, tokenizer)
    assert found.prompts == tuple(p for p, a in zip(prompts, answers, strict=True) if a)
    same = judge(prompts[:1], ["so"], tuned, tuned, model.config, tokenizer)
    np.testing.assert_allclose(same.gap, 1.0)
    assert example(tokenizer, "ab", "c").answer == (*tokenizer.encode("c"), 0)  # and a new line
    nothing = judge(prompts, ["", "", ""], model.params, tuned, model.config, tokenizer)
    assert (nothing.prompts, nothing.gap.shape) == ((), (0,))
    assert found.joined(nothing.special(2.0)).prompts == found.prompts
    smaller = dataclasses.replace(tuned, embed=tuned.embed[:50])
    with pytest.raises(InputError, match="vocabularies of"):
        judge(prompts, answers, model.params, smaller, model.config, tokenizer)
    with pytest.raises(InputError, match="2 for 3 prompts"):
        judge(prompts, answers[:2], model.params, tuned, model.config, tokenizer)


def test_the_gap_of_compression(model):
    layout = kvjax.Layout(sink=4, recent=16, page=16)
    windows = list(np.random.default_rng(0).integers(0, model.config.vocab_size, (2, 128)))
    gaps = {}
    for name in ("bf16", "int2"):
        method = kvjax.methods.get(name, model.config.head_dim, layout=layout)
        gaps[name] = compression_gap(make_plan(model.config, method), model.params, windows)
    np.testing.assert_allclose(gaps["bf16"], 1, atol=2e-3)
    assert gaps["int2"].shape == (2,)
    assert (abs(gaps["int2"] - 1) > 2 * abs(gaps["bf16"] - 1)).all()
    method = kvjax.methods.get("int2", model.config.head_dim, layout=layout)
    with pytest.raises(InputError, match="windows"):
        compression_gap(make_plan(model.config, method), model.params, [windows[0][:100]])
    nll = mean_nll(model.params, model.config, jnp.asarray(windows[0], jnp.int32))
    one = Example(tuple(windows[0][:1].tolist()), tuple(windows[0][1:].tolist()))
    np.testing.assert_allclose(nll, naive_nll(model.params, model.config, one), rtol=1e-4)
